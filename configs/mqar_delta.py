"""MQAR with DeltaNet on the cell of "Updatable Long-Term Memory": 128 tokens, 32 pairs, and the 98,560 layer parameters of
configs/mqar_gpt.py to within 12 (dk 48, dv 43, with a short convolution).
"""

model = "delta"
dk = 48
dv = 43

curriculum = [(2, 60), (8, 40)]  # (pairs, steps), then 32
fresh = True

lr = 1e-2
warmup_steps = 30
schedule = "cosine"
max_steps = 500
eval_interval = 50
stop_accuracy = 0.993

target = 0.99
