"""HashHop with a memory layer in the last block.

The answers are in the sequence, not in the weights, so attention must find them as in
configs/hashhop_gpt.py. 2.5 minutes on one of 2 CPU cores.
Expected: letter accuracy of 0.99 or more on one hop.
"""

model = "memory"
memory_layers = (1,)
mem_n_keys = 16
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "hashhop"
max_bytes = 218
num_queries = 4
n_val_examples = 50
n_test_examples = 250

dim = 128
dk = dv = 32
n_heads = 4
n_layers = 2
conv_size = 12
pos_emb = "none"

lr = 6e-3
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 32
max_steps = 400
eval_interval = 100

target_slice = "hops=1"
target_accuracy = 0.99
