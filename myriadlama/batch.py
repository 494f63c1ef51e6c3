"""A batch of questions with the work that the methods of flex_generate.py share, and its cost."""

import time
from typing import NamedTuple

import numpy as np
import torch

from myriadlama import decoding, fusion, prompts


def now(device):
    """Seconds, once the device has done all that it was given: a GPU works behind our back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class CostMeter:
    """Seconds and tokens of each method.

    Methods share intermediate results. Each method is charged for all that it uses, no matter which
    method computed it first, so that costs do not depend on the order of the methods.
    """

    def __init__(self, device):
        self.device = device
        self.results = {}  # name of a shared result -> value, seconds, tokens, fractions of others
        self.reset_cost()

    def reset_cost(self):
        """Start counting for the next method."""
        self.tokens = 0
        self.start = now(self.device)
        self.seconds_sharing = 0.0  # spent on shared results since the start
        self.fractions = {}  # name of a shared result -> the fraction charged to this method

    def cost(self):
        """-> seconds, tokens of this method"""
        seconds = now(self.device) - self.start - self.seconds_sharing
        tokens = self.tokens
        for name, fraction in self.fractions.items():
            _, shared_seconds, shared_tokens, _ = self.results[name]
            seconds += fraction * shared_seconds
            tokens += fraction * shared_tokens
        return seconds, tokens

    def shared(self, name, compute, fraction=1.0):
        """compute(), or its result from an earlier method.

        fraction: the part of the cost to charge, for a method that needs only a part of the result.
        """
        if name not in self.results:
            start, tokens_before = now(self.device), self.tokens
            sharing_before = self.seconds_sharing
            fractions_before, self.fractions = self.fractions, {}
            value = compute()
            seconds = now(self.device) - start
            # compute() may have called shared(), whose time is charged under its own name
            nested_seconds = self.seconds_sharing - sharing_before
            own_tokens = self.tokens - tokens_before
            self.results[name] = value, seconds - nested_seconds, own_tokens, self.fractions
            self.seconds_sharing = sharing_before + seconds
            self.tokens = tokens_before
            self.fractions = fractions_before
        value, _, _, nested = self.results[name]
        for used, part in {**nested, name: fraction}.items():
            self.fractions[used] = max(part, self.fractions.get(used, 0.0))
        return value


class Answers(NamedTuple):
    """Of one method. With one answer to each question, everything is (B,); or (B, n).

    The confidence is the probability of a text that begins with what is scored of this one, its
    first word or words: that of "New" includes that of "Newark".
    """

    texts: list
    confidence: torch.Tensor
    log_weight: torch.Tensor | None = None  # log probability of the whole text and its end


class Batch:
    """Questions of one relation with n templates each, after one prefix. facts: what they ask."""

    def __init__(self, run, questions, facts, prefix_kv):
        self.run, self.questions, self.facts = run, questions, facts
        self.prefix_kv = prefix_kv
        self.prefix_length = prefix_kv[0][0].shape[2]
        self.n = len(questions[0].templates)
        self.meter = CostMeter(prefix_kv[0][0].device)

    def encode(self, rows):
        """rows [(token ids, positions)] -> fusion.Encoded"""
        self.meter.tokens += sum(len(ids) for ids, _ in rows)
        return fusion.prefill(self.run.model, self.prefix_kv, rows)

    def encode_separately(self, fraction=1.0):
        """Encode every template as a prompt of its own, right after the prefix.

        -> fusion.Encoded, a row for each template, question by question
        """

        def compute():
            templates = []
            for question in self.questions:
                templates += question.templates
            return self.encode(self.rows(templates))

        return self.meter.shared("encode_separately", compute, fraction)

    def rows(self, templates):
        """Lists of token ids, each at the positions right after the prefix."""
        start = self.prefix_length
        return [(ids, range(start, start + len(ids))) for ids in templates]

    def decode(self, cache, choose=decoding.argmax_each, weigh=decoding.softmax_weights):
        """-> Answers of the rows of a cache"""
        run = self.run
        first_token, limit = self.questions[0].answer_start, run.config.max_new_tokens
        tokens, log_probs = decoding.greedy_decode(
            run.model, cache, first_token, choose, run.stop, limit, weigh
        )
        # Every row reads the answer start and what it has generated.
        self.meter.tokens += len(tokens) + int((tokens >= 0).sum())
        texts, confidence = [], []
        for r, row in enumerate(tokens.tolist()):
            fact = self.facts[r * len(self.facts) // len(tokens)]
            text, n_scored = self.scored_text(fact, [token for token in row if token >= 0])
            texts.append(text)
            # An empty text is as probable as its end.
            confidence.append(log_probs[r, : max(n_scored, 1)].sum().exp())
        return Answers(texts, torch.stack(confidence), log_probs.sum(1))

    def scored_text(self, fact, ids):
        """-> text of an answer, the number of its first tokens that what is scored consists of"""
        text = self.run.tokenizer.decode(ids).strip()
        scored = prompts.prediction(fact, text)
        for n in range(len(ids)):
            if prompts.prediction(fact, self.run.tokenizer.decode(ids[:n])) == scored:
                return text, n
        return text, len(ids)

    def score_bias(self, n):
        """Bias on the attention scores of n fused templates, so that they do not outweigh the
        prefix: with -log(n) they weigh as much as one template."""
        return self.run.config.score_bias * np.log(n)
