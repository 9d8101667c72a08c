"""Drawing the next token of each row of logits on the CPU: one pass over a row, no sort of the vocabulary.

The parameters mean what they mean in vLLM. The random number is an argument in disguise: a pure function of
a row's `(seed, position)` by Philox4x32-10, so its token does not depend on its neighbours, its place or the
threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate

import torch
from torch import Tensor

from kernels.extension import _C

Number = int | float
Column = Number | Sequence[Number] | Tensor
TokenLists = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """The parameters of `sample`, one entry a row, as contiguous CPU tensors of exactly these dtypes.

    Raises ValueError, naming the field and what is allowed, when made; later calls check nothing again.
    Values may be changed in place (`batch.position.add_(1)`); to change a length, make a new batch.
    """

    temperature: Tensor  # float32 (rows,), >= 0; 0 takes the largest logit after penalties
    top_k: Tensor  # int32 (rows,); 0 is off
    top_p: Tensor  # float32 (rows,) in (0, 1]; 1 is off
    min_p: Tensor  # float32 (rows,) in [0, 1]; 0 is off
    repetition_penalty: Tensor  # float32 (rows,), > 0; 1 is off
    presence_penalty: Tensor  # float32 (rows,) in [-2, 2]; 0 is off
    frequency_penalty: Tensor  # float32 (rows,) in [-2, 2]; 0 is off
    seed: Tensor  # int64 (rows,)
    position: Tensor  # int64 (rows,), >= 0
    num_logprobs: Tensor  # int32 (rows,); -1 none, 0 the chosen token's, n also those of the n largest logits
    history_ids: Tensor  # int32 (total,): each row's prompt, then its output; read only for rows with a penalty
    history_offsets: Tensor  # int64 (rows + 1,): where each row's history starts
    prompt_lengths: Tensor  # int32 (rows,): how much of a row's history is prompt
    _native: _C.SamplingBatch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in columns.items():
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                raise ValueError(f"{name} must be a CPU tensor, got {_describe(value)}")
        native = _C.SamplingBatch({name: value.numpy() for name, value in columns.items()})
        object.__setattr__(self, "_native", native)

    @classmethod
    def build(
        cls,
        rows: int,
        *,
        temperature: Column = 1.0,
        top_k: Column = 0,
        top_p: Column = 1.0,
        min_p: Column = 0.0,
        repetition_penalty: Column = 1.0,
        presence_penalty: Column = 0.0,
        frequency_penalty: Column = 0.0,
        seed: Column = 0,
        position: Column = 0,
        num_logprobs: Column = -1,
        prompt_ids: TokenLists | None = None,
        output_ids: TokenLists | None = None,
    ) -> SamplingBatch:
        """A batch from one number for all rows or one a row; the history from one list of token ids a row."""
        return cls(
            temperature=_column("temperature", temperature, rows, torch.float32),
            top_k=_column("top_k", top_k, rows, torch.int32),
            top_p=_column("top_p", top_p, rows, torch.float32),
            min_p=_column("min_p", min_p, rows, torch.float32),
            repetition_penalty=_column("repetition_penalty", repetition_penalty, rows, torch.float32),
            presence_penalty=_column("presence_penalty", presence_penalty, rows, torch.float32),
            frequency_penalty=_column("frequency_penalty", frequency_penalty, rows, torch.float32),
            seed=_column("seed", seed, rows, torch.int64),
            position=_column("position", position, rows, torch.int64),
            num_logprobs=_column("num_logprobs", num_logprobs, rows, torch.int32),
            **_history(rows, prompt_ids, output_ids),
        )

    @property
    def rows(self) -> int:
        return self.temperature.shape[0]


@dataclass(slots=True)
class SampleResult:
    """What `sample` returns; n is the largest `num_logprobs` of the batch, or 0."""

    token_ids: Tensor  # int64 (rows,); -1 where there is an error
    logprobs: Tensor  # float32 (rows,), of the raw logits; NaN where not asked for
    ranks: Tensor  # int32 (rows,), of the chosen token by raw logit, from 1; 0 where not asked for
    top_logprobs: Tensor  # float32 (rows, n), largest first; -inf behind a row's own n
    top_ids: Tensor  # int64 (rows, n); -1 behind a row's own n
    errors: list[str | None]  # a sentence where a row could not be sampled


def sample(logits: Tensor, batch: SamplingBatch, *, num_threads: int | None = None) -> SampleResult:
    """Draw one token a row from float32 CPU `logits` (rows, vocab), contiguous along the vocabulary.

    In this order: penalties, temperature (below 1e-5 is greedy), min_p, top_k, top_p over what is left, one
    draw in order of token id. Equal logits count as ordered by token id, lowest first: `top_k` keeps exactly
    k. Tokens less likely than exp(-87) times the best are never drawn. The logits are not written.

    A row with NaN, +inf or nothing but -inf, or with a token of its history outside the vocabulary, gets a
    sentence in `errors`; other rows do not notice. `num_threads` defaults to torch's. Every CPU path (see
    csrc/row_kernels.h) gives the same bits. Raises ValueError if shapes, dtype or device do not fit.
    """
    if logits.dtype is not torch.float32 or logits.device.type != "cpu":
        raise ValueError(f"logits must be a float32 CPU tensor, got {_describe(logits)}")
    threads = torch.get_num_threads() if num_threads is None else num_threads
    *arrays, errors = _C.sample(logits.detach().numpy(), batch._native, threads)
    token_ids, logprobs, ranks, top_logprobs, top_ids = map(torch.from_numpy, arrays)
    return SampleResult(token_ids, logprobs, ranks, top_logprobs, top_ids, errors)


def top_k(scores: Tensor, k: int, *, num_threads: int | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row of float32 CPU `scores` (rows, vocab), and their ids: float32 and int64 (rows, k).

    Largest first, lower ids first among equals. What is -inf is left out: behind the others are -inf and id 0. A row
    with NaN or +inf gets NaN. Raises ValueError if shapes, dtype or device do not fit, or for k outside [1, vocab].
    """
    if scores.dtype is not torch.float32 or scores.device.type != "cpu":
        raise ValueError(f"scores must be a float32 CPU tensor, got {_describe(scores)}")
    threads = torch.get_num_threads() if num_threads is None else num_threads
    values, ids = _C.top_k(scores.detach().numpy(), k, threads)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} on {value.device}"
    return type(value).__name__


def _column(name: str, value: Column, rows: int, dtype: torch.dtype) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
        fits = tensor.dtype is not torch.bool and (dtype.is_floating_point or not tensor.is_floating_point())
        if fits and tensor.ndim <= 1:
            return tensor.to("cpu", dtype).expand(rows).contiguous()
    except (TypeError, ValueError, RuntimeError):
        pass
    kind = "number" if dtype.is_floating_point else "integer"
    raise ValueError(f"{name} must be one {kind} or {rows} of them, got {value!r}")


def _history(rows: int, prompt_ids: TokenLists | None, output_ids: TokenLists | None) -> dict[str, Tensor]:
    prompts = [()] * rows if prompt_ids is None else prompt_ids
    outputs = [()] * rows if output_ids is None else output_ids
    if len(prompts) != rows or len(outputs) != rows:
        raise ValueError(f"prompt_ids and output_ids must hold {rows} lists, got {len(prompts)} and {len(outputs)}")
    histories = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    return {
        "history_ids": torch.tensor([i for ids in histories for i in ids], dtype=torch.int32),
        "history_offsets": torch.tensor([0, *accumulate(map(len, histories))], dtype=torch.int64),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
