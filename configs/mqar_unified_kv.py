"""MQAR with UnifiedKV: one vector per head and token is both key and value.

The task and recipe of configs/mqar_gpt.py, and the same 98,560 layer parameters (du 64 instead of
dk = dv = 48). The cache has two thirds of the size of GPT's. Half a minute on 2 CPU cores.
Expected: test token accuracy of 0.99 or more.
"""

model = "unified_kv"
du = 64
init_std = 1.0

curriculum = [(2, 100), (8, 50)]  # (pairs, steps), then 32
infinite_data = True

lr = 12e-3
warmup_steps = 30
lr_schedule = "cosine"
max_steps = 300
eval_interval = 50
stop_accuracy = 0.993

target_accuracy = 0.99
