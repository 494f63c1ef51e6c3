"""One thread for every test: two threads beside another busy process can be many times slower than one."""

import os
import sys
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is shared by forked processes: one killed while it has it would stop them all


def pytest_addoption(parser):
    parser.addoption("--model", action="append", help="test_contract.py: check this model (file or file.Class) only")
    parser.addoption("--data", action="append", help="test_contract.py: check this data file only")


@pytest.fixture
def script():
    """Run a script of the repo as a user would: script("train.py", "--lr", "1") -> CompletedProcess with text."""
    import subprocess

    def run(name, *args, cwd=None, **kwargs):
        command = [sys.executable, os.path.join(ROOT, name), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=300, **kwargs)

    return run


@pytest.fixture
def on_ranks():
    """on_ranks(n, work): run work(rank) in n forked processes with the environment that torchrun would give them.

    -> their exit statuses: what work returned, 1 or 2 for the sentences of RunFailed and ConfigError (the first rank prints
    its one), 99 for a traceback, -9 after kill -9. Forking spares the seconds that importing torch takes.
    """
    import signal
    import socket
    import traceback

    from nanorecall.settings import run_cli

    def child(rank, size, port, work):
        status = 99
        signal.alarm(240)  # a rank that hangs is killed, and its test fails
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
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
