"""MQAR with TTT-MLP: the task and recipe of configs/mqar_ttt.py, with an inner net of two layers.

94,864 layer parameters. A minute on one of 2 CPU cores. Expected: test token accuracy of 0.99 or
more (0.996 with seeds 0 to 2). The state takes 415 kB whatever the length, half of it for the
weights before the mini-batch.

It takes fewer steps than TTT-Linear, 100 to 120 instead of 180, but each takes longer.
"""

model = "ttt_mlp"
n_layers = 2
dk = dv = 40
inner_lr = 0.1

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
