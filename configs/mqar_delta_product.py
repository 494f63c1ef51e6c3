"""MQAR with DeltaProduct: the task of configs/mqar_delta.py, two steps of the delta rule a token.

dk is 64 and dv 57, to pay for the keys and values of the second step: within 0.2% of the layer
parameters there. The state takes 73 kB whatever the length. One to one and a half minutes on one of
2 CPU cores. Expected: test token accuracy of 0.99 or more, with any seed.

Recall needs one step a token. The second one costs a smaller state and more seconds, not accuracy:
170 to 280 steps are enough, with DeltaNet 150 to 190.
"""

model = "delta_product"
n_householder = 2
n_layers = 2
dk = 64
dv = 57
q_kernel = k_kernel = "none"
chunk_size = 16

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 400
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
