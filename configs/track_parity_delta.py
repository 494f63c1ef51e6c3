"""Parity with DeltaNet: is the number of ones so far odd? Trained on 64 tokens, tested on 256.

One layer, 12,816 layer parameters. Half a minute on one of 2 CPU cores. Expected: test accuracy of
0.99 or more on 256 tokens (the slice input_seq_len=256), with any seed.

The state must change its sign with every 1 and keep it with every 0. Beta in (0, 2) can do that:
the transition I - beta k k^T has the eigenvalue 1 - beta along its key. With --allow_neg_eigval 0
it is never negative, and the model stays at chance after the first few tokens.
"""

data = "data_track"
task = "parity"
test_lengths = [64, 128, 256]

model = "delta"
allow_neg_eigval = True
n_layers = 1
dim = 32
dk = dv = 16
use_ffn = True  # from a sign to one of two tokens
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

target_accuracy = 0.99
