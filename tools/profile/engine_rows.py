"""What ``engine`` shows of its samples: a row for each contender."""

from __future__ import annotations

from tools.profile.engine_field import Case, Contender, Field, Samples
from tools.profile.engine_limit import Limit
from tools.profile.engine_tokens import reference_of, same_share
from tools.profile.machine import Cell

KEYS = ("shape", "precision", "prompt", "beams", "batch", "who")
MEASURE = ("tokens/s", "low", "high")
SPENT = ("linear", "attention", "other", "sampling")
SHARES = tuple(f"% {kind}" for kind in (*SPENT, "Python"))
FIGURES = (*MEASURE, "x best peer", "% of limit", "prefill ms", *SHARES, "% same", "% others")
Seen = dict[Contender, Samples]


def rows_of(case: Case, field: Field, seen: Seen, limit: Limit) -> list[dict[str, Cell]]:
    return [row(case, contender, field, seen, limit) for contender in field.contenders]


def row(case: Case, contender: Contender, field: Field, seen: Seen, limit: Limit) -> dict[str, Cell]:
    """Figures are None where the contender has none; the note then says why."""
    named: dict[str, Cell] = {"shape": case.shape, "precision": contender.precision, "prompt": case.prompt}
    named |= {"beams": case.beams, "batch": case.batch, "who": contender.label}
    least, what = limit.least_seconds(contender.precision, case.batch * case.beams)
    figures: dict[str, Cell] = dict.fromkeys(FIGURES)
    note = field.failed.get(contender, "")
    if contender in seen and seen[contender].decode[0] <= 0:
        note = "a step is lost in what the rounds differ by: no rate"
    elif contender in seen:
        samples, reference = seen[contender], reference_of(seen)
        speed, fastest = tokens_a_second(case, samples), best_peer(case, contender.precision, seen)
        figures["tokens/s"] = speed
        figures["low"], figures["high"] = (generated(case) / seconds for seconds in samples.decode[:0:-1])
        figures["x best peer"] = None if fastest is None else speed / fastest
        figures["% of limit"] = 100 * speed * least / case.batch
        figures["prefill ms"] = samples.prefill * 1e3
        figures |= shares(samples)
        figures["% same"] = None if reference is None else 100 * same_share(samples, seen[reference])
        figures["% others"] = 100 * samples.others
    return {**named, **figures, "limit": what, "note": note}


def shares(samples: Samples) -> dict[str, Cell]:
    """What decoding's time went into; what no kind of work accounts for is Python's."""
    known = [samples.share(kind) for kind in SPENT]
    if None in known:
        return {}
    percent = [100 * (share or 0) for share in known]
    return dict(zip(SHARES, [*percent, 100 - sum(percent)], strict=True))


def generated(case: Case) -> int:
    """Tokens between the first of each sequence and the last; beams are not counted apart."""
    return case.batch * (case.new_tokens - 1)


def tokens_a_second(case: Case, samples: Samples) -> float:
    return generated(case) / samples.decode[0]


def best_peer(case: Case, precision: str, seen: Seen) -> float | None:
    """Of those with the same precision of weights; where none has int4, of those with int8."""
    for wanted in (precision, *(("int8",) if precision == "int4" else ())):
        peers = [
            samples for contender, samples in seen.items()
            if contender.precision == wanted and contender.who != "tandem" and samples.decode[0] > 0
        ]  # fmt: skip
        if peers:
            return max(tokens_a_second(case, samples) for samples in peers)
    return None
