"""Drawing the next token of each row of logits: one pass over a row, no sort of the vocabulary.

On the CPU by csrc/sampling.h, on a GPU by kernels/gpu/sampling.py. The parameters mean what they mean in vLLM. The
random number is an argument in disguise: a pure function of a row's `(seed, position)` by Philox4x32-10, so its token
does not depend on its neighbours, its place or the threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE
from kernels.columns import (
    Column,
    TokenLists,
    arrays,
    check_rows,
    column,
    floats,
    histories,
    on_device_of,
    pick,
    thread_count,
)
from kernels.extension import _C
from kernels.logit_edits import LogitEdits, edit_logits

if TRITON_DEVICE is not None:
    from kernels.gpu import log_softmax as gpu_log_softmax
    from kernels.gpu import sampling as gpu
    from kernels.gpu import top_tokens as gpu_top_tokens
    from kernels.gpu.sampling_columns import upload

__all__ = [
    "Draw",
    "LogitEdits",
    "SampleResult",
    "SamplingBatch",
    "draw",
    "edit_logits",
    "log_softmax_",
    "sample",
    "top_k",
]


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """The parameters of `sample`, one entry a row, as contiguous CPU tensors of exactly these dtypes.

    Raises ValueError, naming the field and what is allowed, when made; later calls check nothing again.
    Values may be changed in place between calls (`batch.position.add_(1)`); for other rows, make a new batch. A row's
    history is a place in a buffer that the caller may fill as the row grows: `batch.history_lengths.add_(1)`.
    """

    temperature: Tensor  # float32 (rows,), >= 0; 0 takes the largest logit after penalties
    top_k: Tensor  # int32 (rows,); 0 is off
    top_p: Tensor  # float32 (rows,) in (0, 1]; 1 is off
    min_p: Tensor  # float32 (rows,) in [0, 1]; 0 is off
    typical_p: Tensor  # float32 (rows,) in (0, 1]; 1 is off
    repetition_penalty: Tensor  # float32 (rows,), > 0; 1 is off
    presence_penalty: Tensor  # float32 (rows,) in [-2, 2]; 0 is off
    frequency_penalty: Tensor  # float32 (rows,) in [-2, 2]; 0 is off
    seed: Tensor  # int64 (rows,)
    position: Tensor  # int64 (rows,), >= 0
    num_logprobs: Tensor  # int32 (rows,); -1 none, 0 the chosen token's, n also those of the n largest logits
    history_ids: Tensor  # int32 (any,): holds every row's prompt and, right behind, its output
    history_starts: Tensor  # int64 (rows,): where in history_ids a row's begin
    history_lengths: Tensor  # int32 (rows,): how many they are; read, like all of history, only with a penalty
    prompt_lengths: Tensor  # int32 (rows,): how many of them are prompt
    _native: _C.SamplingBatch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = arrays({f.name: getattr(self, f.name) for f in fields(self) if f.init})
        object.__setattr__(self, "_native", _C.SamplingBatch(columns))

    @classmethod
    def build(
        cls,
        rows: int,
        *,
        temperature: Column = 1.0,
        top_k: Column = 0,
        top_p: Column = 1.0,
        min_p: Column = 0.0,
        typical_p: Column = 1.0,
        repetition_penalty: Column = 1.0,
        presence_penalty: Column = 0.0,
        frequency_penalty: Column = 0.0,
        seed: Column = 0,
        position: Column = 0,
        num_logprobs: Column = -1,
        prompt_ids: TokenLists | None = None,
        output_ids: TokenLists | None = None,
        history: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> SamplingBatch:
        """A batch from one number for all rows or one a row; the history from one list of token ids a row.

        Or `history`: the tensors `history_ids`, `history_starts`, `history_lengths` and `prompt_lengths`, kept as they
        are and not copied.
        """
        if history is None:
            places = _history(rows, prompt_ids, output_ids)
        elif prompt_ids is None and output_ids is None:
            names = ("history_ids", "history_starts", "history_lengths", "prompt_lengths")
            places = dict(zip(names, history, strict=True))
        else:
            raise ValueError("history must come alone, without prompt_ids and output_ids")
        return cls(
            temperature=column("temperature", temperature, rows, torch.float32),
            top_k=column("top_k", top_k, rows, torch.int32),
            top_p=column("top_p", top_p, rows, torch.float32),
            min_p=column("min_p", min_p, rows, torch.float32),
            typical_p=column("typical_p", typical_p, rows, torch.float32),
            repetition_penalty=column("repetition_penalty", repetition_penalty, rows, torch.float32),
            presence_penalty=column("presence_penalty", presence_penalty, rows, torch.float32),
            frequency_penalty=column("frequency_penalty", frequency_penalty, rows, torch.float32),
            seed=column("seed", seed, rows, torch.int64),
            position=column("position", position, rows, torch.int64),
            num_logprobs=column("num_logprobs", num_logprobs, rows, torch.int32),
            **places,
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


def sample(
    logits: Tensor, batch: SamplingBatch, *, num_threads: int | None = None, backend: str | None = None
) -> SampleResult:
    """Draw one token a row from `logits` (rows, vocab), contiguous along the vocabulary; the result is on the CPU.

    In this order: penalties, temperature (below 1e-5 is greedy), min_p, top_k, top_p over what is left,
    typical_p over what is left then (locally typical sampling, Meister et al. 2022: the tokens whose surprise is
    closest to the entropy), one draw in order of token id. Equals count as ordered by token id, lowest first: `top_k`
    keeps exactly k. Tokens less likely than exp(-87) times the best are never drawn. The logits are not written.

    A row with NaN, +inf or nothing but -inf, or with a token of its history outside the vocabulary, gets a
    sentence in `errors`; other rows do not notice. Backends: `native` (float32 on a CPU; every CPU path, see
    csrc/row_kernels.h, gives the same bits; `num_threads` defaults to torch's) and `triton` (float32, bfloat16 or
    float16 on a GPU; the same tokens but for rounding at a boundary). Raises ValueError if shapes, dtype or device do
    not fit, or for a backend that is missing.
    """
    if pick("sample", logits, backend) == "triton":
        return _draw_on_gpu(logits, batch).result()
    *results, errors = _C.sample(floats("logits", logits), batch._native, thread_count(num_threads))
    token_ids, logprobs, ranks, top_logprobs, top_ids = map(torch.from_numpy, results)
    return SampleResult(token_ids, logprobs, ranks, top_logprobs, top_ids, errors)


class Draw:
    """A draw on its way: ``token_ids``, int64 (rows,), are where the logits are, and ``result`` waits for all of it."""

    def __init__(self, token_ids: Tensor, result: Callable[[], SampleResult]) -> None:
        self.token_ids, self.result = token_ids, result


def draw(logits: Tensor, batch: SamplingBatch, *, num_threads: int | None = None, backend: str | None = None) -> Draw:
    """As `sample`, but on a GPU nothing is waited for before its result is asked for."""
    if pick("sample", logits, backend) == "triton":
        return _draw_on_gpu(logits, batch)
    result = sample(logits, batch, num_threads=num_threads, backend="native")
    return Draw(result.token_ids, lambda: result)


def top_k(
    scores: Tensor, k: int, *, num_threads: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `scores` (rows, vocab), and their ids: float32 and int64 (rows, k), where the
    scores are.

    Largest first, lower ids first among equals. What is -inf is left out: behind the others are -inf and id 0. A row
    with NaN or +inf gets NaN. Backends and dtypes as in `sample`. Raises ValueError if shapes, dtype or device do not
    fit, or for k outside [1, vocab].
    """
    if pick("top_k", scores, backend) == "triton":
        check_rows("scores", scores)
        if not 1 <= k <= scores.shape[1]:
            raise ValueError(f"k must be from 1 to {scores.shape[1]}, got {k}")
        with on_device_of(scores):
            return gpu_top_tokens.top_k(scores, k)
    values, ids = _C.top_k(floats("scores", scores), k, thread_count(num_threads))
    return torch.from_numpy(values), torch.from_numpy(ids)


def log_softmax_(scores: Tensor, *, num_threads: int | None = None, backend: str | None = None) -> Tensor:
    """Makes each row of `scores` (rows, vocab) its log-softmax in place, and returns `scores`.

    A row with NaN or +inf, or of nothing but -inf, becomes NaN throughout. What bounds it is an exponential a token. A
    row's bits depend on nothing but the row. Backends as in `sample`; float32 on both. Raises ValueError if shapes,
    strides, dtype or device do not fit. Autograd is not told.
    """
    if pick("log_softmax_", scores, backend) == "triton":
        check_rows("scores", scores, writes=True)
        with on_device_of(scores):
            gpu_log_softmax.log_softmax_(scores.detach())
        return scores
    _C.log_softmax(floats("scores", scores), thread_count(num_threads))
    return scores


def _draw_on_gpu(logits: Tensor, batch: SamplingBatch) -> Draw:
    check_rows("logits", logits)
    if logits.shape[0] != batch.rows:
        raise ValueError(f"logits must have the {batch.rows} rows of the batch, got {logits.shape[0]}")
    with on_device_of(logits), torch.no_grad():
        return draw_of(gpu.launch(logits, upload(batch, logits.device)))


def draw_of(drawn: gpu.DeviceResult) -> Draw:
    """What has been launched on the current device."""
    download = drawn.download()

    def result() -> SampleResult:
        found = download()
        errors = [gpu.MESSAGES[code] for code in found.errors.tolist()]
        return SampleResult(found.token_ids, found.logprobs, found.ranks, found.top_logprobs, found.top_ids, errors)

    return Draw(drawn.token_ids, result)


def _history(rows: int, prompt_ids: TokenLists | None, output_ids: TokenLists | None) -> dict[str, Tensor]:
    prompts = [()] * rows if prompt_ids is None else prompt_ids
    outputs = [()] * rows if output_ids is None else output_ids
    if len(prompts) != rows or len(outputs) != rows:
        raise ValueError(f"prompt_ids and output_ids must hold {rows} lists, got {len(prompts)} and {len(outputs)}")
    return {
        **histories([*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
