"""The machine that a result was measured on."""

import importlib
import importlib.util
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def machine(name: str | None = None) -> dict:
    """What a measurement depends on; nothing that names a host or a person."""
    cuda = torch.cuda.is_available()
    cpu = _cpu_model()
    gpu = torch.cuda.get_device_name() if cuda else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # OMP_PROC_BIND leaves this thread one of them
    cores = max(cores, torch.get_num_threads())
    return {
        "name": name or _short_name(cpu, cores, gpu),
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "omp": {key: value for key, value in sorted(os.environ.items()) if key.startswith("OMP_")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        **made(),
    }


def made() -> dict:
    """When a result was made, and of which sources."""
    found = {"date": datetime.now(UTC).date().isoformat(), "commit": None}
    here = Path(__file__).parent
    try:
        run = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
        found["commit"] = subprocess.check_output(run, cwd=here, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # a copy without its history
    return found


def _short_name(cpu: str, cores: int, gpu: str | None) -> str:
    """h200, rtx-4090; cpu-epyc-2c."""
    if gpu:
        words = re.sub(r"NVIDIA|GeForce|Tesla|\(.*?\)", "", gpu).split()
        return "-".join(words).lower()
    known = re.search(r"epyc|xeon|ryzen|threadripper|core|ultra|graviton|neoverse|m\d", cpu.lower())
    return f"cpu-{known[0] if known else platform.machine()}-{cores}c"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(package).__version__
