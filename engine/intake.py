"""From what callers give, prompts and parameters, one or many, to checked requests with ids and seeds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

from engine.beam_params import BeamSearchParams
from engine.beam_requests import search_request
from engine.defaults import default_params
from engine.prompts import Prompt, PromptReader
from engine.request import Request
from engine.sampling import SamplingParams

Prompts = Prompt | SequenceOf[Prompt]
Params = SamplingParams | SequenceOf[SamplingParams] | None
AnyParams = SamplingParams | BeamSearchParams | None
T = TypeVar("T")


class Intake:
    """Makes requests for one model. Every method raises ValueError, in one sentence, for what cannot run."""

    def __init__(self, reader: PromptReader, seed: int) -> None:
        self.reader = reader
        self._seeds, self._ids = random.Random(seed), itertools.count()

    def request(
        self, prompt: Prompt, params: AnyParams, *, beams: bool = True, request_id: str | None = None,
        draws_seed: bool = True,
    ) -> Request:  # fmt: skip
        """One prompt's request; without ``params`` the model's own, a search only where ``beams``.

        Where the request brings no seed it draws one, unless it is only looked at.
        """
        if params is None:
            params = self.defaults_after(self.prompt_length(prompt), beams)
        if not isinstance(request_id, str | None):
            raise ValueError(f"request_id must be a string, got {request_id!r:.80}")
        request_id = self.next_id() if request_id is None else request_id
        if isinstance(params, BeamSearchParams):
            return search_request(self.reader, request_id, prompt, params)
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {type(params).__name__}")
        seed = params.seed
        if seed is None or seed == -1:
            seed = self._seeds.getrandbits(63) if draws_seed else 0
        return self.reader.request(request_id, prompt, params, seed)

    def requests(self, prompts: Prompts, params: Params | BeamSearchParams, beams: bool = False) -> list[Request]:
        return [self.request(prompt, own, beams=beams) for prompt, own in paired(prompts, params)]

    def searches(
        self, prompts: Prompts, params: BeamSearchParams | SequenceOf[BeamSearchParams] | None
    ) -> list[Request]:
        if params is None:
            requests = self.requests(prompts, None, beams=True)
            if any(request.beams is None for request in requests):
                raise ValueError("the model's generation_config.json asks for no beams: give BeamSearchParams")
            return requests
        return [search_request(self.reader, self.next_id(), prompt, own) for prompt, own in paired(prompts, params)]

    def defaults_after(self, length: int, beams: bool) -> SamplingParams | BeamSearchParams:
        """The model's own parameters, for a decoder's prompt of so many tokens."""
        generation = self.reader.generation
        if generation.unsupported:
            raise ValueError(
                f"the model's generation_config.json asks for {generation.unsupported[0]}, which is not supported: "
                "give params instead"
            )
        return default_params(generation.defaults, length, beams)

    def prompt_length(self, prompt: Prompt) -> int:
        """How many tokens the decoder's prompt has, start token included."""
        return self.reader.request("", prompt, SamplingParams(), seed=0).num_prompt

    def next_id(self) -> str:
        """An id that callers are unlikely to choose themselves."""
        return f"auto-{next(self._ids)}"


def paired(prompts: Prompts, params: T | SequenceOf[T]) -> list[tuple[Prompt, T]]:
    """Every prompt with its parameters, which are one for all or one a prompt. Raises ValueError for anything else."""
    if not isinstance(prompts, str | Mapping | SequenceOf):
        raise ValueError(f"prompts are a prompt or a list of them, got {prompts!r:.80}")
    several = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    each = params if isinstance(params, list | tuple) else [params] * len(several)
    if len(each) != len(several):
        raise ValueError(f"{len(several)} prompts but {len(each)} params: give one for all, or one each")
    return list(zip(several, each, strict=True))
