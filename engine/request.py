"""A request, its sequences while they run, and what the caller gets back."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from engine.logits_rules import NO_RULES, GenerationRules
from engine.sampling import SamplingParams
from models.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from engine.beam_search import BeamSearch
    from engine.diverse_beams import DiverseBeamSearch
    from engine.grammar_state import GrammarState
    from engine.kv_cache import Row, Source
    from kernels.sampling import SampleResult

FinishReason = Literal["stop", "length", "abort", "error"]


class Logprob(NamedTuple):
    """A token's log-probability under the model and its rules (not penalties or temperature), and its rank, from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.perf_counter``; None: not yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class CompletionOutput:
    """One generated sequence. ``stop_reason`` is the stop string or token that ended it, None for the end token."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """A request and its ``n`` outputs. The encoder's prompt is the source; ``prompt`` is the decoder's own."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True)
class Delta:
    """What a step added to one output of one request: text may lag behind token_ids by an unfinished character."""

    request_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass
class ScoreOutput:
    """The log-probability of each token of a given target, the end token's included, and their sum."""

    token_ids: list[int]
    logprobs: list[float]
    total: float


@dataclass
class EncoderOutput:
    """A source's token ids, and the encoder's hidden states of them: float32 (tokens, dim)."""

    token_ids: list[int]
    hidden: Tensor


@dataclass
class BeamSequence:
    """A hypothesis of a beam search. ``tokens`` is the decoder's prompt with ``token_ids``, those generated, behind it.

    ``score`` is cum_logprob / len(token_ids) ** length_penalty; forced and end tokens are in ``token_ids``, special
    ones not in ``text``. ``finish_reason`` is "stop" for one that ends with an end token, else "length".
    """

    token_ids: list[int]
    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: FinishReason


@dataclass
class BeamSearchOutput:
    """A request and its hypotheses, best first; none where ``error`` says what went wrong."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    encoder_prompt: str | None
    encoder_prompt_token_ids: list[int] | None
    sequences: list[BeamSequence]
    error: str | None = None


@dataclass(eq=False)
class Sequence:
    """One sample of a request while it runs. ``token_ids`` starts with the decoder's prompt."""

    request: Request
    index: int
    token_ids: list[int]
    seed: int
    stream: TextStream | None
    max_length: int  # token_ids never grows beyond it
    num_cached: int = 0  # tokens whose keys and values are in the cache
    row: Row | None = None
    grammar: GrammarState | None = None
    draft: list[int] = field(default_factory=list)  # guesses at the tokens to come, for the next step
    num_pending: int = 0  # tokens that are drawn and have not left the device
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    broken: bool = False  # what it has in the cache is not finite

    @property
    def num_prompt(self) -> int:
        return self.request.num_prompt

    @property
    def num_lacking(self) -> int:
        """How many of its tokens have yet to run."""
        return self.length - self.num_cached

    @property
    def length(self) -> int:
        """How many tokens it has, those that are pending included."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_plain(self) -> bool:
        """Whether its next token is drawn by its request's numbers alone, and for itself alone."""
        request = self.request
        return request.draws_plainly and not self.draft and (request.forked or len(request.sequences) == 1)

    @property
    def ends_by_length(self) -> bool:
        """Whether what is pending brings it to its length limit."""
        return self.num_pending > 0 and self.length >= self.max_length

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def add_logprobs(self, token_id: int, result: SampleResult, row: int, tokenizer: Tokenizer | None) -> None:
        """Keeps what the sampler's ``row`` says of the chosen token and of the likeliest ones."""
        name = lambda i: tokenizer.decode([i], skip_special_tokens=False) if tokenizer else None  # noqa: E731
        wanted = self.request.params.logprobs or 0
        top = zip(result.top_ids[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist(), strict=True)
        entry = {i: Logprob(logprob, rank, name(i)) for rank, (i, logprob) in enumerate(top, 1) if i >= 0}
        chosen = float(result.logprobs[row])
        entry.setdefault(token_id, Logprob(chosen, int(result.ranks[row]), name(token_id)))
        self.logprobs.append(entry)
        self.cumulative_logprob += chosen

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None) -> None:
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error


@dataclass(eq=False)
class Request:
    """What was asked for, checked and tokenised. ``prompt_token_ids`` is the decoder's prompt, start token included.

    ``sequences`` are samples, or the beams of the search ``beams``; ``rules`` bind their tokens. Of the tokens from
    ``scored[0]`` up to ``scored[1]`` the log-probabilities are wanted; a request that ``only_scores`` generates none.
    Those of lower ``priority`` come first, and among equals those that came first, which ``arrival`` counts.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    beams: BeamSearch | DiverseBeamSearch | None = None
    rules: GenerationRules = NO_RULES
    scored: tuple[int, int] | None = None
    only_scores: bool = False
    priority: int = 0
    arrival: int = 0
    scores: list[dict[int, Logprob]] = field(default_factory=list)  # of the tokens that are ``scored``, so far
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.perf_counter()))
    on_change: Callable[[Request], None] | None = None  # called after each step that carried it on, and when it ends
    source: Source | None = None  # while it runs
    counted: bool = False  # in the cache's hits
    forked: bool = False  # all samples or beams have tokens of their own; before, the first stands for all

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt_token_ids)

    @property
    def all_scored(self) -> bool:
        return self.scored is not None and len(self.scores) == self.scored[1] - self.scored[0]

    @property
    def needs_its_tokens(self) -> bool:
        """Whether more than the device has to know its last tokens before the next ones can be drawn."""
        params = self.params
        penalties = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        return bool(
            self.beams is not None
            or penalties
            or params.logits_processors
            or params.structured_outputs
            or self.rules.look_back
            or (self.scored is not None and not self.all_scored)
        )

    @functools.cached_property
    def draws_plainly(self) -> bool:
        """Whether its tokens come of the logits as they are, by numbers of its own."""
        return self.scored is None and not self.needs_its_tokens and self.rules.ask_nothing

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def live(self) -> list[Sequence]:
        """Those that the next step runs."""
        if not self.forked:
            return self.sequences[:1]
        if len(self.sequences) == 1 and self.sequences[0].finish_reason is None:
            return self.sequences
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def has_output(self) -> bool:
        """Whether a token has been generated."""
        if self.beams is not None:
            return self.beams.length > self.num_prompt
        return any(len(sequence.token_ids) > self.num_prompt for sequence in self.sequences)

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)
