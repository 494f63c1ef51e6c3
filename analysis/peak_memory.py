"""How long a computation takes, and how much memory it needs beyond what is in use before it."""

import ctypes
import functools
import time

import torch


def peak_memory_of(function, device):
    """Call function() -> the bytes by which memory in use rises (None where nobody counts them),
    and its seconds, without those of the counting.

    On a GPU, it is memory that torch allocates. On Linux, it is the resident memory of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)  # or the clock would not see what still runs
        seconds = seconds_of(function, functools.partial(torch.cuda.synchronize, device))
        return torch.cuda.max_memory_allocated(device) - before, seconds
    if not reset_peak():
        return None, seconds_of(function)
    before = resident_peak()
    seconds = seconds_of(function)
    return resident_peak() - before, seconds


def seconds_of(function, wait=lambda: None):
    """wait: what returns when the device has done all that function() asked it to do."""
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def reset_peak():
    """Let the peak of resident memory begin anew (Linux) -> whether that is possible."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                # Or function() may use again, uncounted, what was freed and not given back.
                libc.malloc_trim(0)
            f.write("5")
    except OSError:
        return False
    return True


def resident_peak():
    """Most bytes of memory that the process has had since reset_peak."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
