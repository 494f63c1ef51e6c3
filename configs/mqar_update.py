"""MQAR with updates: 12 of 24 keys are stored again with a new value, and the last one counts.

128 tokens; DeltaNet of 4 layers with the size of configs/mqar_gpt.py. Two minutes on 2 CPU cores.
Expected: test token accuracy of 0.97 or more, and higher on updated keys (the slice `updated`).

The delta rule removes the old value as it writes the new one, so an updated key costs no capacity.
Attention keeps both values and has to learn which one is newer.
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
