"""How long a computation takes, and how much memory it needs beyond what is in use before it."""

import ctypes

import torch

from nanorecall.distributed import now


def peak_memory_of(function, device):
    """Call function() -> the bytes by which memory in use rises, and the seconds that it takes.

    On a GPU, it is memory that torch allocates. On Linux, it is the resident memory of the process.
    Elsewhere it is not counted: None. The seconds are without those of the counting.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = seconds_of(function, device)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    if not reset_peak():
        return None, seconds_of(function, device)
    before = resident_peak()
    seconds = seconds_of(function, device)
    return resident_peak() - before, seconds


def seconds_of(function, device):
    """Call function() -> the seconds until the device has done all that it asks for."""
    start = now(device)
    function()
    return now(device) - start


def reset_peak():
    """Reset the peak of resident memory (Linux) -> whether that is possible."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                # Memory that was freed but not given back could be used without being counted.
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
