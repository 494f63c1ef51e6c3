"""MQAR with UnifiedKV: one vector per head and token is both key and value.

The task and recipe of configs/mqar_gpt.py, and the same 98,560 layer parameters (du 64 instead of
dk = dv = 48). The cache has two thirds of the size of GPT's. A quarter of a minute on 2 CPU cores.
Expected: test token accuracy of 0.99 or more.

The learning rate is lower than in mqar_gpt.py, and the first stage of the curriculum may be longer:
at 3e-2 one seed in three never leaves that stage.
"""

model = "unified_kv"
du = 64
init_std = 1.0
q_norm = k_norm = "rms"

curriculum = [(2, 200), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 2e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 300
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
