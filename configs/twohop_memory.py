"""Two-hop queries with memory layers, 400 facts: can it combine stored facts?

576 slots, shared by all blocks. 3 minutes on one of 2 CPU cores. Expected: 0.99 or more on trained
queries, near chance on all others, as in configs/twohop_gpt.py.

It combines facts once the entity in between is written out: configs/twohop_cot_memory.py.
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
max_steps = 800
eval_interval = 200

target_slice = "query=trained"
target_accuracy = 0.99
