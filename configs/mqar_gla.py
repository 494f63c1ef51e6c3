"""MQAR with gated linear attention: the task and recipe of configs/mqar_delta.py.

dv is 71, to pay for the projection of the decay. The state takes 122 kB whatever the length. Two
minutes on one of 2 CPU cores. Expected: test token accuracy of 0.99 or more.

Each row of the state starts with a decay of about 0.96 per token, which halves it in 16 tokens.
Decays depend on the token, so the model can learn to forget less: 190 to 320 steps are enough.
"""

model = "gla"
n_layers = 2
dk = 96
dv = 71
q_kernel = k_kernel = "none"
chunk_size = 32

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 500
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
