"""MQAR with linear attention: the task, recipe and widths of configs/mqar_delta.py.

Its state takes 147 kB whatever the length. A minute on one of 2 CPU cores. Expected: test token
accuracy of 0.99 or more.

A sum of all pairs is enough here: with 96 features per head, 32 keys can be orthogonal.
configs/mqar_retnet.py forgets with time.
"""

model = "linear"
n_layers = 2
dk = 96
dv = 87
q_kernel = k_kernel = "none"
chunk_size = 32

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 400
eval_interval = 20
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
