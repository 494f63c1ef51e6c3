"""S5 with DeltaNet: each token swaps two of five objects, or none. Where are the objects now?

One layer, no convolution. Half a minute on one of 2 CPU cores. Expected: test accuracy of 0.99 or
more on 256 tokens, four times the length in training (the slice input_seq_len=256), with each of
three seeds.

As in configs/track_s3_delta.py a swap is one step of the delta rule with beta = 2. There are 120
arrangements of five objects instead of 6, so the learning rate is lower and training longer: with
the settings of S3, one of three seeds stays at 0.15. Attention and diagonal recurrences of constant
depth are believed unable to do this at every length (Merrill et al. 2024, arXiv 2404.08819).
"""

data = "data_track"
task = "s5"
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

lr = 5e-3
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 1500
eval_interval = 50
n_val_examples = 100
n_test_examples = 500
target_slice = "input_seq_len=256"
stop_accuracy = 1.0

target_accuracy = 0.99
