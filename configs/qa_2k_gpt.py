"""Synthetic QA, 2,000 pairs, with GPT: which facts are stored, by how often they were seen?

2 minutes on one of 2 CPU cores. Expected: digit accuracy of 0.99 or more on pairs shown 128 times
an epoch, less on pairs shown less often, and chance (0.1) on pairs never shown.

With the short convolution of width 8, the position of the colon sees the whole key. That shortens
the plateau before the first facts are stored.
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
