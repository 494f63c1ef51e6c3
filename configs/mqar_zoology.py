"""MQAR on the four cells of Zoology's figure 2 (arXiv 2312.04927), attention: vocabulary 8,192, one head, 2 layers.

Half a minute on 2 CPU cores. Expected: test token accuracy 0.995 or more over all labels, and 0.99 or more in every cell, as
in the paper, where attention is at 1.0 throughout.

Zoology trains one run per cell and width, 64 epochs of 100,000 rows, over four learning rates. Here steps take turns in the
cells, so one run gives the whole line, reported cell by cell; each step has 4,096 tokens. The short convolution stands in for
Zoology's convolution layer below the mixer. `--dim 128 --dk 128 --dv 128` and so on walk along the figure's other axis.
"""

model = "gpt"
dim = dk = dv = 64
n_layers = 2
n_heads = 1
conv_size = 4
pos_emb = "none"
init_std = 0.02

vocab_size = 8192
train_sizes = [(64, 4), (128, 8), (256, 16), (512, 64)]  # (tokens, pairs)
curriculum = [(2, 60), (8, 40)]  # (pairs, steps), then the cells in turn
infinite_data = True
n_val_examples = 100
n_test_examples = 1000

lr = 6e-3
warmup_steps = 30
lr_schedule = "cosine"
max_steps = 300
eval_interval = 40
stop_accuracy = 0.9985

target_accuracy = 0.995
