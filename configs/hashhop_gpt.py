"""HashHop with GPT, trained on one hop: follow a chain of hashes within the sequence.

2 minutes on one of 2 CPU cores.
Expected: letter accuracy of 0.99 or more on one hop, and exact match near 0 on two and more.

The short convolution has width 12 to see a hash, " = '" and all letters of the answer so far. With
width 8 it does not see the first letters of the hash where the last letters of the answer are
predicted, and some seeds stay on the plateau. 218 bytes hold 9 hashes with their answers and 4
queries. For longer chains: configs/hashhop_cot_gpt.py.
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
