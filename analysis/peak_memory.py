"""How much memory a computation needs at most, beyond what is in use when it begins."""

import ctypes

import torch


def peak_memory_of(function, device):
    """Call function() -> the bytes by which memory in use rises; None where nobody counts them.

    On a GPU, it is memory that torch allocates. On Linux, it is the resident memory of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if not reset_peak():
        function()
        return None
    before = resident_peak()
    function()
    return resident_peak() - before


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
