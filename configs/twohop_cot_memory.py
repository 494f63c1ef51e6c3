"""Two-hop queries with chain of thought and memory layers, 400 facts: 576 slots for all blocks.

3 minutes on one of 2 CPU cores.
Expected: 0.98 or more of the digits on in-distribution queries.
Values learn 4 times as fast as other weights: qa_2k_memory.py says why.
"""

model = "memory"
memory_layers = (0, 1, 2)
mem_n_keys = 24
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "twohop"
num_entities = 25
num_relations = 16
phi = 8
cot_frac = 1

dim = 64
dk = dv = 16
n_heads = 4
n_layers = 3
init_std = 0.3

lr = 4e-3
weight_decay = 0.1
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 512
max_steps = 600
eval_interval = 200

target_slice = "query=in-distribution"
target_accuracy = 0.98
