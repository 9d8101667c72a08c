"""`--budget`: what our kernels take of a GPU, compiled ahead of time, against what budgets.json says they may take.

A budget is what a kernel took when it was last looked at. More than eight registers above it, fewer blocks a
multiprocessor, tensor-core instructions gone, a spill or serialized wgmma that was not there: each is a breach. A spill
needs a "reason" in the file as well, in words.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.profile.budget_cases import AMD_CASES, CASES
from tools.profile.report import Report, Table

BUDGETS = Path(__file__).with_name("budgets.json")
ARCHITECTURES = ("sm80", "sm90")
AMD = "gfx942"
MORE_REGISTERS = 8
SHOWN = ("case", "kernel", "architecture", "warps", "registers", "spills", "shared KB", "occupancy")
TAKEN = ("registers", "spills", "shared", "occupancy", "HGMMA", "HMMA", "UTMALDG", "serialized")

Kernel = dict[str, Any]
Budgets = dict[str, dict[str, Kernel]]  # by architecture and by "case: kernel"


def run(operation: str | None, update: bool, path: Path | None) -> Report:
    """A row a kernel and architecture; breaches are the report's failures. update: write what was found instead."""
    names = [name for name in CASES if operation in (None, name.split("/")[0])]
    if not names:
        known = ", ".join(dict.fromkeys(name.split("/")[0] for name in CASES))
        raise ValueError(f"{operation} has no kernels with a budget: choose from {known}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("--budget needs triton: pip install triton==3.6.0")
    table = Table({"case": names, "kernel": ["attention_backward_queries_kernel"]})
    report = Report("budget", ("case", "kernel", "architecture"), ("registers",) * 3, path=path, table=table)
    report.start()
    recorded = load()
    found: Budgets = {architecture: {} for architecture in ARCHITECTURES}
    for key, kernel in numbered(compile_all(names)):
        report.add(row(kernel))
        if "error" in kernel:
            report.failures.append(f"{key}: {kernel['error']}")
        elif kernel["architecture"] != AMD:
            found[kernel["architecture"]][key] = kernel
    if update and not report.failures:
        save(updated(recorded, found, names))
        recorded = load()
    report.failures += breaches(recorded, found, names)
    return report


def compile_all(names: list[str]) -> Iterator[Kernel]:
    """The kernels of the cases, as they come; a process for each architecture, all at once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there is not asked
    theirs = dict.fromkeys(ARCHITECTURES, names)
    if amd := [name for name in AMD_CASES if name in names]:
        theirs[AMD] = amd
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "tools.profile.budget_worker"]
    workers = {
        architecture: subprocess.Popen([*command, architecture, *cases], stdout=write_end, env=environment)
        for architecture, cases in theirs.items()
    }
    os.close(write_end)
    try:
        with os.fdopen(read_end) as lines:
            yield from map(json.loads, lines)
        for architecture, worker in workers.items():
            if code := worker.wait():
                yield {"case": "all", "architecture": architecture, "error": f"the compiler ended with code {code}"}
    finally:
        for worker in workers.values():
            worker.kill()


def numbered(kernels: Iterator[Kernel]) -> Iterator[tuple[str, Kernel]]:
    """With their keys, "case: kernel"; a number where a case has several of one name."""
    seen: dict[tuple[str, str], int] = {}
    for kernel in kernels:
        key = f"{kernel['case']}: {kernel.setdefault('kernel', 'none')}"
        number = seen[kernel["architecture"], key] = seen.get((kernel["architecture"], key), 0) + 1
        yield key if number == 1 else f"{key} {number}", kernel


def row(kernel: Kernel) -> dict[str, Any]:
    shared = None if "shared" not in kernel else kernel["shared"] / 1024
    cells = kernel | {"shared KB": shared}
    instructions = ("HGMMA", "HMMA", "UTMALDG", "serialized")
    return {name: cells.get(name) for name in (*SHOWN, *instructions)} | {"note": kernel.get("error", "")}


def breaches(recorded: Budgets, found: Budgets, names: list[str]) -> list[str]:
    """What is over its budget, or has none, or is a budget of nothing."""
    lines = []
    for architecture in ARCHITECTURES:
        budgets, kernels = recorded.get(architecture, {}), found.get(architecture, {})
        for key, kernel in kernels.items():
            lines += [f"{architecture} {key}: {text}" for text in breach(kernel, budgets.get(key))]
        for key in budgets.keys() - kernels.keys():
            case = key.split(": ")[0]
            if case in names or case not in CASES:
                lines.append(f"{architecture} {key}: has a budget and was not compiled; --budget --update forgets it")
    return lines


def breach(kernel: Kernel, budget: Kernel | None) -> list[str]:
    if budget is None:
        return ["has no budget; --budget --update gives it one"]
    lines = []
    if kernel["registers"] > budget["registers"] + MORE_REGISTERS:
        lines.append(f"{kernel['registers']} registers, {budget['registers']} in the budget")
    if kernel["spills"] > budget["spills"]:
        lines.append(f"spills {kernel['spills']} bytes, {budget['spills']} in the budget")
    elif kernel["spills"] and not budget.get("reason"):
        lines.append(f"spills {kernel['spills']} bytes, for no reason that budgets.json gives")
    if kernel["occupancy"] < max(budget["occupancy"], 1):
        lines.append(f"{kernel['occupancy']} blocks a multiprocessor, {budget['occupancy']} in the budget")
    if kernel["serialized"] and not budget["serialized"]:
        lines.append("its wgmma became serialized")
    if budget["HGMMA"] and not kernel["HGMMA"]:
        lines.append("its wgmma is gone")
    return lines


def load() -> Budgets:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def updated(recorded: Budgets, found: Budgets, names: list[str]) -> Budgets:
    """What was found, with the reasons recorded for it, and the budgets of cases that were not compiled."""
    budgets: Budgets = {}
    for architecture in ARCHITECTURES:
        before = recorded.get(architecture, {})
        others = CASES.keys() - names
        budgets[architecture] = {key: value for key, value in before.items() if key.split(": ")[0] in others}
        for key, kernel in found.get(architecture, {}).items():
            reason = before.get(key, {}).get("reason", "")
            taken = {name: kernel[name] for name in TAKEN}
            budgets[architecture][key] = taken | ({"reason": reason} if kernel["spills"] else {})
    return budgets


def save(budgets: Budgets) -> None:
    """A kernel a line."""
    parts = []
    for architecture, kernels in budgets.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(kernels[key])}" for key in sorted(kernels))
        parts.append(f"{json.dumps(architecture)}: {{\n{lines}\n}}")
    BUDGETS.write_text("{\n" + ",\n".join(parts) + "\n}\n")
