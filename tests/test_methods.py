"""methods.py and decoding.py: methods against slow twins without caches, on random questions.

The questions of a batch have unequal numbers of templates.
"""

import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flex_generate as flex
from myriadlama import decoding, fusion, llama, methods
from myriadlama.batch import Answers, Batch, CostMeter
from naive import fused_logits, naive_decode
from toys_llama import (
    V,
    causal_logits,
    never_stop,
    our_forward,
    random_ids,
    random_llama,
    random_question,
)

ANSWERS = ("a", "a b")  # one word of a text is scored, or two; a token is a word
COUNTS = (4, 1, 3, 5, 2, 4)  # templates of each question of a batch


def batch_of(model, questions, prefix, max_new_tokens=10, **settings):
    """A Batch whose texts are token ids."""
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    config = flex.Config(max_new_tokens=max_new_tokens, **settings)
    run = SimpleNamespace(model=model, config=config, stop=never_stop(V), tokenizer=tokenizer)
    facts = []
    for i in range(len(questions)):
        facts.append({"subject": "s", "answers": [ANSWERS[i % 2]]})
    return Batch(run, questions, facts, fusion.prefill_prefix(model, prefix))


def with_priors(question, rng):
    """The question with a prior for each template: the template without one of its tokens."""
    priors = []
    for ids in question.templates:
        left_out = int(rng.integers(len(ids)))
        priors.append(ids[:left_out] + ids[left_out + 1 :])
    fields = vars(question) | {"priors": priors}
    return fusion.Question(**fields)


def random_batch(model, seed, counts=COUNTS, max_new_tokens=3, **settings):
    rng = np.random.default_rng(seed)
    prefix = random_ids(rng, 7)
    questions = []
    for n in counts:
        questions.append(with_priors(random_question(rng, n), rng))
    return prefix, batch_of(model, questions, prefix, max_new_tokens, **settings)


def next_probabilities(model, ids):
    """Of the token after ids, without a cache, in float64 -> (V,)"""
    logits = causal_logits(model, torch.tensor([ids]))[0, -1]
    return logits.double().softmax(-1).numpy()


def text_of(tokens):
    return " ".join(map(str, tokens))


# ---- templates alone -----------------------------------------------------------------------------


def naive_alone(model, prefix, question, ids, max_new_tokens):
    """Greedy tokens after one template, and the product of their probabilities."""
    ids, tokens, probability = [*prefix, *ids, question.answer_start], [], 1.0
    for _ in range(max_new_tokens):
        p = next_probabilities(model, ids)
        tokens.append(int(p.argmax()))
        probability *= p.max()
        ids.append(tokens[-1])
    return tokens, probability


@pytest.mark.parametrize("method", ["vote", "weighted_vote"])
def test_votes_are_counted_over_first_words(method):
    model = random_llama()
    prefix, batch = random_batch(model, 5, counts=(9, 1, 8) * 5)
    texts, shares, _ = methods.METHODS[method].generate(batch)
    n_not_first = 0
    for i, (question, text, share) in enumerate(zip(batch.questions, texts, shares.tolist())):
        votes, answers = Counter(), []
        for ids in question.templates:
            tokens, p = naive_alone(model, prefix, question, ids, 3)
            answers.append(tokens)
            votes[tuple(tokens[: 1 + i % 2])] += 1 if method == "vote" else p
        most = max(votes.values())
        winners = [word for word in votes if votes[word] == pytest.approx(most)]
        # Of equals, and of different texts with one beginning, the first counts.
        expected = next(tokens for tokens in answers if tuple(tokens[: 1 + i % 2]) in winners)
        assert text == text_of(expected)
        assert share == pytest.approx(most / sum(votes.values()), rel=1e-4)
        n_not_first += expected != answers[0]
    assert n_not_first > 2


def test_answers_of_a_vote_are_equal_regardless_of_case_and_marks():
    facts = [{"subject": "s", "answers": ["New York"]}, {"subject": "", "answers": ["x"]}]
    batch = SimpleNamespace(facts=facts)
    new_york = ["Paris is it", "new york, of", "New York.", "Oslo or so"]
    texts = [new_york, ["a b", "a", "A b!", "c", "d"]]
    batch.meter = SimpleNamespace(shared=lambda name, compute: Answers(texts, None))
    # Two words of a fact with a two-word answer are scored, and all words of a whole question.
    winners, shares, _ = methods.count_votes(batch, [torch.ones(4), torch.ones(5)])
    assert winners == ["new york, of", "a b"] and shares.tolist() == [0.5, 0.4]
    weights = [torch.tensor([4.0, 1, 1, 2]), torch.tensor([1.0, 3, 1, 5, 2])]
    winners, shares, _ = methods.count_votes(batch, weights)
    assert winners == ["Paris is it", "c"] and shares.tolist() == [0.5, 5 / 12]


# ---- logits --------------------------------------------------------------------------------------

# p (n, V) after each template, weight (n,), p after each prior (n, V) -> (V,)
COMBINE = {
    "avg": lambda p, weight, prior: p.prod(0) ** (1 / len(p)),
    "mixture": lambda p, weight, prior: p.mean(0),
    "max": lambda p, weight, prior: p.max(0),
    "weighted_avg": lambda p, weight, prior: np.exp((weight / weight.sum()) @ np.log(p)),
    "weighted_max": lambda p, weight, prior: p[weight.argmax()],
    "contrast": lambda p, weight, prior: naive_contrast(p, prior),
}


def naive_contrast(p, prior, weight=0.7):
    mean, mean_prior = p.prod(0) ** (1 / len(p)), prior.prod(0) ** (1 / len(p))
    score = mean / mean_prior**weight
    score[mean < mean.max() / 10] = 0
    return score


@pytest.mark.parametrize("method", COMBINE)
def test_combined_logits_against_probabilities(method):
    """Texts and confidence; templates in one batch with caches, or one by one without.

    The confidence is that of the first word, or of the first two.
    """
    model = random_llama()
    prefix, batch = random_batch(model, 6, prior_weight=0.7)
    texts, got, _ = methods.METHODS[method].generate(batch)
    for i, question in enumerate(batch.questions):
        alone = [naive_alone(model, prefix, question, ids, 3)[1] for ids in question.templates]
        tokens, steps = [], []
        for _ in range(3):
            p = []
            for ids in (*question.templates, *question.priors):
                whole = [*prefix, *ids, question.answer_start, *tokens]
                p.append(next_probabilities(model, whole))
            p, prior = np.split(np.array(p), 2)
            score = COMBINE[method](p, np.array(alone), prior)
            tokens.append(int(score.argmax()))
            steps.append(score.max() / score.sum())
        assert texts[i] == text_of(tokens)
        assert got[i].item() == pytest.approx(np.prod(steps[: 1 + i % 2]), rel=1e-3)


WEIGHTED = ["weighted_vote", "weighted_avg", "weighted_max", "flex_adaptive", "flex_weighted"]


@pytest.mark.parametrize("method", WEIGHTED)
def test_weights_too_small_for_float32_count_as_all_others(method, monkeypatch):
    """Only ratios of weights count. exp(-200) is 0 in float32, as for a long answer."""
    model, alone = random_llama(), methods.separate_answers
    _, batch = random_batch(model, 6)
    texts, confidence, _ = methods.METHODS[method].generate(batch)

    def less_probable(batch):
        answers = alone(batch)
        return answers._replace(log_weight=[own - 200 for own in answers.log_weight])

    monkeypatch.setattr(methods, "separate_answers", less_probable)
    got_texts, got, _ = methods.METHODS[method].generate(batch)
    assert got_texts == texts
    torch.testing.assert_close(got, confidence, rtol=1e-3, atol=0)


# ---- hidden states -------------------------------------------------------------------------------


def naive_fused_layers(model, prefix, question, first_layer, part, combine, max_new_tokens):
    """All templates side by side without a cache, through the parts of each layer.

    -> tokens, their probabilities
    """
    tokens, steps = [question.answer_start], []
    for _ in range(max_new_tokens):
        rows = [torch.tensor([[*prefix, *ids, *tokens]]) for ids in question.templates]
        x = [model.embed_tokens(row) for row in rows]
        for number, layer in enumerate(model.layers):
            activation, rest = [], []
            for row in x:
                positions = torch.arange(row.shape[1])[None]

                def attend(q, k, v):
                    return llama.causal_attention(0, q, k, v)

                h = layer.input_layernorm(row)
                row = row + layer.self_attn(h, model.rope_table, positions, attend)
                h = layer.post_attention_layernorm(row)
                rest.append(row)
                activation.append(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
            if number >= first_layer and part == "ffn_activation":
                share_last(activation, len(tokens), combine)
            x = [row + layer.mlp.down_proj(a) for row, a in zip(rest, activation)]
            if number >= first_layer and part == "layer_output":
                share_last(x, len(tokens), combine)
        logits = torch.stack([model.logits(row[0, -1]) for row in x]).mean(0)
        tokens.append(int(logits.argmax()))
        steps.append(float(logits.softmax(0).max()))
    return tokens[1:], steps


def share_last(rows, n_last, combine):
    """Each of the last tokens of all rows gets what they have together, in place."""
    for t in range(1, n_last + 1):
        together = combine(torch.stack([row[0, -t] for row in rows]))
        for row in rows:
            row[0, -t] = together


@pytest.mark.parametrize("method", ["layer_output_avg", "ffn_activation_avg", "ffn_activation_max"])
@pytest.mark.parametrize("first_layer", [0, 1])
def test_fused_layers_without_a_cache(method, first_layer):
    model = random_llama()
    prefix, batch = random_batch(model, 7, ensemble_layer=first_layer)
    texts, confidence, _ = methods.METHODS[method].generate(batch)
    part, kind = method.rsplit("_", 1)
    combine = {"avg": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[kind]
    for i, question in enumerate(batch.questions):
        tokens, steps = naive_fused_layers(model, prefix, question, first_layer, part, combine, 3)
        assert texts[i] == text_of(tokens)
        assert confidence[i].item() == pytest.approx(np.prod(steps[: 1 + i % 2]), rel=1e-3)
    # No hook is left behind.
    plain = methods.average(random_batch(random_llama(), 7)[1])[1]
    assert torch.equal(methods.average(batch)[1], plain)


def test_the_last_quarter_of_the_layers_is_fused_by_default():
    confidences = []
    for first_layer in (-1, 3, 2):
        _, batch = random_batch(random_llama(n_layers=4), 7, ensemble_layer=first_layer)
        confidences.append(methods.layer_output_avg(batch)[1])
    assert torch.equal(confidences[0], confidences[1])  # 3 of the layers 0 to 3
    assert not torch.allclose(confidences[0], confidences[2], rtol=1e-3)


# ---- attention -----------------------------------------------------------------------------------


def naive_ape(model, prefix, question, temperature, scale, max_new_tokens):
    """Two softmaxes for each head, of templates and of all else, weighted.

    -> tokens, their probabilities
    """
    steps = []
    n_tokens = sum(len(ids) for ids in question.templates)
    first, end = len(prefix), len(prefix) + n_tokens

    def forward(ids, positions, mask):
        def attend(layer, q, k, v):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            for head in range(q.shape[1]):
                group = head * k.shape[1] // q.shape[1]
                for i in range(end, q.shape[2]):
                    s = k[0, group, : i + 1] @ q[0, head, i] / q.shape[-1] ** 0.5
                    seen = v[0, group, : i + 1]
                    templates, others = s[first:end] / temperature, torch.cat([s[:first], s[end:]])
                    from_templates = templates.softmax(0) @ seen[first:end]
                    from_others = others.softmax(0) @ torch.cat([seen[:first], seen[end:]])
                    log_sum = templates.logsumexp(0) * scale * temperature
                    share = torch.stack([log_sum, others.logsumexp(0)]).softmax(0)
                    out[0, head, i] = share[0] * from_templates + share[1] * from_others
            return out

        logits = model.logits(model(ids, positions, attend))[0]
        steps.append(float(logits[-1].softmax(0).max()))
        return logits

    tokens, _ = naive_decode(forward, prefix, question, "isolated", "restart", 0.0, max_new_tokens)
    return tokens, steps


@pytest.mark.parametrize("temperature, scale", [(0.9, 0.9), (0.4, 1.0), (1.0, 0.3), (1.5, 1.2)])
def test_ape_against_two_softmaxes(temperature, scale):
    model = random_llama()
    settings = dict(ape_temperature=temperature, ape_scale=scale)
    prefix, batch = random_batch(model, 8, **settings)
    texts, confidence, _ = methods.ape(batch)
    for i, question in enumerate(batch.questions):
        tokens, steps = naive_ape(model, prefix, question, temperature, scale, 3)
        assert texts[i] == text_of(tokens)
        assert confidence[i].item() == pytest.approx(np.prod(steps[: 1 + i % 2]), rel=1e-3)


def test_ape_without_its_two_numbers_is_flex_without_bias():
    model = random_llama()
    settings = dict(ape_temperature=1.0, ape_scale=1.0, score_bias=0.0, max_new_tokens=6)
    _, batch = random_batch(model, 9, COUNTS * 3, **settings)
    texts, confidence, _ = methods.ape(batch)
    plain_texts, plain_confidence, _ = methods.flex(batch)
    assert texts == plain_texts
    torch.testing.assert_close(confidence, plain_confidence, rtol=1e-3, atol=0)


def mixed_batch(model, seed, **settings):
    """A batch whose questions have different manual templates, not one after another."""
    prefix, batch = random_batch(model, seed, **settings)
    for i, question in enumerate(batch.questions):
        question.is_manual = torch.arange(len(question.templates)) % (2 + i % 2) == 0
    return prefix, batch


def answers_and_logits(method, batch, monkeypatch):
    """-> texts, logits (3, rows, V) of the last three decoded tokens"""
    steps, of_model = [], batch.run.model.logits

    def keep_logits(x):
        steps.append(of_model(x))
        return steps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(batch.run.model, "logits", keep_logits)
        texts = methods.METHODS[method].generate(batch).texts
    return texts, torch.stack(steps[-3:])


SCHEMES = {
    "flex": "isolated",
    "flex_myriadlama": "isolated",
    "flex_myriadlama_xattn": "manual_cross",
    "flex_full": "full",
}


@pytest.mark.parametrize("method", SCHEMES)
@pytest.mark.parametrize("positions", ["restart", "sequential"])
@pytest.mark.parametrize("score_bias", [-1.0, 0.6])
def test_fused_attention_in_one_row(method, positions, score_bias, monkeypatch):
    model = random_llama()
    settings = dict(template_positions=positions, score_bias=score_bias)
    prefix, batch = mixed_batch(model, 11, **settings)
    texts, logits = answers_and_logits(method, batch, monkeypatch)
    row = our_forward(model), prefix
    for i, question in enumerate(batch.questions):
        n = len(question.templates)
        biases, tokens = [score_bias * np.log(n)] * n, []
        for step in range(3):
            expected = fused_logits(*row, question, SCHEMES[method], positions, biases, tokens)
            torch.testing.assert_close(logits[step, i], expected, atol=1e-3, rtol=1e-3)
            tokens.append(int(expected.argmax()))
        assert texts[i] == text_of(tokens)


def test_weighted_attention_in_one_row(monkeypatch):
    """Attention to a template is multiplied by its weight over the mean weight."""
    model = random_llama()
    prefix, batch = mixed_batch(model, 12)
    texts, logits = answers_and_logits("flex_weighted", batch, monkeypatch)
    row = our_forward(model), prefix
    for i, question in enumerate(batch.questions):
        alone = [naive_alone(model, prefix, question, ids, 3)[1] for ids in question.templates]
        biases, tokens = np.log(np.array(alone) / np.sum(alone)), []
        for step in range(3):
            expected = fused_logits(*row, question, "isolated", "restart", biases, tokens)
            torch.testing.assert_close(logits[step, i], expected, atol=1e-3, rtol=1e-3)
            tokens.append(int(expected.argmax()))
        assert texts[i] == text_of(tokens)


def test_hybrid_averages_the_fused_prompt_and_the_single_ones(monkeypatch):
    model = random_llama()
    prefix, batch = mixed_batch(model, 13)
    texts, logits = answers_and_logits("hybrid", batch, monkeypatch)
    confidence = methods.hybrid(batch).confidence
    row = our_forward(model), prefix
    first = 0  # of the question's rows, which are its templates and all of them fused
    for i, question in enumerate(batch.questions):
        n = len(question.templates)
        biases, tokens, steps = [-np.log(n)] * n, [], []
        for step in range(3):
            rows = []
            for ids in question.templates:
                whole = torch.tensor([[*prefix, *ids, question.answer_start, *tokens]])
                rows.append(causal_logits(model, whole)[0, -1])
            fused = fused_logits(*row, question, "isolated", "restart", biases, tokens)
            expected = torch.stack([*rows, fused])
            own = logits[step, first : first + n + 1]
            torch.testing.assert_close(own, expected, atol=1e-3, rtol=1e-3)
            log_p = expected.log_softmax(-1)
            p = ((log_p[:n].mean(0) + log_p[n]) / 2).softmax(0)
            tokens.append(int(p.argmax()))
            steps.append(float(p.max()))
        first += n + 1
        assert texts[i] == text_of(tokens)
        assert confidence[i].item() == pytest.approx(np.prod(steps[: 1 + i % 2]), rel=1e-3)


def test_adaptive_takes_the_half_of_the_templates_with_the_highest_weight(monkeypatch):
    """Of 5 templates 3, of 3 templates 2, of one this one: the bias is -log of that."""
    model = random_llama()
    prefix, batch = random_batch(model, 1)
    texts, logits = answers_and_logits("flex_adaptive", batch, monkeypatch)
    row = our_forward(model), prefix
    for i, q in enumerate(batch.questions):
        alone = [naive_alone(model, prefix, q, ids, 3)[1] for ids in q.templates]
        m = (len(alone) + 1) // 2
        best = sorted(np.argsort(alone)[-m:])
        templates = [q.templates[j] for j in best]
        half = fusion.Question(templates, q.is_manual[:m], q.answer_start, q.separator)
        tokens = []
        for step in range(3):
            biases = [-np.log(m)] * m
            expected = fused_logits(*row, half, "isolated", "restart", biases, tokens)
            torch.testing.assert_close(logits[step, i], expected, atol=1e-3, rtol=1e-3)
            tokens.append(int(expected.argmax()))
        assert texts[i] == text_of(tokens)


def test_weighted_attention_by_hand(monkeypatch):
    """Attention to a template is multiplied by its weight; equal weights change nothing."""
    model, rng = random_llama(), np.random.default_rng(2)
    q = random_question(rng, n=3)
    batch = batch_of(model, [q], random_ids(rng, 7))
    biases = []

    def note_bias(cache):
        biases.append(cache.score_bias[0, 0, 0])
        return Answers([], None)

    batch.decode = note_bias
    for weight in ([0.2, 0.3, 0.1], [0.4, 0.4, 0.4]):
        answers = Answers([], None, [torch.tensor(weight).log()])
        monkeypatch.setattr(methods, "separate_answers", lambda batch, answers=answers: answers)
        methods.flex_weighted(batch)
    weighted, even = biases
    lengths = torch.tensor([len(ids) for ids in q.templates])
    factors = torch.tensor([1.0, 1.5, 0.5]).repeat_interleave(lengths)
    torch.testing.assert_close(weighted[7:].exp(), factors / 3)
    torch.testing.assert_close(even[7:].exp(), torch.full_like(factors, 1 / 3))
    assert weighted[:7].eq(0).all() and even[:7].eq(0).all()


# ---- batches -------------------------------------------------------------------------------------


def stop_at(tokens):
    """Answers end before one of these tokens."""
    never = never_stop(V)
    return decoding.StopCriteria(torch.tensor(tokens), never.has_line_break, never.is_blank)


def answers_and_cost(method, batch):
    """-> Answers, seconds, tokens of each question"""
    batch.meter.reset_cost()
    answers = methods.METHODS[method].generate(batch)
    return answers, *batch.meter.cost()


LAYOUTS = [(method, "restart") for method in methods.METHODS]
LAYOUTS += [(method, "sequential") for method in SCHEMES]


@pytest.mark.parametrize("method, positions", LAYOUTS)
def test_a_question_is_answered_as_in_a_batch_of_its_own(method, positions):
    """1 to 5 templates, answers of 0 to 6 tokens: texts, confidence, weights, tokens read."""
    model = random_llama()
    settings = dict(template_positions=positions, max_new_tokens=6)
    prefix, batch = mixed_batch(model, 21, counts=COUNTS * 3, **settings)
    batch.run.stop = stop_at(range(0, V, 6))
    together, seconds, tokens = answers_and_cost(method, batch)
    assert len(together.texts) == len(batch.questions) and seconds > 0
    lengths = set()
    for i, question in enumerate(batch.questions):
        alone = batch_of(model, [question], prefix, **settings)
        alone.run.stop, alone.facts = batch.run.stop, [batch.facts[i]]
        expected, _, own_tokens = answers_and_cost(method, alone)
        assert together.texts[i] == expected.texts[0]
        got, own = together.confidence[i], expected.confidence[0]
        torch.testing.assert_close(got, own, rtol=1e-4, atol=0)
        if method == "per_prompt":
            got, own = together.log_weight[i], expected.log_weight[0]
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
        assert tokens[i] == pytest.approx(own_tokens[0])
        for text in [together.texts[i]] if method != "per_prompt" else together.texts[i]:
            lengths.add(len(text.split()))
    assert len(lengths) > 3


def test_flex_and_flex_myriadlama_are_computed_once():
    _, batch = random_batch(random_llama(), 10)
    answers = methods.METHODS["flex"].generate(batch)
    assert methods.METHODS["flex_myriadlama"].generate(batch) is answers


@pytest.mark.parametrize("reverse", [False, True])
def test_shared_work_is_charged_to_each_method_once(reverse):
    """Three templates of 4, 5 and 6 tokens, and one of 8. A decoded sequence has 3: answer start
    and two more."""
    encoded, n, decoded = np.array([4 + 5 + 6, 8]), np.array([3, 1]), 3
    expected = {
        "origin": encoded / n + decoded,
        "per_prompt": encoded + n * decoded,
        "vote": encoded + n * decoded,
        "weighted_avg": encoded + n * decoded + n * decoded,
        "flex_adaptive": encoded + n * decoded + decoded,
        "flex": encoded + decoded,
        "flex_myriadlama": encoded + decoded,
    }
    order = ["flex_myriadlama", "flex_adaptive", "vote", "origin"] if reverse else list(expected)
    model, rng = random_llama(), np.random.default_rng(3)
    questions = []
    for lengths in ([4, 5, 6], [8]):
        templates = [random_ids(rng, length) for length in lengths]
        questions.append(fusion.Question(templates, torch.ones(len(templates)) > 0, 7, [3]))
    batch = batch_of(model, questions, [20, 21], 2)
    for method in order:
        start = time.perf_counter()
        batch.meter.reset_cost()
        methods.METHODS[method].generate(batch)
        seconds, tokens = batch.meter.cost()
        assert tokens == pytest.approx(expected[method]) and seconds > 0
        if method == order[0]:
            assert seconds <= time.perf_counter() - start


def test_a_method_that_uses_a_part_and_the_whole_pays_for_the_whole():
    for fractions in ([1.0, 0.5], [0.5, 1.0]):
        meter = CostMeter(torch.device("cpu"))

        def work():
            meter.add_tokens(np.array([8, 2]))

        for fraction in fractions:
            meter.shared("work", work, fraction)
        assert meter.cost()[1].tolist() == [8, 2]


def test_seconds_of_a_part_are_in_proportion_to_its_tokens(monkeypatch):
    """A third of 6 tokens and all of 2: half of the work, which takes 10 seconds."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = CostMeter(torch.device("cpu"))

    def work():
        clock[0] += 10
        meter.add_tokens(np.array([6, 2]))

    meter.shared("work", work, np.array([1 / 3, 1.0]))
    seconds, tokens = meter.cost()
    assert seconds == pytest.approx(5) and tokens.tolist() == [2, 2]


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch):
    clock = [0.0]

    def synchronize(device):
        clock[0] += 1.0  # the GPU was behind

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = CostMeter(torch.device("cuda"))
    meter.reset_cost()
    meter.shared("work", lambda: meter.add_tokens(np.ones(1)))
    # Three waits after the start: one is the work's, two the method's own.
    assert meter.results["work"][1] == 1 and meter.cost()[0] == 3
    meter = CostMeter(torch.device("cpu"))
    assert meter.cost()[0] == 0


def test_the_confidence_is_that_of_what_is_scored(monkeypatch):
    """Tokens are letters; a row ends with -1. An empty text is as probable as its end."""
    rows = [[1, 2, 0, 3], [1, 0, 3, 2], [1, 2, 0, 3], [-1, -1, -1, -1]]
    p = [[0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2], [0.6, 1, 1, 1]]
    one, two = {"subject": "s", "answers": ["x"]}, {"subject": "s", "answers": ["x y"]}
    whole = {"subject": "", "answers": ["x"]}
    model, question = random_llama(), fusion.Question([[1]], torch.tensor([True]), 7, [3])
    batch = batch_of(model, [question] * 3, [20, 21])
    batch.facts = [one, two, whole]
    batch.run.tokenizer = SimpleNamespace(decode=lambda ids: "".join(" abc"[i] for i in ids))

    def decode(*args):
        return torch.tensor(rows), torch.tensor(p).log()

    monkeypatch.setattr(decoding, "greedy_decode", decode)
    texts, confidence, log_weight = batch.decode_rows(None, [2, 1, 1])
    assert texts == [["ab c", "a cb"], ["ab c"], [""]]
    torch.testing.assert_close(torch.cat(confidence), torch.tensor([0.2, 0.5, 0.012, 0.6]))
    torch.testing.assert_close(torch.cat(log_weight).exp(), torch.tensor([0.012] * 3 + [0.6]))
    # All rows of a question have one answer, so the first row's is taken.
    texts, confidence, _ = batch.decode(None, [1, 2, 1])
    assert texts == ["ab c", "a cb", ""]
    torch.testing.assert_close(confidence, torch.tensor([0.2, 0.012, 0.6]))
