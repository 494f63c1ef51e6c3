"""MQAR with updates: 24 pairs in 128 tokens, 12 of them stored again later with a new value; the last one counts.

DeltaNet with the sizes and recipe of configs/mqar_delta.py, two minutes on 2 CPU cores. Expected: test token accuracy 0.97 or
more, and higher on the keys that were stored again (tag `updated` in eval.py): the delta rule takes the old value out as it
writes the new one, so an overwritten key costs no capacity. Attention keeps both values and has to learn which one is newer.
"""

model = "delta"
dk = 48
dv = 43

num_kv_pairs = 24
num_updates = 12

curriculum = [(2, 60), (8, 40)]  # (pairs, steps), then 24
infinite_data = True

lr = 1e-2
warmup_steps = 30
lr_schedule = "cosine"
max_steps = 600
eval_interval = 50
stop_accuracy = 0.99

target_accuracy = 0.97
