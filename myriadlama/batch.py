"""A batch of questions with the work that the methods of flex_generate.py share, and its cost.

Letters: B questions, n templates of a question.
"""

from typing import NamedTuple

import numpy as np
import torch

from myriadlama import decoding, fusion, prompts
from myriadlama.hugging_face import decoded
from nanorecall.distributed import now


class CostMeter:
    """Seconds of a batch and tokens of each of its questions, for each method.

    Methods share intermediate results. Each method is charged for all that it uses, no matter which
    method computed it first, so that costs do not depend on the order of the methods.
    """

    def __init__(self, device):
        self.device = device
        # name of a shared result -> value, seconds, tokens (B,), fractions of others
        self.results = {}
        self.reset_cost()

    def reset_cost(self):
        """Start counting for the next method."""
        self.tokens = 0  # or those of each question (B,), once there are some
        self.start = now(self.device)
        self.seconds_sharing = 0.0  # spent on shared results since the start
        self.fractions = {}  # name of a shared result -> the fraction charged to this method

    def add_tokens(self, tokens):
        """Charge the questions for these tokens, an array (B,)."""
        self.tokens = self.tokens + tokens

    def cost(self):
        """-> seconds of this method, tokens of each question (B,)"""
        seconds = now(self.device) - self.start - self.seconds_sharing
        tokens = self.tokens
        for name, fraction in self.fractions.items():
            _, shared_seconds, shared_tokens, _ = self.results[name]
            charged = fraction * shared_tokens
            seconds += shared_seconds * charged.sum() / shared_tokens.sum()
            tokens = tokens + charged
        return seconds, tokens

    def shared(self, name, compute, fraction=1.0):
        """compute(), or its result from an earlier method. It must read some tokens.

        fraction: the part of the tokens to charge, for a method that needs only a part of the
        result: a number, or one for each question (B,). Seconds are charged in proportion.
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
            self.fractions[used] = np.maximum(part, self.fractions.get(used, 0.0))
        return value


class Answers(NamedTuple):
    """Of one method: B texts and confidences (B,). Or B lists of n texts and B tensors (n,).

    The confidence is the probability of a text that begins with what is scored of this one, its
    first word or words: that of "New" includes that of "Newark".
    """

    texts: list
    confidence: torch.Tensor | list
    log_weight: list | None = None  # B tensors (n,): log probability of the whole text and its end


class Batch:
    """Questions of one relation, after one prefix. facts: what they ask.

    Their numbers of templates may differ. The rows of a question, such as its templates, lie next
    to each other. `sizes` says how many each question has.
    """

    def __init__(self, run, questions, facts, prefix_kv):
        self.run, self.questions, self.facts = run, questions, facts
        self.prefix_kv = prefix_kv
        self.prefix_length = prefix_kv[0][0].shape[2]
        self.counts = [len(question.templates) for question in questions]
        self.template_rows = []  # of each question, in encode_separately: range(0, 3), range(3, 5)
        for end, n in zip(np.cumsum(self.counts).tolist(), self.counts):
            self.template_rows.append(range(end - n, end))
        self.meter = CostMeter(prefix_kv[0][0].device)

    def count_tokens(self, row_tokens, sizes):
        """Charge each question for the tokens of its rows."""
        own = [int(part.sum()) for part in torch.as_tensor(row_tokens).split(sizes)]
        self.meter.add_tokens(np.array(own))

    def encode(self, rows, sizes):
        """rows [(token ids, positions)] -> fusion.Encoded"""
        self.count_tokens([len(ids) for ids, _ in rows], sizes)
        return fusion.prefill(self.run.model, self.prefix_kv, rows)

    def encode_separately(self, fraction=1.0):
        """Encode every template as a prompt of its own, right after the prefix.

        -> fusion.Encoded, a row for each template, question by question
        """

        def compute():
            templates = []
            for question in self.questions:
                templates += question.templates
            return self.encode(self.rows(templates), self.counts)

        return self.meter.shared("encode_separately", compute, fraction)

    def rows(self, templates):
        """Lists of token ids, each at the positions right after the prefix."""
        start = self.prefix_length
        return [(ids, range(start, start + len(ids))) for ids in templates]

    def decode_rows(self, cache, sizes, choose=decoding.argmax_each, **options):
        """Decode all rows of a cache -> Answers, one to each row.

        sizes: see Batch. options: weigh and forward of decoding.greedy_decode.
        """
        run = self.run
        first_token, limit = self.questions[0].answer_start, run.config.max_new_tokens
        tokens, log_probs = decoding.greedy_decode(
            run.model, cache, first_token, choose, run.stop, limit, **options
        )
        # Every row reads the answer start and what it has generated.
        self.count_tokens(1 + (tokens >= 0).sum(1), sizes)
        texts, confidence = [], []
        for fact, rows, own_log_probs in zip(
            self.facts, tokens.split(sizes), log_probs.split(sizes)
        ):
            own_texts, own_confidence = [], []
            for row, steps in zip(rows.tolist(), own_log_probs):
                text, n_scored = self.scored_text(fact, [token for token in row if token >= 0])
                own_texts.append(text)
                # An empty text is as probable as its end.
                own_confidence.append(steps[: max(n_scored, 1)].sum().exp())
            texts.append(own_texts)
            confidence.append(torch.stack(own_confidence))
        return Answers(texts, confidence, log_probs.sum(1).split(sizes))

    def decode(self, cache, sizes=None, **options):
        """As decode_rows, but -> Answers, one to each question: all its rows have the same.

        sizes: None if each question has one row.
        """
        if sizes is None:
            sizes = [1] * len(self.questions)
        texts, confidence, _ = self.decode_rows(cache, sizes, **options)
        texts = [own[0] for own in texts]
        return Answers(texts, torch.stack([own[0] for own in confidence]))

    def scored_text(self, fact, ids):
        """-> text of an answer, the number of its first tokens that what is scored consists of"""
        text = decoded(self.run.tokenizer, ids).strip()
        scored = prompts.prediction(fact, text)
        for n in range(len(ids)):
            if prompts.prediction(fact, decoded(self.run.tokenizer, ids[:n])) == scored:
                return text, n
        return text, len(ids)

    def score_bias(self, n):
        """Bias on the attention scores of n fused templates, so that they do not outweigh the
        prefix: with -log(n) they weigh as much as one template."""
        return self.run.config.score_bias * np.log(n)
