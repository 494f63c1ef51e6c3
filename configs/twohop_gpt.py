"""Two-hop queries with GPT, 400 facts (25 entities, 16 relations): can it combine stored facts?

Two minutes on one of 2 CPU cores. Expected: 0.99 or more on trained queries, near chance on
in-distribution ones (both facts occur in trained queries) and on out-of-distribution ones. The
model stores each trained query as one more fact.

It combines facts once the entity in between is written out: configs/twohop_cot_gpt.py.
"""

data = "data_synth"
task = "twohop"
num_entities = 25
num_relations = 16
phi = 8

dim = 64
dk = dv = 16
n_heads = 4
n_layers = 3
use_ffn = True
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
