"""What a number has to carry with it: the command, the versions and the machine that made it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

_PACKAGES = ("torch", "torchvision", "numpy", "datasets", "timm")


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Command, time, versions, machine, in plain types; ``device`` is where the work is done, by default the CPU."""
    is_cuda = device is not None and device.type == "cuda"
    return {
        "command": shlex.join(["normfree", *sys.argv[1:]]),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "normfree": __version__,
        "versions": versions(),
        "machine": processor(),
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu" if device is None else device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python, and of those installed packages on which numbers may depend."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name where the system tells it, otherwise its architecture."""
    lines = _lines(Path("/proc/cpuinfo"))
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
