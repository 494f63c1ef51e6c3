"""Words in S3 with DeltaProduct: any of the six permutations a token, two steps for each.

One layer, four heads, no convolution. Trained on 32 tokens, tested on up to 128. HARDWARE
Expected: test accuracy of 0.95 or more on 128 tokens (the slice input_seq_len=128), EXPECTED

A token that turns three objects around is two reflections, one after the other. With
--n_householder 1 this is DeltaNet, which has one a token: EXPECTED1.
"""

data = "data_track"
task = "s3"
input_seq_len = 32
test_lengths = [32, 64, 128]

model = "delta_product"
n_householder = 2
allow_neg_eigval = True
n_layers = 1
n_heads = 4  # the more heads, the more of them may find a representation of the group
dim = 32
dk = dv = 8
conv_size = 0  # a token says all that its step needs
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

target_accuracy = 0.95
