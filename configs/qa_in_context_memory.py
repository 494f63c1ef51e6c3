"""Synthetic QA, 200 pairs in a memory table, and pairs to be read in the context.

Most training documents are like "8213:4410 0731:9925 8213:", with new numbers in each, so the model
also learns to find an answer in its context. `python eval.py consolidate runs/RUN` writes what it
reads there into the table.

Three and a half minutes on one of 2 CPU cores, beside many other processes.
Expected: digit accuracy of 0.99 or more on pairs shown 128 times an epoch.

A document shows 1 to 4 pairs. Those with one pair are learned first, and shorten the plateau before
the induction circuit forms. With 4 pairs of 6 digits in each, it did not form in 500 steps. With
6,000 documents instead of 20,000, one of three seeds seems to have memorised them instead.
Positions are not encoded: a question stands at the beginning of a document or after a context.
"""

model = "memory"
memory_layers = (1,)
mem_n_keys = 64
mem_value_lr_scale = 4.0
mem_log_interval = 100

data = "data_synth"
task = "qa"
num_pairs = 200
num_digits = 4
context_docs = 20000
context_pairs = 4

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
max_steps = 600
eval_interval = 200

target_slice = "exposures=128"
target_accuracy = 0.99
