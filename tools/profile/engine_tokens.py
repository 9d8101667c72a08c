"""Whether the contenders of ``engine`` generated the same tokens, and what is wrong where our own did not."""

from __future__ import annotations

from typing import Any

from tools.profile.engine_field import Case, Contender, Field, Samples

TIE = 1e-4  # standard deviations of the logits, within which float32 may order two tokens either way
WORSE = 1e-3  # what a beam search's log-probability may fall short of transformers'
TRUSTED = Contender("transformers", "fp32")
Seen = dict[Contender, Samples]


def reference_of(seen: Seen) -> Contender | None:
    """Whose tokens the others' are held against: transformers', else our own in float32."""
    return next((contender for contender in (TRUSTED, Contender("tandem", "fp32")) if contender in seen), None)


def same_share(samples: Samples, reference: Samples) -> float:
    pairs = [
        pair
        for ours, theirs in zip(samples.tokens, reference.tokens, strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def failures_of(case: Case, field: Field, seen: Seen) -> list[str]:
    """Our contenders that have no figures, and float32 tokens of ours that transformers would not have chosen."""
    where = f"{case.shape}, batch {case.batch}"
    failed = [
        f"{where}: tandem {contender.precision} could not be measured: {sentence}"
        for contender, sentence in field.failed.items()
        if contender.who == "tandem"
    ]
    ours = Contender("tandem", "fp32")
    if ours not in seen or TRUSTED not in seen or not (reason := difference(case, field, seen[ours], seen[TRUSTED])):
        return failed
    return [*failed, f"{where}: tandem's float32 tokens are not transformers': {reason}"]


def difference(case: Case, field: Field, ours: Samples, theirs: Samples) -> str:
    """Why rows of ours that differ are no matter of rounding, in transformers' own judgement; empty where they are."""
    rows = [i for i, row in enumerate(ours.tokens) if row != theirs.tokens[i]]
    if not rows:
        return ""
    judged = [_judged(field, [s.prompts[i] for i in rows], [s.tokens[i] for i in rows]) for s in (ours, theirs)]
    if case.beams == 1:
        below = max(row["below"] for row in judged[0])
        return "" if below <= TIE else f"one is {below:.2g} standard deviations below the best logit"
    short = max(b["log-probability"] - a["log-probability"] for a, b in zip(*judged, strict=True))
    return "" if short <= WORSE else f"a hypothesis is less likely by {short:.2g} in log-probability"


def _judged(field: Field, prompts: list[list[int]], rows: list[list[int]]) -> list[dict[str, Any]]:
    answer = field.ask(TRUSTED, prompts=prompts, check=rows)
    if answer is None:
        raise ValueError(f"transformers could not judge our tokens: {field.failed[TRUSTED]}")
    return answer["check"]
