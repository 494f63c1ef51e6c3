"""HashHop, trained on one hop: read a chain of hashes in the row itself.

2 minutes on one of 2 CPU cores. Expected: letter accuracy 0.99 or more on one hop; next to nothing on two, three and four.

The short convolution of width 12 sees a hash, " = '" and all letters of the answer so far at once: with 8 it does not see the
hash's first letters any more when the last ones are asked for, and some seeds stay on the plateau. For longer chains:
configs/hashhop_cot_gpt.py. 218 bytes hold 9 hashes with their answers and 4 queries.
"""

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
