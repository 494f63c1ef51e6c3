"""MQAR with a short convolution: half the model of configs/mqar_gpt.py, 99.9% in under 100 steps.

2 layers, no positions. 15 seconds on 2 CPU cores.
Expected: test token accuracy of 0.995 or more, with any seed.

A causal convolution of width 4 on queries, keys and values shows each token the one before it. So
binding a value to its key needs no layer of attention and no positions. Only the lookup is left to
learn: 30 steps with 2 pairs and 30 with 8 are enough. Small initial embeddings work better here
than the large ones of mqar_gpt.py.

To compare architectures, give all of them this convolution, or none.
"""

model = "gpt"
n_layers = 2
dk = dv = 48
conv_size = 4
pos_emb = "none"
init_std = 0.02

curriculum = [(2, 30), (8, 30)]  # (pairs, steps), then 32
infinite_data = True

lr = 6e-3
warmup_steps = 30
lr_schedule = "cosine"
max_steps = 200
eval_interval = 20
stop_accuracy = 0.998

target_accuracy = 0.995
