"""attention_maps.py: maps against queries and keys by hand, patterns against loops, a hand-built
induction head, and models that have no maps."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import eval as eval_script
import model
from analysis import attention_maps
from nanorecall.attention import attention_weights, softmax_attention
from nanorecall.settings import ConfigError
from toys import run as train_toy

TOKENS = torch.arange(6)[None]


def small_gpt(**changes):
    sizes = dict(dim=8, n_layers=2, n_heads=2, dk=4, dv=4, vocab_size=9, seq_len=6)
    torch.manual_seed(0)
    return model.GPT(model.Config(**{**sizes, **changes})).eval()


# ---- maps ----------------------------------------------------------------------------------------


def test_maps_are_softmax_of_queries_and_keys_by_hand():
    gpt = small_gpt(n_kv_heads=1, pos_emb="none")
    tokens = torch.randint(9, (3, 6))
    maps = attention_maps.attention_maps(gpt, tokens)
    layer = gpt.layers[0]
    x = layer.att_norm(gpt.embed(tokens))
    q, k = layer.att.proj_q(x).view(3, 6, 2, 4), layer.att.proj_k(x)
    for b, h, t in [(0, 0, 0), (1, 1, 3), (2, 0, 5)]:
        scores = torch.stack([q[b, t, h] @ k[b, s] / 2 for s in range(t + 1)])
        torch.testing.assert_close(maps[0][b, h, t, : t + 1], scores.softmax(0))
        assert (maps[0][b, h, t, t + 1 :] == 0).all()
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6))


def test_weights_times_values_are_the_attention_output():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 5)
    output = attention_weights(q, k) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(output, softmax_attention(q, k, v))


def test_no_weight_lies_outside_a_window():
    gpt = small_gpt(window=3)
    tokens = torch.randint(9, (3, 6))
    whole = attention_maps.attention_maps(small_gpt(), tokens)[0]
    maps = attention_maps.attention_maps(gpt, tokens)
    t = torch.arange(6)
    band = (t <= t[:, None]) & (t > t[:, None] - 3)
    expected = whole * band
    torch.testing.assert_close(maps[0], expected / expected.sum(-1, keepdim=True))
    assert (maps[1][:, :, ~band] == 0).all()


def test_no_weight_crosses_documents():
    gpt = small_gpt(n_layers=1)
    tokens = torch.randint(9, (1, 9))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = attention_maps.attention_maps(gpt, tokens, cu_seqlens)[0]
    assert (packed[0, :, 4:, :4] == 0).all() and (packed[0, :, :4, 4:] == 0).all()
    for part in (slice(0, 4), slice(4, 9)):
        alone = attention_maps.attention_maps(gpt, tokens[:, part])[0]
        torch.testing.assert_close(packed[:, :, part, part], alone)


@pytest.mark.parametrize("token", [3, 99])
def test_no_recording_is_left_also_after_an_error(token):
    gpt = small_gpt()
    if token == 99:  # not in the vocabulary
        with pytest.raises(IndexError):
            attention_maps.attention_maps(gpt, torch.tensor([[token]]))
    else:
        attention_maps.attention_maps(gpt, torch.tensor([[token]]))
    for layer in gpt.layers:
        assert "attention_fn" not in layer.att.__dict__


# ---- forks with an attention of their own --------------------------------------------------------


def scaled_scores(q, k):
    """Scores (B, H, T, T), and a mask (T, T) of the tokens that are seen."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    T = q.shape[2]
    return q @ k.mT / q.shape[-1] ** 0.5, torch.ones(T, T).tril()


def sigmoid_weights(q, k):
    scores, seen = scaled_scores(q, k)
    return scores.sigmoid() * seen


def window_weights(q, k):
    """Softmax over the token and the one before it."""
    scores, seen = scaled_scores(q, k)
    return scores.masked_fill((seen - seen.tril(-2)) == 0, -torch.inf).softmax(-1)


def linear_weights(q, k):
    """They may be below 0, and have any sum."""
    scores, seen = scaled_scores(q, k)
    return scores * seen


def attend_with(weights_fn):
    def attend(q, k, v, query_pos=None, documents=None):
        return weights_fn(q, k) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    return attend


def fork(cls=model.GPT, **attributes):
    """A model whose mixers are of a subclass with these attributes."""
    mixer = type("Mixer", (cls.block.mixer,), attributes)
    block = type("Block", (cls.block,), {"mixer": mixer})
    sizes = dict(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, dk=4, dv=6, du=4, k_kernel="silu")
    torch.manual_seed(0)
    config = model.Config(**sizes, vocab_size=9, seq_len=6)
    return type("Fork", (cls,), {"block": block})(config).eval()


def opened(made):
    """A model as a TrainedRun holds it."""
    data = SimpleNamespace(seq_len=6, vocab_size=9)
    return SimpleNamespace(model=made, data=data, device=torch.device("cpu"))


@pytest.mark.parametrize("cls", [model.GPT, model.UnifiedKV])
@pytest.mark.parametrize("weights_fn", [sigmoid_weights, window_weights])
def test_maps_of_a_fork_are_those_of_its_own_attention(cls, weights_fn):
    calls = []

    def attend(q, k, v, query_pos=None, documents=None):
        calls.append((q, k))
        return attend_with(weights_fn)(q, k, v)

    made = fork(cls, attention_fn=staticmethod(attend))
    attention_maps.require_maps(opened(made))
    calls.clear()
    for block, weights in attention_maps.attention_maps(made, TOKENS).items():
        torch.testing.assert_close(weights, weights_fn(*calls[block]))


def test_attention_may_be_a_method_or_an_attribute():
    def method(self, *args):
        return attend_with(sigmoid_weights)(*args)

    by_class, by_instance = fork(attention_fn=method), fork()
    for layer in by_instance.layers:
        layer.att.attention_fn = attend_with(sigmoid_weights)
    maps = attention_maps.attention_maps(by_class, TOKENS)
    torch.testing.assert_close(attention_maps.attention_maps(by_instance, TOKENS), maps)


def test_an_attention_of_its_own_is_put_back():
    made = fork()
    functions = []
    for layer in made.layers:
        layer.att.attention_fn = attend_with(sigmoid_weights)
        functions.append(layer.att.attention_fn)
    attention_maps.attention_maps(made, TOKENS)
    assert [vars(layer.att)["attention_fn"] for layer in made.layers] == functions


def differential(self, x, query_pos=None, **kwargs):
    """One attention less another, as in differential attention."""
    forward = model.CausalSelfAttention.forward
    return forward(self, x) - forward(self, x.flip(-1))


def identity(self, x, *args, **kwargs):
    return x


def nonlinear(q, k, v, *args):
    return attend_with(sigmoid_weights)(q, k, v).tanh()


@pytest.mark.parametrize(
    "attributes, message",
    [
        (dict(forward=identity), "layer 0 called its attention_fn 0 times, so it has no single"),
        (dict(forward=differential), "layer 0 called its attention_fn 2 times"),
        (dict(attention_fn=staticmethod(nonlinear)), "layer 0 attends with is no weighted sum"),
        (dict(attention_fn=staticmethod(attend_with(linear_weights))), "are below 0"),
        (dict(attention_fn=None, forward=identity), "attention maps need softmax attention in"),
    ],
)
def test_a_model_without_maps_is_refused(attributes, message):
    with pytest.raises(ConfigError, match=message):
        attention_maps.require_maps(opened(fork(**attributes)))


# ---- patterns ------------------------------------------------------------------------------------


def even_attention(*shape):
    weights = torch.ones(*shape).tril()
    return weights / weights.sum(-1, keepdim=True)


def all_real(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def test_weights_are_divided_by_their_sum():
    weights = torch.tensor([[[[0.5, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.0, 0.0]]]])
    ids = torch.tensor([[1, 2, 3]])
    scores = attention_maps.pattern_scores(weights, ids, all_real(ids))
    assert scores["previous token"].item() == pytest.approx((0.75 + 0) / 2)
    assert scores["itself"].item() == pytest.approx((0.25 + 0) / 2)


def test_the_entropy_of_even_and_of_sharp_attention():
    """Even attention of token t has the entropy log(t + 1), which is called 1."""
    ids = torch.arange(5)[None]
    even = attention_maps.pattern_scores(even_attention(1, 1, 5, 5), ids, all_real(ids))
    sharp = attention_maps.pattern_scores(torch.eye(5)[None, None], ids, all_real(ids))
    assert float(even["entropy"]) == pytest.approx(1)
    assert float(sharp["entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(even["previous token"]) == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    assert float(even["first token"]) == pytest.approx(np.mean([1 / 3, 1 / 4, 1 / 5]))


@pytest.mark.parametrize("window", [1, 3, 8, 16])
def test_even_attention_in_a_window_is_diffuse(window):
    T = 64
    weights = torch.ones(1, 1, T, T).tril().triu(1 - window)
    weights = weights / weights.sum(-1, keepdim=True)
    ids = torch.randint(4, (1, T), generator=torch.Generator().manual_seed(0))
    scores = attention_maps.pattern_scores(weights, ids, all_real(ids), window)
    means = {name: float(x) for name, x in scores.items()}
    if window == 1:
        assert means["itself"] == 1 and means["entropy"] == 0
        return
    assert means["entropy"] == pytest.approx(1)
    assert attention_maps.head_role(means) == "diffuse"
    # Token 1 has it as its previous token, and those from `window` on do not see it.
    expected = [1 / (t + 1) for t in range(2, window)]
    if expected:
        assert means["first token"] == pytest.approx(np.mean(expected))


def test_blanks_of_mqar_do_not_count():
    ids = torch.tensor([[5, 9, 0, 0, 5, 0]])
    for data, expected in (("data_mqar", ids != 0), ("data_track", ids == ids)):
        settings = SimpleNamespace(train=SimpleNamespace(data=data))
        run = SimpleNamespace(pad=-1, settings=settings)
        assert torch.equal(attention_maps.real_tokens(run, ids), expected)


def naive_pattern(name, ids, t, s):
    if name == "previous token":
        return s == t - 1
    if name == "2 to 8 back":
        return 2 <= t - s <= 8
    if name == "itself":
        return s == t
    if name == "first token":
        return s == 0 and t >= 2  # token 1 has it as its previous token
    if name == "induction":
        return 0 < s < t and ids[s - 1] == ids[t]
    return s < t and ids[s] == ids[t]  # same token


@pytest.mark.parametrize("name", attention_maps.PATTERNS)
def test_patterns_weight_by_weight(name):
    """The attention that a token gives to a pattern, averaged over tokens that have it."""
    g = torch.Generator().manual_seed(0)
    ids, weights = torch.randint(4, (1, 14), generator=g), torch.rand(1, 1, 14, 14, generator=g)
    weights /= weights.sum(-1, keepdim=True)
    sums = []
    for t in range(1, 14):
        members = [s for s in range(14) if naive_pattern(name, ids[0].tolist(), t, s)]
        if members:
            sums.append(weights[0, 0, t, members].sum().item())
    score = attention_maps.pattern_scores(weights, ids, all_real(ids))[name]
    assert float(score) == pytest.approx(np.mean(sums), rel=1e-5)


def test_padding_is_left_out_of_patterns():
    ids = torch.tensor([[5, 6, 5, 0]])
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 0, 0] = weights[0, 0, 1, 0] = weights[0, 0, 3, 3] = 1
    weights[0, 0, 2, 1] = 1  # the second 5 attends to what came after the first
    real = torch.tensor([[True, True, True, False]])
    scores = attention_maps.pattern_scores(weights, ids, real)
    assert float(scores["induction"]) == 1
    assert float(scores["previous token"]) == 1
    assert float(scores["itself"]) == 0


def test_a_pattern_that_no_token_can_have_is_nan():
    ids = torch.tensor([[6, 6, 2, 3]])  # what came after the first 6 is the second 6 itself
    scores = attention_maps.pattern_scores(even_attention(1, 1, 4, 4), ids, all_real(ids))
    assert torch.isnan(scores["induction"]).all()


@pytest.mark.parametrize(
    "changes, role",
    [
        (dict(entropy=0.85), "diffuse"),
        (dict(entropy=0.84), "itself"),
        (dict(itself=0.39), "mixed, most to: itself"),
        (dict(itself=0.2), "mixed, most to: itself"),
        (dict(itself=0.19), "mixed"),
        (dict(induction=0.5), "induction"),
        (dict(itself=np.nan), "mixed"),
    ],
)
def test_the_role_of_a_head(changes, role):
    scores = dict.fromkeys(attention_maps.PATTERNS, 0.0)
    assert attention_maps.head_role({**scores, "itself": 0.4, "entropy": 0.1, **changes}) == role


def induction_model(V, T):
    """Two blocks by hand: the first copies the token before, the second looks for the token after
    an earlier occurrence of this one.

    The residual stream holds the token (V), its position (T) and the token before (V), one-hot.
    """
    width, sharp = max(V, T), 200.0
    sizes = dict(dim=2 * V + T, n_layers=2, n_heads=1, dk=width, dv=width)
    made = model.GPT(model.Config(**sizes, pos_emb="learned", vocab_size=V, seq_len=T)).eval()
    first, second = (layer.att for layer in made.layers)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
        for norm in (made.final_norm, *(layer.att_norm for layer in made.layers)):
            norm.weight.fill_(1)
        made.embed.weight[:, :V] = torch.eye(V)
        made.pos_embed.weight[:, V : V + T] = torch.eye(T)
        for t in range(1, T):
            first.proj_q.weight[t - 1, V + t] = sharp  # position t asks for position t - 1
        for t in range(T):
            first.proj_k.weight[t, V + t] = 1
        for v in range(V):
            first.proj_v.weight[v, v] = 1
            first.out_proj.weight[V + T + v, v] = 1
            second.proj_q.weight[v, v] = sharp  # this token
            second.proj_k.weight[v, V + T + v] = 1  # after an earlier one
    return made


def test_a_hand_built_induction_head_is_found():
    torch.manual_seed(0)
    repeated = [torch.randperm(12)[:8].repeat(2) for _ in range(6)]  # every token comes twice
    tokens = torch.stack(repeated)
    maps = attention_maps.attention_maps(induction_model(12, 16), tokens)
    maps["even"] = even_attention(6, 1, 16, 16)
    means = {}
    for layer, weights in maps.items():
        scores = attention_maps.pattern_scores(weights, tokens, all_real(tokens))
        means[layer] = {name: float(x.nanmean()) for name, x in scores.items()}
    assert attention_maps.head_role(means[0]) == "previous token"
    assert means[0]["previous token"] > 0.99
    assert attention_maps.head_role(means[1]) == "induction"
    assert means[1]["induction"] > 0.9
    assert attention_maps.head_role(means["even"]) == "diffuse"


# ---- the command ---------------------------------------------------------------------------------


def test_the_attention_of_a_run(tmp_path):
    _, out = train_toy(tmp_path, "mqar", max_steps=5)
    eval_script.main(["attention", out, "--example=4"])
    stem = tmp_path / "mqar" / "eval_attention_example-4"
    example = json.loads(stem.with_suffix(".json").read_text())["examples"][0]
    assert example["example"] == 4 and len(example["tokens"]) == 16
    weights = np.array(example["weights"]["layer_1"]["head_0"])
    assert weights.shape == (16, 16) and np.allclose(weights.sum(-1), 1, atol=2e-3)
    n_examples, n_layers, n_heads = 50, 2, 2
    columns = pq.read_table(stem.with_suffix(".parquet")).to_pydict()
    assert len(columns["example"]) == n_examples * n_layers * n_heads
    folder = tmp_path / "mqar" / "attention_example-4"
    assert (folder / "layer_1_head_0.png").exists()
    saved = np.load(folder / "maps.npz")["layer_1_head_0"]
    assert np.allclose(saved, weights, atol=1e-4)


def test_maps_are_in_float32_also_under_autocast():
    g = torch.Generator().manual_seed(0)
    q, k = (4 * torch.randn(1, 2, 40, 16, generator=g).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        weights = attention_weights(q, k)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, attention_weights(q.float(), k.float()))


def test_the_attention_of_a_run_in_bfloat16(tmp_path):
    _, out = train_toy(tmp_path, "mqar", max_steps=5, dtype="bfloat16")
    eval_script.main(["attention", out])
    saved = json.loads((tmp_path / "mqar" / "eval_attention.json").read_text())
    assert saved["config"]["precision"] == "bfloat16"


def test_few_maps_are_held_at_a_time(tmp_path, monkeypatch):
    """The scores are the same; a large map is not written as text."""
    _, out = train_toy(tmp_path, "mqar", max_steps=5, n_test_examples=6)
    file = tmp_path / "mqar" / "eval_attention.parquet"
    eval_script.main(["attention", out])
    together = pq.read_table(file).to_pandas()
    sizes, maps_of = [], attention_maps.attention_maps

    def count(model, tokens):
        sizes.append(len(tokens))
        return maps_of(model, tokens)

    monkeypatch.setattr(attention_maps, "attention_maps", count)
    monkeypatch.setattr(attention_maps, "MAX_WEIGHTS", 2 * 4 * 16 * 16)
    monkeypatch.setattr(attention_maps, "MAX_JSON", 10)
    eval_script.main(["attention", out])
    assert sizes == [1, 2, 2, 2, 1]  # first the check, last the example that is drawn
    order = ["example", "layer", "head"]
    alone = pq.read_table(file).to_pandas().sort_values(order).reset_index(drop=True)
    together = together.sort_values(order).reset_index(drop=True)
    assert np.allclose(alone, together, atol=1e-5, equal_nan=True)
    example = json.loads(file.with_suffix(".json").read_text())["examples"][0]
    assert example["weights"].endswith("attention/maps.npz")


def test_many_heads_are_small_panels_with_roles(tmp_path, monkeypatch):
    """Twenty heads of two layers: two rows of 16 panels for each layer."""
    figures = []
    monkeypatch.setattr(attention_maps, "finish_figure", lambda fig, *rest: figures.append(fig))
    roles = {(layer, head): "diffuse" for layer in range(2) for head in range(20)}
    roles[1, 3] = "induction"
    maps = dict.fromkeys(roles, np.eye(4))
    attention_maps.plot_grid(maps, list("abcd"), roles, "title", "x.png")
    axes = figures[0].axes
    assert len(axes) == 4 * 16 + 1 and axes[35].get_title() == "1.3"
    assert axes[35].spines["top"].get_edgecolor() != axes[34].spines["top"].get_edgecolor()
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["diffuse", "induction"]
