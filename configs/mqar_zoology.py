"""MQAR at the four sizes of Zoology's figure 2 (arXiv 2312.04927): attention, one head, 2 layers.

Vocabulary 8,192. Half a minute on 2 CPU cores. Expected: test token accuracy of 0.995 or more over
all labels, and 0.99 or more at each size. In the paper attention is at 1.0 throughout.

Zoology trains one run per size and width: 64 epochs of 100,000 sequences, at four learning rates.
Here the steps alternate between the sizes, so one run gives all four, and each step has 4,096
tokens. The short convolution takes the place of Zoology's convolution layer below the mixer.
Other widths of the figure: `--dim 128 --dk 128 --dv 128`, and so on.
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
curriculum = [(2, 60), (8, 40)]  # (pairs, steps), then all sizes in turn
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
