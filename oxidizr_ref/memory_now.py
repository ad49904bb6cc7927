"""How much memory there is and how much of it this process holds, on the host and on a CUDA device."""

from __future__ import annotations

import sys
from pathlib import Path

from oxidizr_ref.transfers import device_bytes, free_device_bytes


def available_bytes(device: str = "cpu") -> int | None:
    """Memory this process could still get on ``device``, in bytes, where the system tells (Linux, CUDA), else None."""
    if device == "gpu":
        return free_device_bytes()
    limits: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        control_group = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if control_group.isdigit():
            limits.append(int(control_group))
    except OSError:
        pass
    return min(limits, default=None)


def resident_bytes(device: str = "cpu") -> int:
    """Memory this process holds now, in bytes (where only the peak is known: the peak; 0 where nothing is).

    On ``"gpu"``: what CuPy's pool took of the device.
    """
    if device == "gpu":
        return device_bytes()[1]
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    import resource

    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory this process ever held, in bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
