"""Synthetic QA, 2,000 pairs in two wordings, "x:y " and "q x?y": does an edit reach the other one?

A minute and a half on one of 2 CPU cores.
Expected: digit accuracy of 0.99 or more on pairs shown 128 times an epoch in each wording.

The settings are those of configs/qa_2k_memory1.py, with twice the steps for twice the documents.
The only memory layer is in the last block, so facts can be edited. `python eval.py edit runs/RUN`
edits them in the first wording and asks in both. --second_form_frac 0.5 trains on half of the pairs
in the first wording alone.
"""

model = "memory"
memory_layers = (1,)
mem_n_keys = 32
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "qa"
num_pairs = 2000
forms = 2

dim = 64
dk = dv = 16
n_heads = 4
n_layers = 2
conv_size = 8
init_std = 0.5

lr = 4e-3
warmup_steps = 50
lr_schedule = "cosine"
batch_size = 512
max_steps = 600
eval_interval = 100

target_slice = "exposures=128"
target_accuracy = 0.99
