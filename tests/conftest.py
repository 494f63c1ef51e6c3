"""One thread for every test: two threads beside another busy process can be many times slower than one."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


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
