"""S3 with DeltaNet: each token swaps two of three objects, or none. Where are the objects now?

One layer, no convolution. A quarter of a minute on one of 2 CPU cores. Expected: test accuracy of
0.99 or more on 256 tokens, four times the length in training (the slice input_seq_len=256).

A swap is a reflection, which is one step of the delta rule with beta = 2. Keys without a feature
map may point in every direction; with silu and a convolution some seeds learn nothing.

With --elements all, a token may also move all three objects. That takes two reflections, and
DeltaNet has one step a token. It learns only the sign of the permutation: an accuracy of 1/3.
"""

data = "data_track"
task = "s3"
elements = "swaps"
test_lengths = [64, 128, 256]

model = "delta"
allow_neg_eigval = True
n_layers = 1
dim = 32
dk = dv = 16
conv_size = 0  # the step of a token depends on that token alone
q_kernel = k_kernel = v_kernel = "none"  # reflections need keys in all directions
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

target_accuracy = 0.99
