"""`attention --tune`: times candidates for the entries of attention's table of tiles, and keeps what is faster.

An entry is measured on one shape of 16k tokens with all of its features, through the launchers that users run. A
candidate has to give the outputs of the entry's own config, spill next to nothing, and beat it by more than noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE
from tools.profile.attention_shapes import TOKENS
from tools.profile.budget import launches
from tools.profile.machine import Cell
from tools.profile.options import known
from tools.profile.report import Report
from tools.profile.timing import CudaClock, summary

if TYPE_CHECKING:
    from kernels.gpu.attention import Call
    from kernels.gpu.attention_configs import Config, Entry

SEQLEN, WIDTH = 4096, 2048  # of the shape; heads x head_dim
GAIN = 1.02  # a smaller one is noise
MAX_SPILLS = 64  # bytes a thread
SAMPLES = 15

Run = Callable[[], tuple[Tensor, ...]]


def run(names: list[str], seconds: float, path: Path | None) -> Report:
    """A row a candidate; the table is saved after each entry. Raises ValueError for unknown names, or without a GPU."""
    if TRITON_DEVICE != "cuda":
        raise ValueError("--tune needs a GPU that the kernels run on")
    from kernels.gpu import attention_configs as configs
    from kernels.gpu.target import architecture

    table = configs.entries()
    mine = {label(entry): entry for entry in table if entry.architecture == architecture()}
    wanted = known("entry", names, mine) or list(mine)
    report = Report("tune", ("entry", "config"), path=path)
    report.start()
    clock = CudaClock()
    for name in wanted:
        best = tuned(mine[name], table, clock, seconds, report)
        table = [best if label(entry) == name and entry.architecture == best.architecture else entry for entry in table]
        configs.save(table)
    return report


def label(entry: Entry) -> str:
    """What an entry is called on the command line: "keys-64", "forward-128-fp32-bias-softcap"."""
    precision = [] if entry.bits == 16 else ["fp32"]
    return "-".join([entry.kernel, str(entry.head_dim), *precision, *entry.features])


def tuned(entry: Entry, table: list[Entry], clock: CudaClock, seconds: float, report: Report) -> Entry:
    """The entry with the fastest config that is right."""
    from kernels.gpu import attention_configs as configs

    torch.manual_seed(0)
    call = representative(entry)
    best, least, expected = entry, float("inf"), None
    for config in candidates(entry):
        trial = replace(entry, config=config)
        row: dict[str, Cell] = {"entry": label(entry), "config": shown(config), **dict.fromkeys(("ms", "20%", "80%"))}
        with configs.instead_of([trial if other is entry else other for other in table]):
            try:
                with launches() as kernels:
                    found = call()
                spills = max((kernel.n_spills for kernel in kernels), default=0)
                expected = found if expected is None else expected
                row["note"] = refusal(found, expected, spills, config != entry.config)
                if not row["note"]:
                    sample = clock.sampler(call)
                    timing = summary([sample() for _ in range(max(SAMPLES, round(seconds / 0.02)))])
                    row |= {"ms": timing.median * 1e3, "20%": timing.low * 1e3, "80%": timing.high * 1e3}
                    if timing.median * GAIN < least:
                        best, least = trial, timing.median
            except Exception as error:  # too many resources, or what the compiler cannot do: one candidate less
                row["note"] = type(error).__name__
        report.add(row)
        if expected is None:  # nothing to hold the others against
            report.failures.append(f"{label(entry)}: its own config does not run: {row['note']}")
            break
    return best


def refusal(found: Iterable[Tensor], expected: Iterable[Tensor], spills: int, is_new: bool) -> str:
    """Why a candidate is not timed; nothing where it is."""
    if is_new and spills > MAX_SPILLS:
        return f"spills {spills} bytes"
    for mine, true in zip(found, expected, strict=True):
        if true.numel() and not torch.allclose(
            mine.float(), true.float(), rtol=0.05, atol=0.02 * float(true.float().abs().max())
        ):
            return "wrong"
    return ""


def candidates(entry: Entry) -> list[Config]:
    """The entry's own config first, then all others worth a try."""
    from kernels.gpu.attention_configs import Config

    narrow, wide = ((64, 128), (32, 64, 128)) if entry.bits == 16 else ((32, 64), (16, 32, 64))
    m, n = (wide, narrow) if entry.kernel == "keys" else (narrow, wide)
    one_pass = (False, True) if entry.kernel == "keys" and not entry.features else (False,)
    others = [
        Config(*sizes, descriptors=entry.config.descriptors)
        for sizes in itertools.product(m, n, (4, 8), (2, 3), (1, 2), one_pass)
        if entry.kernel != "bias_gradient" or sizes[0] == sizes[1]
    ]
    return [entry.config, *(config for config in others if config != entry.config)]


def shown(config: Config) -> str:
    values = asdict(config)
    sizes = "{block_m}x{block_n}, {warps} warps, {stages}/{near_stages} stages".format(**values)
    return sizes + ", one pass" * config.one_pass


def representative(entry: Entry) -> Run:
    """A causal call of the entry's head_dim and features: forward, or the part of backward that the kernel is in."""
    from kernels.gpu import attention as gpu

    dtype = torch.bfloat16 if entry.bits == 16 else torch.float32
    heads = max(1, WIDTH // entry.head_dim)
    shape = (TOKENS // SEQLEN, SEQLEN, heads, entry.head_dim)
    q, k, v, above = (torch.randn(shape, device=TRITON_DEVICE).to(dtype) for _ in range(4))
    call = call_of(entry, heads)
    if entry.kernel == "forward":
        return lambda: gpu.forward(q, k, v, *call)
    out, lse = gpu.forward(q, k, v, *call)
    wants_table = call.table is not None
    deterministic = entry.kernel != "keys"  # one pass has no kernel for the queries
    arguments: tuple[Any, ...] = (above, None, q, k, v, out, lse, *call, deterministic, wants_table, False)
    return lambda: gpu.backward(*arguments)


def call_of(entry: Entry, heads: int) -> Call:
    from kernels.gpu import attention as gpu

    biased = "bias" in entry.features or entry.kernel == "bias_gradient"
    return gpu.Call(
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        key_lengths=None,
        slopes=None,
        table=torch.randn(heads, 257, device=TRITON_DEVICE) if biased else None,
        bias=None,
        seed=torch.zeros(1, dtype=torch.int64, device=TRITON_DEVICE) if "dropout" in entry.features else None,
        max_seqlen_q=SEQLEN,
        max_seqlen_k=SEQLEN,
        causal=True,
        scale=entry.head_dim**-0.5,
        window=None,
        softcap=0.0,
        dropout_p=0.1 if "dropout" in entry.features else 0.0,
    )
