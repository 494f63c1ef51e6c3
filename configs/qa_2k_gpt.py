"""Synthetic QA, 2,000 pairs: which facts does GPT store, by how often it saw them?

2 minutes on one of 2 CPU cores. Expected: digit accuracy 0.99 or more on pairs shown 128 times an epoch, falling with
the number of times; chance (0.1) on pairs never shown.

The short convolution of width 8 sees a whole key at its colon, which shortens the plateau before the first facts are stored.
"""

data = "data_synth"
task = "qa"
num_pairs = 2000

dim = 128
dk = dv = 32
n_heads = 4
n_layers = 2
use_ffn = True
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
