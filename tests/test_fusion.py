"""fusion.py: masks, positions and caches, against decoding with a dense mask and no cache."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from myriadlama import decoding, fact_files, fusion, llama, loading, prompts
from naive import naive_decode
from toys_llama import (
    V,
    causal_logits,
    decode_fused,
    load_theirs,
    our_forward,
    random_ids,
    random_llama,
    random_question,
    transformers_forward,
)

# ---- masks and positions by hand -----------------------------------------------------------------


def test_dense_masks_of_each_scheme():
    """A token of the prefix, then templates of 1, 1 and 2 tokens, then the answer."""
    is_manual = torch.tensor([True, True, False])
    template = torch.tensor([fusion.PREFIX, 0, 1, 2, 2, fusion.ANSWER])
    masks = {}
    for scheme in fusion.MASKS:
        masks[scheme] = fusion.dense_mask(scheme, template, is_manual).int().tolist()
    assert masks["isolated"] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert masks["manual_cross"] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert masks["full"] == torch.ones(6, 6).tril().int().tolist()


def test_templates_that_see_each_other_are_encoded_together():
    is_manual = torch.tensor([True, True, False])
    assert fusion.encode_groups("isolated", is_manual) == [[0], [1], [2]]
    assert fusion.encode_groups("manual_cross", is_manual) == [[0, 1], [2]]
    assert fusion.encode_groups("full", is_manual) == [[0, 1, 2]]


def test_positions_by_hand():
    """After a prefix of 10 tokens; between templates stand answer start and separator, 7 and 3."""
    templates = [[11, 12], [13], [14, 15, 16]]
    question = fusion.Question(templates, torch.tensor([True, True, False]), 7, [3])
    rows, answer_position = fusion.layout(question, 10, "manual_cross", "restart")
    assert rows == [
        ([11, 12, 13], [10, 11, 10]),
        ([14, 15, 16], [10, 11, 12]),
    ]
    assert answer_position == 13
    rows, answer_position = fusion.layout(question, 10, "isolated", "sequential")
    assert rows == [
        ([11, 12, 7, 3], [10, 11, 12, 13]),
        ([13, 7, 3], [14, 15, 16]),
        ([14, 15, 16], [17, 18, 19]),
    ]
    assert answer_position == 20


def test_rows_with_one_beginning_by_hand(monkeypatch):
    """At other positions a token is another one, and so is one after another token. The mask is
    made in blocks, here of 3 tokens."""
    monkeypatch.setattr(fusion, "BLOCK", 3)
    rows = [([5, 6, 7], range(2, 5)), ([5, 6, 8, 7], range(2, 6)), ([6, 7], [3, 4]), ([5], [2])]
    ids, positions, paths = fusion.merge_beginnings(rows)
    assert ids.tolist() == [[5, 6, 7, 8, 7, 6, 7]]
    assert positions.tolist() == [[2, 3, 4, 4, 5, 3, 4]]
    assert paths == [[0, 1, 2], [0, 1, 3, 4], [5, 6], [0]]
    blocks = []
    for keys, mask in fusion.path_masks(paths, 7):
        blocks.append((keys.tolist(), mask.int().tolist()))
    assert blocks == [
        ([0, 1, 2], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        ([0, 1, 3, 4, 5], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]),
        ([5, 6], [[1, 1]]),
    ]


# ---- decoding ------------------------------------------------------------------------------------


def test_rows_with_one_beginning_are_encoded_as_if_they_were_alone():
    """Several blocks of tokens, against a causal pass over prefix and row; joined with others."""
    model, rng = random_llama(), np.random.default_rng(6)
    prefix, rows = random_ids(rng, 9), []
    for length in rng.integers(1, 13, 50):
        rows.append((rng.integers(10, 13, length).tolist(), range(9, 9 + length)))
    prefix_kv = fusion.prefill_prefix(model, prefix)
    encoded = fusion.prefill_blocks(model, prefix_kv, rows[:40])
    T = encoded.kv[0][0].shape[2]
    assert 2 * fusion.BLOCK < T < sum(len(ids) for ids, _ in rows[:40])
    encoded = fusion.join(encoded, fusion.prefill_blocks(model, prefix_kv, rows[40:]))
    for (ids, _), path in zip(rows, encoded.paths, strict=True):
        whole = torch.tensor([prefix + ids])
        expected = model.encode(whole, torch.arange(whole.shape[1])[None], llama.causal_attention)
        for ours, alone in zip(encoded.kv, expected, strict=True):
            for x, y in zip(ours, alone):
                torch.testing.assert_close(x[:, :, path], y[:, :, 9:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheme", fusion.MASKS)
@pytest.mark.parametrize("positions", ["restart", "sequential"])
def test_fused_decoding_equals_transformers_with_a_dense_mask(tiny_llamas, scheme, positions):
    """34 questions here, about 200 over the schemes and positions."""
    theirs = load_theirs(tiny_llamas / "scaled", attn_implementation="eager")
    model, _ = loading.load(str(tiny_llamas / "scaled"))
    forward = transformers_forward(theirs)
    rng = np.random.default_rng(0)
    prefix = rng.integers(10, 250, 13).tolist()
    for _ in range(34):
        question = random_question(rng, n=int(rng.integers(1, 5)))
        (got,) = decode_fused(model, prefix, [question], scheme, positions, -0.7, 3)
        expected, _ = naive_decode(forward, prefix, question, scheme, positions, -0.7, 3)
        assert got == expected


@pytest.mark.parametrize("scheme", fusion.MASKS)
@pytest.mark.parametrize("positions", ["restart", "sequential"])
@pytest.mark.parametrize("bias", [0.0, -1.4])
def test_batches_with_caches_equal_one_question_without(scheme, positions, bias):
    model, rng = random_llama(), np.random.default_rng(1)
    prefix = random_ids(rng, 9)
    questions = [random_question(rng) for _ in range(16)]
    together = decode_fused(model, prefix, questions, scheme, positions, bias)
    for question, answer in zip(questions, together):
        assert decode_fused(model, prefix, [question], scheme, positions, bias) == [answer]
        naive, _ = naive_decode(our_forward(model), prefix, question, scheme, positions, bias)
        assert naive == answer


@pytest.mark.parametrize("scheme", fusion.MASKS)
def test_flex_attention_encodes_the_same(monkeypatch, scheme):
    """The GPU path, uncompiled, on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(fusion, "BLOCK", 16)  # several blocks
    model, rng = random_llama(), np.random.default_rng(2)
    prefix_kv = fusion.prefill_prefix(model, random_ids(rng, 5))
    rows = []
    for question in (random_question(rng), random_question(rng, n=3)):
        rows += fusion.layout(question, 5, scheme, "sequential")[0]

    def attention(*args, **options):
        # The kernel for decoding, which torch takes for few queries, fails with such a mask.
        assert options["kernel_options"] == {"FORCE_USE_FLEX_ATTENTION": True}
        return flex_attention(*args, **options)

    blocks = fusion.prefill_blocks(model, prefix_kv, rows)
    packed = fusion.prefill_flex(model, prefix_kv, rows, attention)
    assert blocks.paths == packed.paths
    for block_kv, packed_kv in zip(blocks.kv, packed.kv):
        for x, y in zip(block_kv, packed_kv):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["restart", "sequential"])
@pytest.mark.parametrize("scheme", fusion.MASKS)
def test_one_template_is_plain_decoding(scheme, positions):
    model, rng = random_llama(), np.random.default_rng(3)
    prefix, question = random_ids(rng, 9), random_question(rng, n=1)
    ids = prefix + question.templates[0] + [question.answer_start]
    (answer,) = decode_fused(model, prefix, [question], scheme, positions)
    for token in answer:
        assert int(causal_logits(model, torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def test_the_order_of_isolated_templates_does_not_matter_when_they_restart():
    model, rng = random_llama(), np.random.default_rng(4)
    prefix, question = random_ids(rng, 9), random_question(rng)
    templates = [question.templates[i] for i in (2, 0, 3, 1)]
    other = fusion.Question(
        templates, question.is_manual, question.answer_start, question.separator
    )

    def first_logits(question, positions):
        return naive_decode(our_forward(model), prefix, question, "isolated", positions)[1]

    a, b = first_logits(question, "restart"), first_logits(other, "restart")
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    answers = [decode_fused(model, prefix, [q], "isolated", "restart") for q in (question, other)]
    assert answers[0] == answers[1]
    a, b = first_logits(question, "sequential"), first_logits(other, "sequential")
    assert (a - b).abs().max() > 1e-2


def test_the_first_token_sees_every_template():
    """A change in any template changes what is predicted first."""
    model, rng = random_llama(), np.random.default_rng(5)
    prefix, question = random_ids(rng, 9), random_question(rng, n=3)
    forward = our_forward(model)
    _, before = naive_decode(forward, prefix, question, "isolated", "restart")
    for i in range(3):
        templates = [list(ids) for ids in question.templates]
        templates[i][0] = 10 + (templates[i][0] - 9) % (V - 10)
        changed = fusion.Question(
            templates, question.is_manual, question.answer_start, question.separator
        )
        _, after = naive_decode(forward, prefix, changed, "isolated", "restart")
        assert (after - before).abs().max() > 1e-3


def test_answers_stop_at_a_line_break_once_they_have_begun():
    """Tokens 1 and 2 are line breaks, 9 is an end. A leading line break does not end an answer."""
    is_blank = torch.zeros(V, dtype=torch.bool)
    is_blank[[1, 2]] = True
    stop, model = decoding.StopCriteria(torch.tensor([9]), is_blank, is_blank), random_llama()
    prefix_kv = fusion.prefill_prefix(model, [20, 21])
    rows = [([30], [2]), ([31], [2]), ([32], [2])]
    encoded = fusion.prefill_blocks(model, prefix_kv, rows)
    cache = fusion.build_cache(prefix_kv, encoded, [[0], [1], [2]], [3, 3, 3])
    scripts = [[1, 40, 2, 41], [50, 1, 51, 52], [60, 9, 1, 1]]
    steps = iter(range(10))

    def choose(logits):
        step = next(steps)
        return torch.tensor([script[step] for script in scripts]), torch.zeros(3)

    out, _ = decoding.greedy_decode(model, cache, 7, choose, stop, max_new_tokens=4)
    assert out.tolist() == [[1, 40, -1], [50, -1, -1], [60, -1, -1]]


@pytest.mark.parametrize("sizes", [[1] * 48, [3] * 16, [4, 1, 3] * 6])
def test_rows_that_end_early_change_nothing(sizes):
    """Groups of rows end at any step; each group is then decoded alone."""
    model, rng = random_llama(), np.random.default_rng(7)
    prefix = random_ids(rng, 9)
    rows = [(random_ids(rng, length), range(9, 9 + length)) for length in rng.integers(2, 9, 48)]
    prefix_kv = fusion.prefill_prefix(model, prefix)
    encoded = fusion.prefill_blocks(model, prefix_kv, rows)
    nothing = torch.zeros(V, dtype=torch.bool)
    stop = decoding.StopCriteria(torch.tensor([2, 4, 6, 19, 23]), nothing, nothing)

    def decode(first, end, sizes):
        ends = [9 + len(ids) for ids, _ in rows[first:end]]
        members = [[r] for r in range(first, end)]
        cache = fusion.build_cache(prefix_kv, encoded, members, ends)
        choose = decoding.argmax_grouped(sizes, decoding.mean_logits)
        return decoding.greedy_decode(model, cache, 7, choose, stop, 8)

    together, log_probs = decode(0, 48, sizes)
    for end, n in zip(np.cumsum(sizes), sizes):
        first = end - n
        alone, own_log_probs = decode(first, end, [n])
        shown = together[first:end]
        assert shown[:, : alone.shape[1]].equal(alone) and shown[:, alone.shape[1] :].eq(-1).all()
        torch.testing.assert_close(log_probs.sum(1)[first:end], own_log_probs.sum(1))
    lengths = (together >= 0).sum(1)
    assert len(lengths.unique()) > 3


def test_ensembles_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.5]])
    weight = torch.tensor([0.2, 0.6])
    assert decoding.mean_logits(logits, None).tolist() == [1.0, 1.0, 1.25]
    probabilities = logits.softmax(-1)
    largest = decoding.max_probability(logits, None).exp()
    torch.testing.assert_close(largest, probabilities.max(0).values)
    mean = decoding.mean_probability(logits, None).softmax(-1)
    torch.testing.assert_close(mean, probabilities.mean(0))
    weighted = decoding.weighted_mean_logits(logits, weight)
    torch.testing.assert_close(weighted, torch.tensor([0.5, 1.5, 1.375]))
    assert decoding.highest_weight_logits(logits, weight).tolist() == [0.0, 2.0, 1.5]
    choose = decoding.argmax_grouped([2, 1], decoding.mean_logits)
    tokens, log_p = choose(torch.cat([logits, logits[:1]]))
    assert tokens.tolist() == [2, 2, 0]
    torch.testing.assert_close(log_p[2], logits[0].log_softmax(0)[0])


def test_smollm2_fuses_as_transformers_does(smollm2):
    """20 questions over all schemes and positions: the same tokens as without a cache."""
    model, tokenizer, theirs, _ = smollm2
    facts = fact_files.read_facts("")
    forward = transformers_forward(theirs)
    combinations = [(s, p) for s in fusion.MASKS for p in ("restart", "sequential")]

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    prefix = encode(prompts.few_shot_prefix(facts[:3], False))
    for number in range(20):
        scheme, positions = combinations[number % 6]
        fact = facts[5 + 17 * number]
        templates = []
        for template in (*fact["manual"][:2], fact["auto"][0]):
            templates.append(encode(f"Q: {prompts.fill(template, fact['subject'])}\nA:"))
        question = fusion.Question(
            [ids[:-1] for ids in templates],
            torch.tensor([True, True, False]),
            templates[0][-1],
            encode("\n\n"),
        )
        (got,) = decode_fused(model, prefix, [question], scheme, positions, -0.5, 3)
        expected, _ = naive_decode(forward, prefix, question, scheme, positions, -0.5, 3)
        assert got == expected


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_attention_to_a_shared_prefix_is_attention_to_a_copied_one(dtype, tolerance):
    """In bfloat16 as close to float64 as inputs and result allow: scores are not rounded."""
    torch.manual_seed(0)
    B, H, G, P, S, K = 3, 4, 2, 40, 60, 32
    q = (3 * torch.randn(B, H, 1, K)).to(dtype)
    prefix = [torch.randn(1, G, P, K).to(dtype) for _ in range(2)]
    k, v = ((3 * torch.randn(B, G, S, K)).to(dtype) for _ in range(2))
    out = decoding.attend_to_cache(q, prefix, k, v, lambda scores: scores.softmax(-1))

    whole_k, whole_v = (
        torch.cat([part.expand(B, -1, -1, -1), rest], 2).double()
        for part, rest in zip(prefix, (k, v))
    )
    expected = F.scaled_dot_product_attention(q.double(), whole_k, whole_v, enable_gqa=True)
    error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < tolerance


def test_flex_attention_is_used_where_it_works(monkeypatch):
    model = random_llama()
    assert "CUDA only" in fusion.why_no_flex(model)
    table = SimpleNamespace(device=torch.device("cuda"))
    on_gpu = SimpleNamespace(rope_table=table, config=SimpleNamespace(head_dim=8))
    assert "at least 16" in fusion.why_no_flex(on_gpu)
    on_gpu.config.head_dim = 16
    found = {"triton": None}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    assert "triton" in fusion.why_no_flex(on_gpu)
    found["triton"] = object()
    assert fusion.why_no_flex(on_gpu) is None
