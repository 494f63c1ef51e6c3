"""Synthetic QA, 50,000 pairs, with a memory layer in place of the last MLP.

16,384 slots of 64 numbers: 45,000 trained pairs of 19.9 bits are 0.86 bits for each value, where a
table can hold about 2.6. 19 minutes on one of 2 CPU cores. Expected: digit accuracy of 0.6 on pairs
shown 128 times an epoch, and still rising. `python eval.py runs/RUN` prints the bits stored.

The run is 1.4 epochs. After 1,000 steps 0.22 of these digits are right, and chance is 0.1. The
number of steps is the limit, not the table.
"""

model = "memory"
memory_layers = (1,)
mem_n_keys = 128
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "qa"
num_pairs = 50000

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
max_steps = 4000
eval_interval = 500

target_slice = "exposures=128"
target_accuracy = 0.55
