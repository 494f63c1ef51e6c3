"""Your own facts: up to about 500 questions with answers, in a memory layer that can be edited.

    python train.py configs/own_facts.py --path facts.jsonl --run_name mine

facts.jsonl has a line {"question": "...", "answer": "..."} for each fact; or facts.csv, with
question,answer as its first line. The text is read byte by byte. 500 facts of 40
letters take half a minute on one of 2 CPU cores; for longer or more facts, raise max_steps.
Expected: token accuracy and exact match of 0.99 or more (3 seeds: 1.000).

4,096 slots, more than the facts need, so that an edit changes few others. Positions are not
encoded (pos_emb), so that a new answer may be longer than all others; the short convolution tells
the model in which order letters stand.
"""

model = "memory"
memory_layers = (1,)
mem_n_keys = 64
mem_value_lr_scale = 4.0

data = "data_synth"
task = "text"
path = "facts.jsonl"

dim = 64
dk = dv = 16
n_heads = 4
n_layers = 2
conv_size = 8
pos_emb = "none"
init_std = 0.5

lr = 4e-3
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 128
max_steps = 300
eval_interval = 100

target_accuracy = 0.99
