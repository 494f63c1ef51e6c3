"""Digit lookup with memory layers: 2,000 keys with random values, 576 slots of 64 numbers.

Both blocks share the slots. 3 minutes on one of 2 CPU cores.
Expected: digit accuracy of 0.99 or more on known keys, and chance (0.2) on unseen ones.
Values learn 4 times as fast as other weights: qa_2k_memory.py says why.
"""

model = "memory"
memory_layers = (0, 1)
mem_n_keys = 24
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "digits"
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
batch_size = 256
max_steps = 1000
eval_interval = 200

target_slice = "key=known"
target_accuracy = 0.99
