"""HashHop with chain of thought: one and two hops, with the hashes on the way: "a = 'b = c'".

3 minutes on one of 2 CPU cores. Expected: letter accuracy of 0.97 or more on two hops. Three and
four hops, longer than any in training, fail.
"""

data = "data_synth"
task = "hashhop"
max_bytes = 224
hash_len = 3
hops = (1, 2)
cot_frac = 1.0
num_queries = 4
n_val_examples = 50
n_test_examples = 250

dim = 128
dk = dv = 32
n_heads = 4
n_layers = 2
conv_size = 12
pos_emb = "none"

lr = 8e-3
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 32
max_steps = 600
eval_interval = 200

target_slice = "hops=2"
target_accuracy = 0.97
