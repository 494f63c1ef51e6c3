"""Addition modulo 3 with DeltaProduct: what is the sum of all tokens so far, modulo 3?

One layer, four heads, two steps of the delta rule a token. Trained on 32 tokens, tested on up to
128. Half a minute on one of 2 CPU cores. Expected: test accuracy of 0.99 or more on 128 tokens (the
slice input_seq_len=128), with each of three seeds.

Adding 1 modulo 3 is a rotation by 120 degrees, which is two reflections, one after the other. With
--n_householder 1 this is DeltaNet, which has one. Larger moduli have smaller angles and take longer
to learn: RESULTS.md has the numbers (state tracking).
"""

data = "data_track"
task = "mod_add"
modulus = 3
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

lr = 3e-3
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 1000
eval_interval = 50
n_val_examples = 100
n_test_examples = 500
target_slice = "input_seq_len=128"
stop_accuracy = 0.999

target_accuracy = 0.99
