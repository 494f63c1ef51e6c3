"""MQAR with Mamba-2: the task of configs/mqar_delta.py.

2 layers of its widths: within 0.2% of the 98,560 layer parameters of mqar_gpt.py. The state takes
147 kB whatever the length. One to three minutes on one of 2 CPU cores. Expected: test token
accuracy of 0.99 or more.

Queries and keys have no norm, as in the paper: with keys of length 1 the accuracy is 0.01 after 300
steps. Each value is written times a step, which starts between 0.001 and 0.1. So at first what is
read is small beside the skip connection. Seed 0 needs 630 steps, seeds 1 and 2 need 240.
"""

model = "mamba2"
n_layers = 2
dk = 96
dv = 87
q_kernel = k_kernel = "none"
q_norm = k_norm = "none"  # as in the paper
chunk_size = 32

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 800
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
