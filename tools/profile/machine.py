"""What a figure was measured on: the device, its driver, the versions, the commit."""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Cell = str | int | float | bool | None

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path("/proc/driver/nvidia/version")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory(device: torch.device) -> int:
    """The device's memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _cpu_memory()


def machine_facts() -> dict[str, Cell]:
    """Device, driver where there is one, threads, versions and commit, in the order they are shown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    facts: dict[str, Cell] = {"device": device}
    if torch.cuda.is_available() and (driver := _driver()):
        facts["driver"] = driver
    facts["threads"] = torch.get_num_threads()
    facts |= {name: _version(name) for name in ("torch", "triton", "transformers")}
    return facts | ({"commit": commit} if (commit := _commit()) else {})


def _driver() -> str | None:
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)\s", DRIVER.read_text()) if DRIVER.exists() else None
    return found.group(1) if found else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@functools.cache
def _commit() -> str | None:
    """The commit of this checkout, "-dirty" where files differ from it; none outside of git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpu_memory() -> int:
    found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found.group(1)) << 10 if found else 8 << 30
