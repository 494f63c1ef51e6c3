"""Synthetic QA, 2,000 pairs, with memory layers in blocks of the delta rule.

As configs/qa_2k_memory.py, but no block has attention: the state holds the question, the table the
answers. Less than two minutes of one of 2 CPU cores.
Expected: digit accuracy of 0.99 or more on pairs shown 128 times an epoch.

The blocks keep no positions, since the convolution and the recurrence know the order of the digits.
"""

model = "memory"
blocks = ["delta n_heads=4 dk=16 dv=16 conv_size=8"]
memory_layers = (0, 1)
mem_n_keys = 32
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "qa"
num_pairs = 2000

dim = 64
n_layers = 2
init_std = 0.5
pos_emb = "none"

lr = 4e-3
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 512
max_steps = 300
eval_interval = 100

target_slice = "exposures=128"
target_accuracy = 0.99
