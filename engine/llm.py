"""``LLM``: a model, ready to generate, stream and score."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress

from engine.detokenize import released_text
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.prompts import Prompt, PromptReader
from engine.request import CompletionOutput, Delta, Request, RequestOutput, ScoreOutput, Sequence
from engine.sampling import SamplingParams
from models import checkpoint
from models.config import EOS_ID
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder

CPU_CACHE_LIMIT = 4 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompts = Prompt | SequenceOf[Prompt]
Device = Literal["auto", "cpu", "cuda"] | str


class LLM:
    """Generates with one model, on a cache preallocated when it is made.

    Args:
        model: a checkpoint folder.
        tokenizer: a folder to take the tokenizer from instead.
        device: auto is cuda where there is one, else cpu. dtype: auto is float32 on CPU, bfloat16 on CUDA.
        backend: of the kernels: auto, native, torch or reference.
        max_num_seqs: most sequences decoded at once. max_model_len: longest source, and longest prompt plus output.
        max_num_batched_tokens: most prompt tokens in one step.
        kv_cache_memory_bytes: the cache's size; unset, max_num_seqs x max_model_len tokens, 4 GiB at most.
        num_threads: CPU threads, torch's own unless given. seed: of the requests that bring none.

    Raises ValueError (CheckpointError for the folder) for what cannot be served, in one sentence.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: Device = "auto",
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        where = _device(device)
        module, own_tokenizer = checkpoint.load(model, where, _dtype(dtype, where))
        given = Tokenizer.load(Path(tokenizer)) if tokenizer is not None else own_tokenizer
        self._start(module, given, where, **options)

    @classmethod
    def from_model(
        cls,
        model: DecoderOnly | EncoderDecoder,
        tokenizer: Tokenizer | None,
        *,
        device: Device = "auto",
        **options: Any,
    ) -> LLM:
        """An engine around a live model, whose weights it shares; the model is put into evaluation mode."""
        llm = cls.__new__(cls)
        llm._start(model.eval(), tokenizer, _device(device), **options)
        return llm

    def _start(
        self,
        model: DecoderOnly | EncoderDecoder,
        tokenizer: Tokenizer | None,
        device: torch.device,
        *,
        backend: str = "auto",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        block_size: int = 16,
        num_threads: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in [("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len),
                            ("block_size", block_size),
                            ("max_num_batched_tokens", max_num_batched_tokens), ("num_threads", num_threads),
                            ("kv_cache_memory_bytes", kv_cache_memory_bytes)]:  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        config = model.config
        if max_model_len is not None and max_model_len > config.max_seqlen:
            raise ValueError(f"max_model_len {max_model_len} is beyond the model's {config.max_seqlen}")
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.max_model_len = max_model_len or config.max_seqlen
        dtype = next(model.parameters()).dtype
        per_block = KVCache.bytes_per_block(config, block_size, dtype)
        sides = 2 if config.is_encoder_decoder else 1
        blocks_a_sequence = -(-self.max_model_len // block_size) * sides
        memory = kv_cache_memory_bytes or min(max_num_seqs * blocks_a_sequence * per_block, CPU_CACHE_LIMIT)
        if memory < per_block:
            raise ValueError(f"kv_cache_memory_bytes {memory} holds no block of {per_block} bytes")
        cache = KVCache(config, memory // per_block, block_size, max_num_seqs, self.max_model_len, device, dtype)
        self.engine = Engine(
            model, tokenizer, cache, max_num_batched_tokens or max(4096, self.max_model_len),
            None if backend == "auto" else backend, num_threads,
        )  # fmt: skip
        self.reader = PromptReader(config, tokenizer, self.max_model_len)
        self._seeds = random.Random(seed)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Runs every prompt to its end; outputs in the prompts' order. For an encoder-decoder a prompt is the source.

        ``params`` are one for all or one a prompt; ``use_tqdm`` shows a progress bar. Raises ValueError for a bad
        prompt or parameter before anything runs.
        """
        requests = self._queue(prompts, params)
        sequences = sum(len(request.sequences) for request in requests)
        with Progress(disable=not use_tqdm, transient=True) as progress:
            task = progress.add_task("generating", total=sequences)
            while self.engine.has_unfinished_requests():
                finished = sum(sequence.finish_reason is not None for sequence in self.engine.step())
                progress.advance(task, finished)
        return [_output(request) for request in requests]

    def stream(
        self, prompts: Prompts, params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """Yields what each step adds. Text never ends inside a character, nor in what may become a stop string.

        Closing the iterator aborts what is left.
        """
        requests = self._queue(prompts, params)
        index_of = {request.request_id: i for i, request in enumerate(requests)}
        sent: dict[tuple[int, int], tuple[int, int]] = {}
        try:
            while self.engine.has_unfinished_requests():
                for sequence in self.engine.step():
                    if (at := index_of.get(sequence.request.request_id)) is None:
                        continue
                    characters, tokens = sent.get((at, sequence.index), (0, 0))
                    text, output_ids = released_text(sequence), sequence.output_ids
                    sent[at, sequence.index] = (len(text), len(output_ids))
                    yield Delta(at, sequence.index, text[characters:], output_ids[tokens:], sequence.finish_reason)
        finally:
            for request in requests:
                if not request.finished:
                    self.engine.abort(request.request_id)

    def score(self, prompts: SequenceOf[Prompt], targets: SequenceOf[str | SequenceOf[int]]) -> list[ScoreOutput]:
        """The log-probability of each target after its prompt: of an encoder-decoder's whole output (the end token
        included), or of a decoder-only continuation (as given)."""
        if isinstance(prompts, str | Mapping) or isinstance(targets, str) or len(prompts) != len(targets):
            raise ValueError("score takes a list of prompts and a list of as many targets")
        requests = [self._score_request(*pair) for pair in zip(prompts, targets, strict=True)]
        scheduler = self.engine.scheduler
        if scheduler.has_unfinished:
            raise ValueError("score needs an idle engine: finish or abort the requests in it first")
        for request in requests:
            scheduler.add(request)
        results: dict[str, ScoreOutput] = {}
        with torch.inference_mode():
            while scheduler.has_unfinished:
                results |= self._score_step()
        return [results[request.request_id] for request in requests]

    def _score_request(self, prompt: Prompt, target: str | SequenceOf[int]) -> Request:
        request = self.reader.request(self._next_id(), prompt, SamplingParams(max_tokens=None), seed=0)
        if isinstance(target, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer: give targets as token ids")
            target_ids = self.tokenizer.encode_target(target)
        else:
            target_ids = self.reader.checked_ids(target, target=True)
        if self.config.is_encoder_decoder and target_ids[-1:] != [EOS_ID]:
            target_ids = [*target_ids, EOS_ID]
        if not target_ids:
            raise ValueError("a target to score is empty")
        (sequence,) = request.sequences
        sequence.token_ids += target_ids
        if len(sequence.token_ids) > self.max_model_len:
            raise ValueError(
                f"prompt and target are {len(sequence.token_ids)} tokens, beyond max_model_len {self.max_model_len}"
            )
        sequence.max_length = len(sequence.token_ids)
        return request

    def _score_step(self) -> dict[str, ScoreOutput]:
        """Scores the next requests that fit."""
        schedule = self.engine.scheduler.schedule()
        if self.config.is_encoder_decoder:
            self.engine.runner.encode(schedule.requests)
        logprobs = self.engine.runner.target_logprobs(schedule.sequences)
        results, start = {}, 0
        for sequence in schedule.sequences:
            end = start + len(sequence.token_ids)
            target = sequence.output_ids
            rows = logprobs[start + sequence.num_prompt - 1 : end - 1]
            chosen = rows.gather(1, torch.tensor(target)[:, None])[:, 0].tolist()
            results[sequence.request.request_id] = ScoreOutput(target, chosen, sum(chosen))
            sequence.finish("stop")
            start = end
        self.engine.scheduler.retire()
        return results

    def _queue(self, prompts: Prompts, params: SamplingParams | SequenceOf[SamplingParams] | None) -> list[Request]:
        """Checks everything, then queues everything."""
        several = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        each = params if isinstance(params, list | tuple) else [params or SamplingParams()] * len(several)
        if len(each) != len(several):
            raise ValueError(f"{len(several)} prompts but {len(each)} params: give one for all, or one each")
        requests = [self._request(prompt, own) for prompt, own in zip(several, each, strict=True)]
        for request in requests:
            self.engine.scheduler.check(request)
        for request in requests:
            self.engine.add_request(request)
        return requests

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {type(params).__name__}")
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        return self.reader.request(self._next_id(), prompt, params, seed)

    def _next_id(self) -> str:
        return str(next(self.engine.request_ids))


def _output(request: Request) -> RequestOutput:
    return RequestOutput(
        request.request_id, request.prompt, request.prompt_token_ids,
        [_completion(sequence) for sequence in request.sequences], request.finished,
        request.encoder_prompt, request.encoder_prompt_token_ids,
    )  # fmt: skip


def _completion(sequence: Sequence) -> CompletionOutput:
    wanted = sequence.request.params.logprobs is not None
    return CompletionOutput(
        sequence.index, sequence.text, sequence.output_ids, sequence.cumulative_logprob if wanted else None,
        sequence.logprobs if wanted else None, sequence.finish_reason, sequence.stop_reason, sequence.error,
    )  # fmt: skip


def _device(name: Device) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this machine has no CUDA device")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
