"""Synthetic QA, 2,000 pairs, with memory layers beside the MLPs: a router weights both per token.

A minute and a half on one of 2 CPU cores.
Expected: digit accuracy of 0.99 or more on pairs shown 128 times an epoch.
Values learn 4 times as fast as other weights: qa_2k_memory.py says why.
"""

model = "memory_router"
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
