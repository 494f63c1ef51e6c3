"""MQAR with a short convolution: half the model of configs/mqar_gpt.py, 99% in under 60 steps.

2 layers, no positions. Ten seconds on 2 CPU cores.
Expected: test token accuracy of 0.99 or more, with any seed.

A causal convolution of width 4 on queries, keys and values shows each token the one before it. So
binding a value to its key needs no layer of attention and no positions. Only the lookup is left to
learn. Small initial embeddings work better here than the large ones of mqar_gpt.py.

To compare architectures, give all of them this convolution, or none.
"""

model = "gpt"
n_layers = 2
dk = dv = 48
conv_size = 4
pos_emb = "none"
init_std = 0.02
q_norm = k_norm = "rms"

curriculum = [(2, 60), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 2e-2
warmup_steps = 30
lr_schedule = "cosine"
max_steps = 100
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
