"""MQAR with MesaNet: the task and recipe of configs/mqar_delta.py.

dv is 86, to pay for the write strength. Two minutes on one of 2 CPU cores. Expected: test token
accuracy of 0.99 or more.

It reads with the linear map that fits all pairs best. It takes 90 to 100 steps, DeltaNet 150 to
190. The state is twice as large as DeltaNet's, 293 kB, since it also holds the sum of k k^T.
"""

model = "mesa"
n_layers = 2
dk = 96
dv = 86
q_kernel = k_kernel = "none"
chunk_size = 64

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 240
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
