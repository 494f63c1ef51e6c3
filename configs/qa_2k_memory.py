"""Synthetic QA, 2,000 pairs, with memory layers in place of the MLPs.

1,024 slots of 64 numbers, shared by both blocks. A minute and a half on one of 2 CPU cores.
Expected: digit accuracy of 0.99 or more on pairs shown 128 times an epoch.

1,800 pairs of 19.9 bits are 35,880 bits: 0.55 for each of the 65,536 values. Such a table can hold
about 2.6 per value, so here the number of steps is the limit. `python eval.py runs/RUN` prints how
many bits are stored. A value learns only where it is read, so values have 4 times the learning rate
of other weights: with the same rate, digit accuracy is 0.955 in place of 0.99 (seed 0).
"""

model = "memory"
memory_layers = (0, 1)
mem_n_keys = 32
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "qa"
num_pairs = 2000

dim = 64
dk = dv = 16
n_heads = 4
n_layers = 2
conv_size = 8
init_std = 0.5

lr = 4e-3
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 512
max_steps = 300
eval_interval = 100

target_slice = "exposures=128"
target_accuracy = 0.99
