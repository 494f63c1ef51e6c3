"""Parity with GPT, which does not learn it: the task of configs/track_parity_delta.py.

Two layers with convolutions, 25,472 layer parameters. A minute on one of 2 CPU cores.
Expected: chance, 0.5, beyond the first few tokens.

Attention takes a weighted mean over the tokens so far. The more tokens there are, the less a single
1 changes that mean, and every single 1 changes the answer.
"""

data = "data_track"
task = "parity"
test_lengths = [64, 128, 256]

model = "gpt"
n_layers = 2
dim = 32
dk = dv = 16
conv_size = 4
use_ffn = True
init_std = 1.0

lr = 1e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 500
eval_interval = 50
n_val_examples = 100
n_test_examples = 500
target_slice = "input_seq_len=256"
stop_accuracy = 1.0
target_accuracy = 0.5
