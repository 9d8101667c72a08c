"""Run by ``tools.profile engine --workload serving`` in a process of its own: serves requests as they arrive.

As ``engine_worker``, whose contenders these are, with one more kind of line: {"prompts": [[...], ...], "lengths": [12,
...], "arrivals": [0.0, ...], "batch": 8}, each prompt arriving so many seconds from now and getting so many tokens. It
is answered by the seconds at which each had its first and its last token, and the tokens. Without a batch requests join
and leave as they come (ours alone); with one so many are run together until the longest is through.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Traffic:
    """Requests on their way, and what each has got so far; times are seconds since the first could have come."""

    def __init__(self, prompts: list[list[int]], lengths: list[int], arrivals: list[float]) -> None:
        self.prompts, self.lengths, self.arrivals = prompts, lengths, arrivals
        self.coming = deque(range(len(prompts)))
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.tokens: dict[int, list[int]] = {}
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def arrived(self, most: int) -> list[int]:
        """The next requests, ``most`` at most, of those that are there by now."""
        now = self.now()
        found: list[int] = []
        while self.coming and len(found) < most and self.arrivals[self.coming[0]] <= now:
            found.append(self.coming.popleft())
        return found

    def rest(self) -> None:
        """Until the next one is there."""
        if self.coming:
            time.sleep(max(0.0, self.arrivals[self.coming[0]] - self.now()))

    def note(self, request: int, tokens: list[int]) -> None:
        """A request has these tokens by now; those beyond its length are not its own."""
        now, length = self.now(), self.lengths[request]
        if tokens:
            self.first.setdefault(request, now)
        if len(tokens) >= length and request not in self.last:
            self.last[request], self.tokens[request] = now, tokens[:length]

    def answer(self) -> dict[str, Any]:
        everyone = range(len(self.prompts))
        if missing := [i for i in everyone if i not in self.last]:
            raise ValueError(f"request {missing[0]} did not get its {self.lengths[missing[0]]} tokens")
        return {name: [getattr(self, name)[i] for i in everyone] for name in ("first", "last", "tokens")}


def serve_continuously(llm: Any, traffic: Traffic) -> None:
    while traffic.coming or llm.has_unfinished_requests():
        for request in traffic.arrived(len(traffic.coming)):
            submit(llm, traffic, request, traffic.lengths[request])
        if llm.has_unfinished_requests():
            step(llm, traffic)
        else:
            traffic.rest()


def serve_batches(contender: Any, traffic: Traffic, most: int) -> None:
    """As servers without continuous batching do.

    Ours streams meanwhile, and CTranslate2's lets those go that have their tokens; transformers' come all at once.
    """
    while traffic.coming:
        if not (batch := traffic.arrived(most)):
            traffic.rest()
            continue
        longest = max(traffic.lengths[request] for request in batch)
        if hasattr(contender, "llm"):
            run_batch(contender.llm, traffic, batch, longest)
            continue
        if hasattr(contender, "generate_each"):
            stream_batch(contender, traffic, batch)
            continue
        rows = contender.generate([traffic.prompts[request] for request in batch], longest)
        for request, row in zip(batch, rows, strict=True):
            traffic.note(request, row)


def run_batch(llm: Any, traffic: Traffic, batch: Iterable[int], length: int) -> None:
    for request in batch:
        submit(llm, traffic, request, length)
    while llm.has_unfinished_requests():
        step(llm, traffic)


def stream_batch(contender: Any, traffic: Traffic, batch: list[int]) -> None:
    rows: list[list[int]] = [[] for _ in batch]

    def got(place: int, token: int) -> None:
        rows[place].append(token)
        traffic.note(batch[place], rows[place])

    prompts, lengths = ([of[request] for request in batch] for of in (traffic.prompts, traffic.lengths))
    contender.generate_each(prompts, lengths, got)


def submit(llm: Any, traffic: Traffic, request: int, length: int) -> None:
    from engine import SamplingParams

    greedy = SamplingParams(temperature=0, min_tokens=length, max_tokens=length)
    llm.add_request(str(request), {"prompt_token_ids": traffic.prompts[request]}, greedy)


def step(llm: Any, traffic: Traffic) -> None:
    for output in llm.step():
        traffic.note(int(output.request_id), output.outputs[0].token_ids)


def main(*arguments: str) -> None:
    # The last place to look: our names stand in the way of nobody's.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from tools.profile import engine_worker

    def answer(contender: Any, request: dict[str, Any]) -> dict[str, Any]:
        if "arrivals" not in request:
            return engine_worker.answer(contender, request)
        traffic = Traffic(request["prompts"], request["lengths"], request["arrivals"])
        if request["batch"] is None:
            serve_continuously(contender.llm, traffic)
        else:
            serve_batches(contender, traffic, request["batch"])
        return traffic.answer()

    engine_worker.main(*arguments, answer=answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
