"""MQAR with Kimi Delta Attention: the task of configs/mqar_delta.py, with up to 400 steps.

dv is 71, to pay for the projection of the decay: within 0.3% of the layer parameters there. The
state takes 122 kB whatever the length. Two minutes on one of 2 CPU cores. Expected: test token
accuracy of 0.99 or more.

Nothing should be forgotten in this task, so the model must unlearn the decay of every row of its
state. 130 to 170 steps are enough.
"""

model = "kda"
n_layers = 2
dk = 96
dv = 71
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
