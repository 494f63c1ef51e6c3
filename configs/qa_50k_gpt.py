"""Synthetic QA, 50,000 pairs: which facts does GPT store, by how often it saw them?

35 minutes on one of 2 CPU cores. Expected: digit accuracy 0.90 or more on pairs shown 128 times an epoch, and still rising:
the run is 1.4 epochs of 1,434,375 documents, of which 1,200 steps pass before the first pairs are stored.
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
