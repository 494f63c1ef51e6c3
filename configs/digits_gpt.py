"""Digit lookup, 2,000 keys with random values: what is stored, and what is answered to keys never seen.

2 minutes on one of 2 CPU cores. Expected: digit accuracy 0.99 or more on known keys; chance (0.2) on unseen ones.

The short convolution of width 8 sees a whole key at its colon; without it the plateau before the first facts are stored takes
several times as long. With --rule selfindex the value can be worked out from the key, and unseen keys are answered as well.
"""

data = "data_synth"
task = "digits"
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
batch_size = 256
max_steps = 500
eval_interval = 100

target_slice = "key=known"
target_accuracy = 0.99
