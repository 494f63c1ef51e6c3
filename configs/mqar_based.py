model = "hybrid"
blocks = [
    "linear dk=16 dv=48 q_kernel=taylor k_kernel=taylor v_kernel=none q_norm=none k_norm=none",
    "gpt dk=48 dv=48 q_norm=rms k_norm=rms conv_size=4 window=64",
]
n_layers = 2
pos_emb = "none"

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 240
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
