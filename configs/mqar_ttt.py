"""MQAR with TTT-Linear: the task and recipe of configs/mqar_delta.py.

The inner matrix is square, so dk and dv are 72: within 0.5% of the 98,560 layer parameters of
mqar_gpt.py. A minute on one of 2 CPU cores. Expected: test token accuracy of 0.99 or more. The
state takes 176 kB whatever the length, half of it for the weights before the mini-batch.

It takes about as many steps as DeltaNet. inner_lr is 0.2, since with the paper's 1 it takes all 240
steps. configs/mqar_ttt_mlp.py has an inner net of two layers.
"""

model = "ttt_linear"
n_layers = 2
dk = dv = 72
inner_lr = 0.2

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 240
eval_interval = 20
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
