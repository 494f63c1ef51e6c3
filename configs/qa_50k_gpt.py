"""Synthetic QA, 50,000 pairs, with GPT: which facts are stored, by how often they were seen?

26 minutes on one of 2 CPU cores. Expected: digit accuracy of 0.90 or more on pairs shown 128 times
an epoch.

The run is 1.4 epochs of 1,434,375 documents. Half of these digits are right at step 2,000.
"""

data = "data_synth"
task = "qa"
num_pairs = 50000

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
max_steps = 4000
eval_interval = 500

target_slice = "exposures=128"
target_accuracy = 0.9
