"""MQAR with GPT: 128 tokens, 32 pairs, vocabulary 2,048, as in "Updatable Long-Term Memory".

98,560 layer parameters. A quarter of a minute on 2 CPU cores, most of it training.
Expected: test token accuracy of 0.99 or more, with any seed.

The curriculum matters most. Trained on 32 pairs from the start (configs/ultm_gpt.py), this model
stays near chance for thousands of steps. Attention has to learn a circuit of two steps: bind each
value to the key before it, then look the key up. Sequences with 2 pairs are short, so a step has
many of them, and the circuit forms within 40 to 100 steps. It then works for 32 pairs at once. A
stage ends as soon as its loss shows that the circuit is there: fast seeds save steps, and slow
seeds get the time that they need.

Three more choices matter. Initial embeddings have norm 8 instead of 0.16, so that tokens differ
from the start. Norms of queries and keys bound the attention scores. Both allow the high learning
rate. RESULTS.md has a table of what each choice is worth.
"""

model = "gpt"
dk = dv = 48
init_std = 1.0
q_norm = k_norm = "rms"

curriculum = [(2, 100), (8, 60)]  # (pairs, steps at most), then 32
stage_loss = 0.8  # nats; a stage ends below it
infinite_data = True

lr = 3e-2
warmup_steps = 20
lr_schedule = "cosine"
max_steps = 200
eval_interval = 10
n_val_examples = 200
eval_batch_size = 32  # what stays in the cache of a CPU core
stop_accuracy = 0.993

target_accuracy = 0.99
