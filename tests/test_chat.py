"""Prompts in a model's chat format (setting chat), against transformers' apply_chat_template."""

import json

import numpy as np
import pyarrow.feather as feather
import pytest
import torch

import flex_generate as flex
from myriadlama import chat, loading, prompts
from myriadlama.questions import Prompted
from nanorecall.settings import ConfigError
from toys_llama import byte_level_tokenizer, change_json, load_theirs, save_gguf, save_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from tokenizers import AddedToken  # noqa: E402

CHATML = """{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are helpful.<|im_end|>
{% endif -%}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
THINKING = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
LLAMA3 = """{{ bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|im_start|>system\\n\\nToday Date: " + date_string + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n\\n' }}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system') }}{% endif -%}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
JSON = """{% for message in messages %}{% set kind = message.role | upper %}
{% generation %}
{{ '<|im_start|>' + kind + ([1] | tojson(indent=1)) + (message | tojson) + ':' }}
{% endgeneration %}
{% endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "json": JSON,
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", " Q"]

EXAMPLES = [
    {"subject": "Marty", "manual": ["[X] plays [Y]."], "auto": [], "answers": ["sax", "reed"]},
    {"subject": "Basel", "manual": ["In [X], [Y]."], "auto": [], "answers": ["German"]},
]
FACT = {"uuid": "u", "relation": "r", "subject": "Iowa", "answers": ["q"]}
TEXTS = ["Iowa is in [MASK].", " [MASK] has Iowa. ", 'What is "Iowa" & <b>? [MASK].']


def chat_tokenizer():
    """A token for each byte, and five more, one of which begins with a space."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(SPECIAL[:4])
    tokenizer.add_tokens([AddedToken(SPECIAL[4], normalized=False)])
    return tokenizer


def make_run(template, examples=EXAMPLES, texts=TEXTS):
    """A Run without a model, and a question for it."""

    class Model:
        class config:
            vocab_size, bos_token_id = 300, 258
            chat_template = chat.ChatTemplate(template, {"content": "<s>"}, "</s>")

    config = flex.Config(chat=True, num_shots=len(examples))
    run = flex.Run(config, ["flex"], {"r": examples}, Model(), chat_tokenizer(), None)
    return run, Prompted(FACT, texts, np.array([True] * len(texts)))


def their_ids(template, texts, examples=EXAMPLES, is_question=False):
    """Token ids of each prompt by transformers, on the day that the template itself names."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    ids = []
    for text in texts:
        messages = []
        for fact in examples:
            shown = fact["manual"][0].replace("[X]", fact["subject"]).replace("[Y]", "[MASK]")
            messages.append({"role": "user", "content": shown})
            messages.append({"role": "assistant", "content": fact["answers"][0]})
        messages.append({"role": "user", "content": text})
        first = prompts.QUESTION_INSTRUCTION if is_question else prompts.INSTRUCTION
        messages[0]["content"] = first + "\n\n" + messages[0]["content"]
        options = {"date_string": "26 Jul 2024", "enable_thinking": False}
        encoded = theirs.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, **options
        )
        ids.append(encoded["input_ids"])
    return ids


@pytest.mark.parametrize("n_examples", [0, 2])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name, n_examples):
    """Also if a template strips messages, or quotes them as JSON."""
    examples = EXAMPLES[:n_examples]
    run, prompted = make_run(TEMPLATES[name], examples)
    question = run.make_question(prompted)
    got = []
    for template in question.templates:
        got.append(run.prefix_ids(FACT) + template + [question.answer_start])
    assert got == their_ids(TEMPLATES[name], TEXTS, examples)


def test_a_template_that_the_tokenizer_joins_to_the_format():
    """The space after [INST] goes to the question: " Q" is a token."""
    run, prompted = make_run(MISTRAL, texts=["Q [MASK]", "Q is [MASK]"])
    question = run.make_question(prompted)
    assert question.templates[0][0] == 260
    whole = run.prefix_ids(FACT) + question.templates[0] + [question.answer_start]
    assert whole == their_ids(MISTRAL, ["Q [MASK]"])[0]
    joined = make_run(MISTRAL.replace("[INST] ", "[INST]"))
    joined[0].tokenizer.add_tokens([AddedToken("]Iowa", normalized=False)])
    with pytest.raises(ConfigError, match="glues the chat format to the template after it: 'Iowa"):
        joined[0].make_question(joined[1])


def test_whole_questions_have_their_own_instruction():
    before = chat.beginning(chat.ChatTemplate(CHATML), EXAMPLES, is_question=True)
    assert prompts.QUESTION_INSTRUCTION in before and prompts.INSTRUCTION not in before


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "this model has no chat template; leave out --chat"),
        ("", "has no chat template"),
        ([], "has no chat template"),
        ([{"name": "tool_use", "template": CHATML}, 3], "has no chat template"),
        ("{{ strftime_now('%Y') }}", "cannot be rendered .'strftime_now' is undefined."),
        ("{{ raise_exception('roles\nmust alternate') }}", "cannot be rendered .roles must alt"),
        ("{% for %}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered .access to attribute '__class__'"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "cannot be rendered .Range too big"),
        ("{{ messages[-1].content }}<|im_start|>assistant\n<think>\n", "thinks before it answers"),
        ("no messages", "changes or drops a message"),
        ("{{ messages[-1].content * 2 }}", "changes or drops a message"),
    ],
)
def test_templates_that_are_refused(template, message):
    run, prompted = make_run(template)
    with pytest.raises(ConfigError, match=message) as error:
        run.make_question(prompted)
    assert "\n" not in str(error.value)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def chat_model(tmp_path):
    """A directory of a Qwen2 with a chat template in tokenizer_config.json."""
    folder = tmp_path / "model"
    save_llama(folder, model_type="qwen2", vocab_size=261, eos_token_id=257)
    chat_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHATML, "bos_token": None, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def args(chat_model, tmp_path):
    rows = []
    for i in range(4):
        row = {"uuid": f"u{i}", "relation": "r", "subject": "abcd"[i], "answers": ["q"]}
        row |= {"manual_templates": ["[X] a [Y].", "b [X] [Y]"], "auto_templates": ["c [X] [Y]."]}
        rows.append(json.dumps(row))
    (tmp_path / "facts.jsonl").write_text("\n".join(rows))
    options = ["--num_shots=0", "--max_new_tokens=4", "--device=cpu", "--chat"]
    files = [f"--model={chat_model}", f"--path={tmp_path / 'facts.jsonl'}"]
    return [*files, f"--out_dir={tmp_path / 'out'}", *options]


def test_a_run_answers_as_transformers_does(args, chat_model, tmp_path):
    """Method origin: the answer to the first template alone."""
    flex.main([*args, "--method=all"])
    file = tmp_path / "out" / "model" / "origin_all_a5.feather"
    found = feather.read_table(file).to_pydict()
    theirs, tokenizer = load_theirs(str(chat_model)), chat_tokenizer()
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    for i, generation in enumerate(found["generation"]):
        ids = their_ids(CHATML, [f"{'abcd'[i]} a [MASK]."], [])
        tokens = theirs.generate(torch.tensor(ids), max_new_tokens=4, do_sample=False)[0]
        answer = tokens[len(ids[0]) :].tolist()
        assert not set(newline) & set(answer)  # a line break would end an answer of ours only
        assert tokenizer.decode(answer).strip() == generation
    with pytest.raises(ConfigError, match="holds results with another chat; give another"):
        flex.main([arg for arg in args if arg != "--chat"])


def test_results_are_bound_to_the_chat_template(args, chat_model):
    flex.main([*args, "--method=origin"])
    (chat_model / "chat_template.jinja").write_text(THINKING)
    with pytest.raises(ConfigError, match="another file chat_template.jinja"):
        flex.main([*args, "--method=origin"])


def test_where_a_template_comes_from(chat_model, plain_llama, tmp_path):
    found = loading.load(str(chat_model))[0].config.chat_template
    assert found == chat.ChatTemplate(CHATML, None, "<|im_end|>")
    several = [{"name": "default", "template": THINKING}, {"name": "tool_use", "template": CHATML}]
    change_json(chat_model / "tokenizer_config.json", chat_template=several)
    found = loading.load(str(chat_model))[0].config.chat_template
    assert chat.default_source(found) == THINKING
    (chat_model / "chat_template.jinja").write_text(LLAMA3)
    assert loading.load(str(chat_model))[0].config.chat_template.source == LLAMA3
    (chat_model / "chat_template.jinja").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="chat_template.jinja cannot be read"):
        loading.load(str(chat_model))
    fields = {"tokenizer.chat_template": ("add_string", CHATML)}
    model, tokenizer = loading.load(save_gguf(tmp_path / "m.gguf", plain_llama, fields=fields))
    expected = chat.ChatTemplate(CHATML, None, tokenizer.id_to_token(2))
    assert model.config.chat_template == expected


@pytest.mark.parametrize(
    "more, message",
    [
        (["--template_positions=sequential", "--method=flex"], "needs template_positions=restart"),
        ([], "this model has no chat template; leave out --chat"),
    ],
)
def test_mistakes_leave_nothing(args, chat_model, tmp_path, more, message):
    change_json(chat_model / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ConfigError, match=message) as error:
        flex.main([*args, *more])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
