"""Words in S3 with DeltaNet: each token swaps two of three objects, or none. Where are they now?

One layer, as in configs/track_parity_delta.py. A minute on one of 2 CPU cores. Expected: test
accuracy of 0.99 on 256 tokens with seed 0, four times the length in training. It depends on the
seed: seed 1 ends at 0.84 and still improves, seed 2 stays at chance.

A swap is a reflection, which is one step of the delta rule with beta = 2. With --elements all, a
token may also turn three objects around. That takes two reflections, and one layer of DeltaNet has
one step a token: it stays near chance, and more layers learn no more than the sign of the
permutation.
"""

data = "data_track"
task = "s3"

test_lengths = [64, 128, 256]

model = "delta_product"
n_householder = 2
allow_neg_eigval = True
n_layers = 1
dim = 32
dk = dv = 16
use_ffn = True
init_std = 1.0

lr = 3e-3
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 800
eval_interval = 50
n_val_examples = 100
n_test_examples = 500
target_slice = "input_seq_len=256"
stop_accuracy = 1.0

target_accuracy = 0.95
