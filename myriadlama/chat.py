"""Prompts in the chat format of a model, for instruction-tuned models (setting chat).

The format is the model's own Jinja template, rendered as transformers' apply_chat_template renders
it. It comes from chat_template.jinja, tokenizer_config.json or a GGUF file. PyTorch needs jinja2
itself, so the package is there.

The instruction and the first example are the first turn of the user, the answer is the model's
turn, and so on. The last turn of the user is a template of the question.
"""

import functools
import json
from dataclasses import dataclass

from myriadlama import prompts
from nanorecall.settings import ConfigError, require

QUESTION = "\ue000question\ue000"  # stands for a template of the question; in no text of a fact


@dataclass
class ChatTemplate:
    """As the files of a model have it; nothing is checked before it is used."""

    source: object  # Jinja, or [{"name": ..., "template": Jinja}], or None
    bos_token: object = None  # text, or {"content": text}, or None
    eos_token: object = None


def beginning(chat, examples, is_question):
    """The text of a prompt before every template.

    chat: a ChatTemplate. examples: facts. ConfigError if the template cannot be rendered.
    """
    text = prompt(chat, examples, is_question, QUESTION)
    message = "the chat template of this model changes or drops a message; leave out --chat"
    require(text.count(QUESTION) == 1, message, "chat")
    opens_thought = text.rstrip().endswith("<think>")
    message = "this model thinks before it answers, for longer than an answer may be"
    require(not opens_thought, f"{message}; leave out --chat", "chat")
    # A tokenizer joins a space to the word after it, so the space belongs to the template.
    return text[: text.index(QUESTION)].rstrip(" ")


def prompt(chat, examples, is_question, template):
    """The whole text of a prompt that ends with one filled template."""
    messages = []
    for fact in examples:
        shown = prompts.fill(prompts.first_template(fact), fact["subject"])
        messages.append({"role": "user", "content": shown})
        messages.append({"role": "assistant", "content": fact["answers"][0]})
    messages.append({"role": "user", "content": template})
    instruction = prompts.instruction(is_question)
    messages[0]["content"] = f"{instruction}\n\n{messages[0]['content']}"
    return render(chat, messages)


def render(chat, messages):
    """Messages of a chat [{"role", "content"}] -> the text that the model continues."""
    source = default_source(chat)
    has_source = isinstance(source, str) and source
    require(has_source, "this model has no chat template; leave out --chat", "chat")
    try:
        return compiled(source).render(
            messages=messages,
            add_generation_prompt=True,
            enable_thinking=False,  # an answer has a few tokens: too few to think
            tools=None,
            documents=None,
            bos_token=token_text(chat.bos_token),
            eos_token=token_text(chat.eos_token),
        )
    except Exception as e:  # a template may raise anything
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        message = f"the chat template of this model cannot be rendered ({reason}); leave out --chat"
        raise ConfigError(message, "chat") from None


def default_source(chat):
    """The Jinja text of a ChatTemplate. Of several, transformers takes the one named default."""
    source = chat.source if chat else None
    if not isinstance(source, list):
        return source
    for entry in source:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    return None


@functools.cache
def compiled(source):
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what a model says, for training; the text stays the same."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise ValueError(message)

    def to_json(value, **options):
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # No strftime_now: with today's date, results would depend on the day.
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def token_text(token):
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
