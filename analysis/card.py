"""The report card of one sequence mixer: what it recalls, what it costs, where it fails.

    python sweep.py card --model mine             # a model file of your own, mine.py
    python sweep.py card --mixer mine.Mixer       # a module (B, T, D) -> (B, T, D), from a Config
    python sweep.py card --model delta            # a mixer of this project

It checks the model first, and refuses one that looks ahead. Then it trains ten to thirteen small
models, and writes card.md, card.png and card.json into runs/card/NAME, beside the cards of this
project's own mixers (figures/card.json). Its runs lie there too: a second call continues where the
first stopped. A mixer gets 2 layers of width 64; --model_args has further settings
(--model_args="--conv_size 4").
"""

import os
import shlex
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import train
from analysis.card_checks import (
    LENGTHS,
    check_all,
    layer_parameters,
    new_model,
    relative_cost,
    state_bytes,
)
from analysis.card_page import BY_STATE, CARD, REFERENCE, draw, findings, page, say_size
from analysis.figures_of_mixers import (
    MEMORIES,
    WINDOWS,
    attention_args,
    memory_args,
    quality,
    recall_args,
    tracking_args,
    tracking_model,
)
from analysis.sweep_runs import ROOT, Point, collect_results, missing_runs, run_missing
from nanorecall.build import build_data, build_model_config, resolve_model
from nanorecall.files import atomic_write, make_directory
from nanorecall.records import check_kinds, read_record, write_json
from nanorecall.settings import (
    ConfigError,
    RunError,
    build_config,
    fits_in_a_path,
    has_closed_quotes,
    print_help,
    printable,
    reject_args,
    reject_unknown,
    require,
    say,
    split_argv,
    wants_help,
)
from nanorecall.source_files import find_source_file, import_source_file, require_free_name

STORED = os.path.join(ROOT, "figures", "card.json")  # {name: card} of this project's mixers


@dataclass
class Config:
    model: str = ""  # a model: short name, file or file.Class, as for train.py
    mixer: str = ""  # file.Class of a mixer, for the blocks of model.py, instead of a model
    model_args: str = ""  # further settings of the model; write --model_args="--conv_size 4"
    name: str = ""  # name of the card; empty: that of the model
    log_dir: str = "runs/card"  # where the card's directory goes
    jobs: int = 1  # runs at a time, one thread each
    store: bool = False  # also add the card to figures/card.json, beside which others are shown
    extra_args: str = ""  # extra flags for every training (="--max_steps 5"); use another log_dir

    def check(self):
        require(self.jobs >= 1, f"jobs={self.jobs} must be at least 1", "jobs")
        message = "give --model FILE or --mixer FILE.CLASS, and not both"
        require(bool(self.model) != bool(self.mixer), message, "model")
        message = f"mixer={self.mixer} must be file.Class, such as mine.Mixer, without .py"
        parts = self.mixer.split(".")
        is_class = len(parts) == 2 and all(part.isidentifier() for part in parts)
        is_class = is_class and parts[1] != "py"
        require(not self.mixer or is_class, message, "mixer")
        fits_in_a_path(self, "name")
        is_own = bool(self.model_args or self.extra_args)
        message = "store=1 keeps the card beside others; leave out model_args and extra_args"
        require(not (self.store and is_own), message, "store")
        for setting in ("model_args", "extra_args"):
            has_closed_quotes(self, setting)


# ---- the model -----------------------------------------------------------------------------------

MODEL_FILE = '''"""{name} in the blocks of model.py; written by `python sweep.py card`."""

from model import GPT, Config, GPTBlock
from {file} import {name} as Mixer


class Block(GPTBlock):
    mixer = Mixer


class Model(GPT):
    block = Block
'''


def model_file(mixer):
    """Write a model file with this mixer into the working directory -> its name, is it new?"""
    file, name = mixer.split(".")
    source = find_source_file(file)
    require(source, f"mixer={mixer}: there is no {file}.py here", "mixer")
    require_free_name(file, "mixer", source)
    mixer_class = getattr(import_source_file(file, "mixer", name), name)
    del sys.modules[file]  # so that the file below imports it, and records it
    is_module = isinstance(mixer_class, type) and issubclass(mixer_class, torch.nn.Module)
    require(is_module, f"mixer={mixer}: {name} is no torch.nn.Module", "mixer")
    model = f"{file}_{name}_blocks"
    text = MODEL_FILE.format(file=file, name=name).encode()
    path = model + ".py"
    if os.path.exists(path):
        with open(path, "rb") as f:
            message = f"{path} is not what the card would write there; rename it"
            require(f.read() == text, message, "mixer")
        return model, False
    atomic_write(path, lambda f: f.write(text))
    return model, True


def recall_model(model, model_args):
    """Arguments of train.py: the model with which recall is measured."""
    if model == REFERENCE:
        args = attention_args(kv_heads=2, window=0)
    elif model in MEMORIES:
        args = memory_args(model, heads=2)
    else:
        args = f"--model {model}"
        args += known_args(model, dim=64, n_layers=2, conv_size=4, pos_emb="none")
    return f"{args} {model_args}"


def parity_model(model, model_args):
    """Arguments of train.py: the model with which state tracking is measured."""
    if model == REFERENCE:
        args = tracking_model("attention")
    elif model in MEMORIES:
        args = tracking_model(model)
    else:
        # As in tracking_model. A model file that has not all of these settings keeps its own.
        args = f"--model {model}"
        args += known_args(model, dim=32, n_layers=1, n_heads=4, dk=8, dv=8, du=8)
        args += known_args(model, q_kernel="none", k_kernel="none", v_kernel="none")
        args += known_args(model, conv_size=0, pos_emb="none", use_ffn=1, init_std=1.0)
        args += known_args(model, allow_neg_eigval=1)
    return f"{args} {model_args}"


def known_args(model, **settings):
    """Those of the settings that the model has, as arguments."""
    module, model_class = resolve_model(model)
    inactive = getattr(model_class, "inactive_settings", {})
    args = ""
    for name, value in settings.items():
        if name in module.Config.__dataclass_fields__ and name not in inactive:
            args += f" --{name} {value}"
    return args


# ---- sizes of its state --------------------------------------------------------------------------


def sizes_of_state(model, recall, model_args):
    """{bytes of the state after 256 tokens: arguments of train.py}, of the model and two others.

    The others have as many layer parameters. There is one size only if their states are as large,
    or if the model refuses their number of heads.
    """
    sizes = {}
    for args in (recall, *other_sizes(model, recall, model_args)):
        try:
            size = state_bytes(shlex.split(args))["256"]
        except Exception as e:  # a model file of one's own may refuse other numbers of heads
            why = f"{type(e).__name__}: {printable(str(e))}"
            say(f"another size of the state was left out, since the model does not run ({why})")
            continue
        if size is not None:
            sizes.setdefault(size, args)
    return sizes


def other_sizes(model, recall, model_args):
    """Arguments of train.py: the model with other windows, or with half and twice as many heads."""
    if model == REFERENCE:
        return [f"{recall} --window {window}" for window in WINDOWS[:-1]]
    if model in MEMORIES and not model_args:
        return [memory_args(model, heads) for heads in (1, 4)]
    settings = train.parse(shlex.split(recall))
    config = build_model_config(settings, build_data(settings))
    now = getattr(config, "n_heads", 0)
    sizes = []
    for heads in (now // 2, 2 * now):
        if heads == 0:
            continue
        # Heads times width stays the same, and with it the number of parameters.
        widths = {}
        for name in ("dk", "dv", "du"):
            widths[name] = getattr(config, name, 0) * now // heads
        sizes.append(recall + known_args(model, n_heads=heads, **widths))
    return sizes


# ---- the trainings -------------------------------------------------------------------------------

RATES = (0.003, 0.01, 0.03, 0.1)
PARITY_RATES = (0.003, 0.01)
PAIRS = (16, 32, 64)
SIZES = "[(256, 32), (512, 32), (1024, 32)]"  # (tokens, pairs) to test on; trained on the first
SHORT = "--max_steps 200 --n_val_examples 50"


def recall_point(series, x, name, model_args, lr, pairs=32, more=""):
    args = f"{recall_args(model_args, pairs)} {SHORT} --lr {lr} {more}"
    return Point(series, x, f"{name}_lr{lr}", args, seeds=1)


def first_points(recall, parity):
    """32 pairs at each learning rate, parity at two."""
    points = [recall_point("recall", lr, "recall", recall, lr) for lr in RATES]
    for lr in PARITY_RATES:
        args = tracking_args(parity, "parity") + f" --lr {lr}"
        points.append(Point("parity", lr, f"parity_lr{lr}", args, seeds=1))
    return points


def other_points(recall, lr, states):
    """At the best learning rate: other numbers of pairs, longer sequences, sizes of the state.

    Some mixers want a lower learning rate for keys stored again, so the next lower one is tried.
    states: see sizes_of_state.
    """
    points = []
    for pairs in PAIRS:
        if pairs != 32:
            points.append(recall_point("pairs", pairs, f"pairs{pairs}", recall, lr, pairs))
    sizes = f'--test_sizes "{SIZES}" --n_val_examples 10 --n_test_examples 100'
    points.append(recall_point("lengths", 0, "lengths", recall, lr, more=sizes))
    lower = RATES[max(RATES.index(lr) - 1, 0)]
    for rate in dict.fromkeys((lr, lower)):
        more = "--num_updates 16"
        points.append(recall_point("updates", rate, "updates", recall, rate, more=more))
    for size, args in states.items():
        name = "pairs64" if args == recall else f"state{size}"
        points.append(recall_point("by_state", size, name, args, lr, pairs=64))
    return points


def train_points(points, runs):
    """Train what is missing -> {series: {x: result}} of the runs that ended well.

    A run may fail: at a high learning rate that is a result, too. RunError if all of a series do.
    """
    # Runs of an earlier version of the mixer must not be mixed with new ones.
    read_finished(points, runs)
    failed = None
    try:
        run_missing(points, runs)
    except RunError as e:
        failed = e
    results = read_finished(points, runs)
    if failed and set(results) != {point.series for point in points}:
        raise failed
    return results


def read_finished(points, runs):
    """{series: {x: result}} of the finished runs; ConfigError if they are of another model."""
    done = [point for point in points if not missing_runs([point], runs)]
    results = {}
    try:
        for point, (result,) in collect_results(done, runs).items():
            results.setdefault(point.series, {})[point.x] = result
    except ConfigError as e:
        raise ConfigError(f"{e}; or give the card of the changed model another --name") from None
    return results


def number_of_runs(points):
    """Points of one name share a run."""
    return len({point.name for point in points})


def measure_runs(recall, parity, states, runs, name):
    """Train, and -> the parts of a card that trainings give: {part: {name: accuracy or None}}

    states: see sizes_of_state. name: of the card, for the screen.
    """
    points = first_points(recall, parity)
    n_first = number_of_runs(points)
    # The lowest rate has no lower one to try, and so one training less.
    n_most = n_first + number_of_runs(other_points(recall, RATES[-1], states))
    say(f"{name}: trainings, first round: {n_first} of at most {n_most}", flush=True)
    first = train_points(points, runs)
    lr = max(first["recall"], key=lambda rate: quality(first["recall"][rate]))
    best_parity = max(first["parity"].values(), key=quality)
    points = other_points(recall, lr, states)
    n_others = number_of_runs(points)
    which = f"the other {n_others} of {n_first + n_others} (best learning rate: {lr})"
    say(f"{name}: trainings, second round: {which}", flush=True)
    others = train_points(points, runs)
    best_updates = max(others["updates"].values(), key=quality)
    at_32 = first["recall"][lr]
    pairs = {}
    for n in PAIRS:
        pairs[str(n)] = token_accuracy(at_32 if n == 32 else others["pairs"].get(n))
    rates = {str(rate): token_accuracy(first["recall"].get(rate)) for rate in RATES}
    by_state = []
    for size in sorted(states):
        accuracy = token_accuracy(others["by_state"].get(size))
        by_state.append({"bytes": size, "accuracy": accuracy})
    return {
        "pairs": pairs,
        "by_state": by_state,
        "rates": rates,
        "lengths": slice_accuracies(others["lengths"][0], "input_seq_len"),
        "updates": slice_accuracies(best_updates, "updated"),
        "parity": slice_accuracies(best_parity, "input_seq_len"),
    }


def token_accuracy(result):
    """None: the run failed."""
    return result["all"]["value"] if result else None


def slice_accuracies(result, name):
    return {value: metrics["value"] for value, metrics in result["slices"][name].items()}


# ---- command line --------------------------------------------------------------------------------


def parse(argv):
    args, settings = split_argv(argv)
    if wants_help(settings):
        print_help(__doc__, Config)
    reject_args(args)
    reject_unknown(settings, Config)
    return build_config(Config, settings)


def read_stored():
    if not os.path.exists(STORED):
        return {}
    cards = read_record(STORED, {"*": CARD})
    for name, card in cards.items():
        card.setdefault("by_state", [])  # an older card has no such part
        check_kinds(card["by_state"], BY_STATE, f"{STORED}: {name!r}: 'by_state'")
    return cards


def own_training(model, config, recall, lr):
    """Arguments of train.py that train the model at the learning rate that the card found.

    Those of the card are many. A config is short, but some models refuse its settings.
    """
    args = f"configs/mqar_gpt.py --model {model} {config.model_args}".strip()
    try:
        new_model(shlex.split(args))
    except Exception:  # the code of a user's model may raise anything
        args = recall_args(recall, pairs=32)
    return f"{args} --lr {lr}"


def make_card(config):
    stored = read_stored()  # first, since it may be damaged
    model, is_new = config.model, False
    if config.mixer:
        model, is_new = model_file(config.mixer)
    name = config.name or (config.mixer or config.model).replace(".", "_")
    stored.pop(name, None)  # an earlier card of the same mixer
    # The settings that a card gives to all models are refused beside blocks.
    has_blocks = model.startswith("memory") and "--blocks" in config.model_args
    message = "a card of memory layers is one of attention blocks; leave blocks out"
    require(not has_blocks, message, "model_args")
    folder = os.path.join(config.log_dir, name)
    runs = SimpleNamespace(seeds=1, jobs=config.jobs, log_dir=folder, extra_args=config.extra_args)

    say(f"{name}: checks")
    try:
        recall = recall_model(model, config.model_args)
        parity = parity_model(model, config.model_args)
        # Before minutes of checks: the runs of an earlier call may be those of another model.
        read_finished(first_points(recall, parity), runs)
        model_args, reference = shlex.split(recall), shlex.split(recall_model(REFERENCE, ""))
        card = {"checks": check_all(model_args, shlex.split(parity), name)}
    except BaseException:
        if is_new:  # a refused mixer leaves nothing
            os.remove(model + ".py")
        raise
    if is_new:
        say(f"wrote {model}.py: {config.mixer} in the blocks of model.py")
    if card["checks"]["decoding"]:
        say(f"{name}: decoding fails: {card['checks']['decoding']}")
    card |= {"parameters": layer_parameters(model_args), "state": dict.fromkeys(("256", "1024"))}
    if not card["checks"]["decoding"]:
        card["state"] = state_bytes(model_args)
    say(f"{name}: {say_size(card, stored)}")
    make_directory(folder)
    say(f"{name}: cost of a training step at {len(LENGTHS)} lengths")
    card["cost"] = relative_cost(model_args, reference)
    # Where decoding fails its check, the state was not measured.
    states = {}
    if card["state"]["256"] is not None:
        states = sizes_of_state(model, recall, config.model_args)
    card |= measure_runs(recall, parity, states, runs, name)

    for sentence in findings(card, stored):
        say(f"- {sentence}")
    text = page(name, card, stored).encode()
    atomic_write(os.path.join(folder, "card.md"), lambda f: f.write(text))
    draw(os.path.join(folder, "card.png"), name, card, stored)
    write_json(os.path.join(folder, "card.json"), card)
    say(f"wrote {folder}/card.md, card.png, card.json")
    best = max(card["rates"], key=lambda rate: card["rates"][rate] or 0)
    say(f"to train it yourself: python train.py {own_training(model, config, recall, best)}")
    if config.store:
        write_json(STORED, {**stored, name: card})
        say(f"added {name} to {STORED}")
