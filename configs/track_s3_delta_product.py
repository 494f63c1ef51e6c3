"""S3 with DeltaProduct: each token is one of all six permutations, in two steps of the delta rule.

One layer, four heads, 14,664 layer parameters. Trained on 32 tokens, tested on up to 128. A quarter
of a minute on one of 2 CPU cores. Expected: test accuracy of 0.99 or more on 128 tokens (the slice
input_seq_len=128), with each of three seeds.

A token that moves all three objects is two reflections, one after the other. With
--n_householder 1 this is DeltaNet, which has one. It learns only the sign of the permutation: an
accuracy of 1/3.
"""

data = "data_track"
task = "s3"
input_seq_len = 32
test_lengths = [32, 64, 128]

model = "delta_product"
n_householder = 2
allow_neg_eigval = True
n_layers = 1
n_heads = 4
dim = 32
dk = dv = 8
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
target_slice = "input_seq_len=128"
stop_accuracy = 0.999

target_accuracy = 0.99
