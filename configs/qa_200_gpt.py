"""Synthetic QA, 200 pairs, with GPT: which facts are stored, by how often they were seen?

20 seconds on one of 2 CPU cores. Expected: digit accuracy of 0.99 or more on pairs shown 128 times
an epoch.
"""

data = "data_synth"
task = "qa"
num_pairs = 200

dim = 64
dk = dv = 16
n_heads = 4
n_layers = 2
use_ffn = True
conv_size = 8
init_std = 0.5

lr = 3e-3
warmup_steps = 30
lr_schedule = "cosine"
batch_size = 128
max_steps = 300
eval_interval = 100

target_slice = "exposures=128"
target_accuracy = 0.99
