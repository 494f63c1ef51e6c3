"""Models of which the tests of ablation and patching know what they must find."""

import numpy as np
import torch

import memory
from analysis.hooks import Examples

N_SLOTS = 25  # of a memory layer of toys.ablation_model

VARIANTS = {  # of toys.ablation_model: the settings that change what a slot does
    "shared values": dict(),
    "own values": dict(mem_share_values=False),
    "gated": dict(mem_gated=True, mem_v_dim=4),
    "sigmoid": dict(mem_score="sigmoid", residual_mul=True),
    # A selection bias chooses slots in another order than that of their scores.
    "biased": dict(mem_balance_rate=0.01),
    "router": dict(cls=memory.MemoryRouterGPT),
}


def planted_memory(answer_of, V=9, n=3, n_layers=1):
    """A model without attention in which slot s holds the answer to token s: answer_of (V,).

    Tokens are one-hot in the first V features of the residual stream, answers in the last V.
    n_layers: blocks; those after the first do nothing.
    """
    c = memory.Config(
        dim=2 * V, n_layers=n_layers, n_heads=1, dk=2, dv=2, pos_emb="none", vocab_size=V,
        seq_len=2, memory_layers=(0,), mem_n_keys=n, mem_heads=1, mem_knn=2, mem_k_dim=2 * n,
        mem_query_norm="none",
    )  # fmt: skip
    model = memory.MemoryGPT(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.layers[0].ffn_norm.weight.fill_(1)
        model.final_norm.weight.fill_(1)
        layer = model.layers[0].memory
        for v in range(V):
            model.embed.weight[v, v] = 1
            layer.query.weight[v // n, v] = 20
            layer.query.weight[n + v % n, v] = 20
            layer.values[v, V + answer_of[v]] = 1
            model.lm_head.weight[v, V + v] = 5
        for half in range(2):
            layer.keys[0, half] = torch.eye(n)
    return model


def planted_facts(V=9, answer=lambda token: (token + 4) % 9, n_layers=1):
    """-> model, Examples: one for each token v, with answer(v), (v + 4) mod 9; all are correct."""
    answer_of = answer(torch.arange(V))
    model = planted_memory(answer_of, V, n_layers=n_layers)
    tokens = torch.stack([torch.zeros(V, dtype=torch.long), torch.arange(V)], 1)
    answers = answer_of[:, None]
    label_pos = torch.ones(V, 1, dtype=torch.long)
    return model, Examples(np.arange(V), tokens, label_pos, answers, {"exposures": np.arange(V)})


def planted_positions(depends):
    """Two labels: tokens 0 to 3 stand at the first, 4 to 8 at the second; answers are of their own.

    depends: a position takes none of the other one's answers, as its token speaks against them.
    Otherwise, what memory reads says the same at both.
    """
    answer_of = torch.tensor([1, 2, 3, 0, 5, 6, 7, 8, 4])
    model = planted_memory(answer_of)
    if depends:
        with torch.no_grad():
            model.embed.weight[:4, 9 + 4 :] = -2
            model.embed.weight[4:, 9 : 9 + 4] = -2
    tokens = torch.cartesian_prod(torch.arange(4), torch.arange(4, 9))
    label_pos = torch.arange(2).expand(20, 2)
    return model, Examples(np.arange(20), tokens, label_pos, answer_of[tokens], {})


def planted_groups():
    """planted_facts in which slots s and t hold the same answer if s = t mod 3.

    -> model, Examples: 27, of which three need each slot.
    """
    model, one = planted_facts(answer=lambda token: token % 3)
    first, last = torch.cartesian_prod(torch.arange(3), torch.arange(9)).T
    examples = one.select(last.numpy())
    examples.tokens[:, 0] = first
    examples.indices = np.arange(27)
    return model, examples
