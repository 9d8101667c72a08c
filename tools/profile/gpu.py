"""`engine --workload gpu`: whole batches on a GPU, beside what others have published, and beside transformers.

All prompts of a batch are there at once, each gets as many tokens as the others, whatever they are, and what counts is
the time from the call to its return, the encoder's and the prompt's included. No row has a figure before a pass of the
whole model has agreed with its tokens. Where there is no GPU it runs on the CPU, for tests.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from engine import LLM, BeamSearchParams, SamplingParams
from models import DecoderOnly, EncoderDecoder
from tools.profile import ceilings
from tools.profile.engine_limit import BYTES, Model
from tools.profile.gpu_check import TIES, Output, Verdict, check
from tools.profile.gpu_peers import PEERS, PeerAnswer, peer_answers
from tools.profile.gpu_shapes import SHAPES, GpuShape, make_model
from tools.profile.machine import Cell, default_device
from tools.profile.measure import reason
from tools.profile.options import Options
from tools.profile.prompts import random_lengths, random_prompts
from tools.profile.report import Report, Table

__all__ = ["OPTIONS", "PEERS", "SECONDS", "SHAPES", "WEIGHTS", "run"]

OPTIONS = ("workload", "batch", "precision", "beams", "rounds", "peer_python")
WEIGHTS = ("bf16", "fp32", "int8", "int4")
SECONDS = 60.0  # for a shape's rows of ours, and as many for its peers'
ROUNDS = 3
STEP_TOKENS = 1 << 16  # of prompts and sources: all of a batch's in one step
KEYS = ("shape", "precision", "beams", "batch", "who")
MEASURE = ("tokens/s", "low", "high")
FIGURES = (
    *MEASURE,
    "published",
    "x published",
    "x ours",
    "first ms",
    "step ms",
    "limit ms",
    "% of limit",
    "% same",
    "worst",
)
Timed = list[tuple[float, float]]  # seconds of one token, and of all; each round's


@dataclass(frozen=True)
class Case:
    """A batch: its prompts or sources, and how many tokens each gets."""

    precision: str
    beams: int
    prompts: list[list[int]]
    new_tokens: int
    published: int | None

    @property
    def batch(self) -> int:
        return len(self.prompts)


def run(options: Options) -> Report:
    device = default_device()
    on_gpu = device.type == "cuda"
    copy = ceilings.copy(device, ceilings.GPU_COPY if on_gpu else ceilings.CPU_COPY)
    limits: dict[str, Cell] = {"copy TB/s": float(f"{copy / 1e12:.3g}")}
    table = Table({"shape": SHAPES, "precision": WEIGHTS, "who": ["transformers compiled"]})
    report = Report("engine gpu", KEYS, MEASURE, path=options.json, ceilings=limits, table=table)
    report.start()
    for name in options.shapes or list(SHAPES):
        Measuring(name, SHAPES[name], device, copy, options, report).measure()
    return report


class Measuring:
    """One shape's rows."""

    def __init__(
        self, name: str, shape: GpuShape, device: torch.device, copy: float, options: Options, report: Report
    ) -> None:
        self.name, self.shape, self.device, self.copy = name, shape, device, copy
        self.options, self.report = options, report
        self.floats = floats_of("", device)
        self.speeds: dict[tuple[str, int, int], float] = {}  # ours, by precision, beams and batch

    def measure(self) -> None:
        deadline = time.perf_counter() + self.options.seconds
        for precision in self.options.precisions or [self.floats]:
            for cases in self.cases(precision):
                self.measure_ours(cases, deadline)
        if self.options.against:
            self.measure_peers()

    def cases(self, precision: str) -> Iterator[list[Case]]:
        """By number of beams, which an engine is made for."""
        for beams in [self.options.beams] if self.options.beams else self.shape.published:
            known = self.shape.published.get(beams, {})
            yield [
                Case(precision, beams, self.prompts(batch), self.shape.tokens(beams), known.get(batch))
                for batch in self.options.batches or known or self.shape.published[1]
            ]

    def prompts(self, batch: int) -> list[list[int]]:
        lengths = random_lengths(batch, *self.shape.lengths)
        return random_prompts(lengths, self.shape.config.vocab_size)

    def measure_ours(self, cases: list[Case], deadline: float) -> None:
        try:
            engine = Ours(self.shape, self.device, cases)
        except Exception as error:  # the rows say why, and other precisions go on
            for case in cases:
                self.fail(case, reason(error))
            return
        for case in cases:
            if time.perf_counter() > deadline:
                self.fail(case, f"no time: the shape's {self.options.seconds:g} s were over")
                continue
            try:
                self.report.add(self.our_row(engine, case, deadline))
            except Exception as error:
                self.fail(case, reason(error))
        del engine
        _free(self.device)

    def our_row(self, engine: Ours, case: Case, deadline: float) -> dict[str, Cell]:
        """The first call, which may compile and capture, is the one whose tokens are judged."""
        verdict = check(engine.model, engine.generate(case, case.new_tokens))
        limit = self.limit(engine.weights, case)
        if not verdict.worst <= TIES[case.precision]:
            self.report.failures.append(f"{self.where(case)}: tokens are off by {verdict.worst:.2g} deviations")
            return self.row(case, "tandem", verdict, None, limit, "wrong")
        rounds: Timed = []
        while len(rounds) < (self.options.rounds or ROUNDS) and (not rounds or time.perf_counter() < deadline):
            rounds.append((engine.seconds(case, 1), engine.seconds(case, case.new_tokens)))
        self.speeds[case.precision, case.beams, case.batch] = median(speeds(case, rounds))
        return self.row(case, "tandem", verdict, rounds, limit)

    def measure_peers(self) -> None:
        """Of greedy search alone, unless beams were asked for: what is compiled takes its time."""
        beams = self.options.beams
        cases = [case for some in self.cases(self.floats) for case in some if case.beams == (beams or 1)]
        asked = {
            "model_type": self.shape.model_type, "values": self.shape.values, "device": self.device.type,
            "seq2seq": self.shape.config.is_encoder_decoder, "rounds": self.options.rounds or ROUNDS,
            "dtype": "bfloat16" if self.floats == "bf16" else "float32",
            "cases": [{"prompts": c.prompts, "new_tokens": c.new_tokens, "beams": c.beams} for c in cases],
        }  # fmt: skip
        _free(self.device)
        for answer in peer_answers(asked, self.options.peer_python, self.options.seconds):
            self.report.add(self.peer_row(cases[answer.case], answer))

    def peer_row(self, case: Case, answer: PeerAnswer) -> dict[str, Cell]:
        return self.row(case, answer.who, None, answer.seconds, None, answer.note)

    def row(
        self, case: Case, who: str, verdict: Verdict | None, rounds: Timed | None, limit: float | None, note: str = ""
    ) -> dict[str, Cell]:  # fmt: skip
        """Figures are None where there are none; the note then says why."""
        cells: dict[str, Cell] = {"shape": self.name, "precision": case.precision, "beams": case.beams}
        cells |= {"batch": case.batch, "who": who, **dict.fromkeys(FIGURES), "published": case.published}
        if rounds:
            found = speeds(case, rounds)
            speed, first = median(found), median(one for one, _ in rounds)
            step = median(whole - one for one, whole in rounds) / max(case.new_tokens - 1, 1)
            cells |= {"tokens/s": speed, "low": min(found), "high": max(found)}
            cells |= {"first ms": first * 1e3, "step ms": step * 1e3}
            if case.published:
                cells["x published"] = speed / case.published
            if ours := self.speeds.get((case.precision, case.beams, case.batch)):
                cells["x ours"] = speed / ours
            if limit is not None:
                cells |= {"limit ms": limit * 1e3, "% of limit": 100 * limit / step if step > 0 else None}
        if verdict is not None:
            cells["% same"] = None if verdict.same is None else 100 * verdict.same
            cells["worst"] = verdict.worst
        return {**cells, "note": note}

    def limit(self, weights: int, case: Case) -> float:
        """Seconds of a step, halfway through the output, that only reads: weights, keys and values, at a copy's rate.

        A source's are read once, however many beams attend to it.
        """
        config = self.shape.config
        assert config.kv_heads is not None and config.head_dim is not None
        given = sum(map(len, case.prompts))
        own = case.batch * case.beams * case.new_tokens // 2
        a_token = 2 * config.depth * config.kv_heads * config.head_dim * BYTES[floats_of(case.precision, self.device)]
        return (weights * BYTES[case.precision] + (given + own) * a_token) / self.copy

    def where(self, case: Case) -> str:
        return f"{self.name}, {case.precision}, {case.beams} beams, batch {case.batch}"

    def fail(self, case: Case, sentence: str) -> None:
        self.report.failures.append(f"{self.where(case)}: {sentence}")
        self.report.add(self.row(case, "tandem", None, None, None, sentence))


class Ours:
    """An engine around a live model, for all batches of one precision and number of beams."""

    def __init__(self, shape: GpuShape, device: torch.device, cases: list[Case]) -> None:
        precision, beams = cases[0].precision, cases[0].beams
        self.model: DecoderOnly | EncoderDecoder = make_model(
            shape, device, ceilings.DTYPES[floats_of(precision, device)]
        )
        _free(device)
        self.weights = Model.of(self.model).weights
        quantized: dict[str, Any] = {"quantization": precision} if precision in ("int8", "int4") else {}
        longest = max(len(prompt) for case in cases for prompt in case.prompts)
        new_tokens = cases[0].new_tokens
        pair = shape.config.is_encoder_decoder
        # The same prompts come round after round: what the cache knows of them would spare work.
        self.llm = LLM.from_model(
            self.model, None, device=device, max_num_seqs=max(case.batch for case in cases) * beams,
            max_model_len=max(longest, new_tokens + 1) if pair else longest + new_tokens,
            max_num_batched_tokens=STEP_TOKENS, enable_prefix_caching=False, **quantized,
        )  # fmt: skip

    def generate(self, case: Case, new_tokens: int) -> list[Output]:
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in case.prompts]
        found = self._beams(prompts, case, new_tokens) if case.beams > 1 else self._greedy(prompts, new_tokens)
        if (lengths := {len(output.token_ids) for output in found}) != {new_tokens}:
            raise ValueError(f"asked for {new_tokens} tokens, got {sorted(lengths)}")
        return found

    def seconds(self, case: Case, new_tokens: int) -> float:
        start = time.perf_counter()
        self.generate(case, new_tokens)  # its tokens are on the CPU, so the GPU has finished
        return time.perf_counter() - start

    def _greedy(self, prompts: list[Any], new_tokens: int) -> list[Output]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        return [
            Output(output.encoder_prompt_token_ids, output.prompt_token_ids, list(output.outputs[0].token_ids))
            for output in self.llm.generate(prompts, params, use_tqdm=False)
        ]

    def _beams(self, prompts: list[Any], case: Case, new_tokens: int) -> list[Output]:
        params = BeamSearchParams(case.beams, max_tokens=new_tokens, ignore_eos=True)
        found = []
        for output in self.llm.beam_search(prompts, params):
            best = output.sequences[0]
            source, prompt = output.encoder_prompt_token_ids, output.prompt_token_ids
            found.append(Output(source, prompt, best.token_ids, best.cum_logprob))
        return found


def floats_of(precision: str, device: torch.device) -> str:
    """What a model is in beside weights of a few bits, its cache too: unless the precision says, the device's usual."""
    return precision if precision in ceilings.DTYPES else ("bf16" if device.type == "cuda" else "fp32")


def speeds(case: Case, rounds: Timed) -> list[float]:
    """Tokens a second of the outputs, or best hypotheses, from the call to its return."""
    return [case.batch * case.new_tokens / whole for _, whole in rounds]


def _free(device: torch.device) -> None:
    """An engine's memory for the next one, which takes what the device says is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
