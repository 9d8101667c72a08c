"""Operations in plain PyTorch, written to be read and to be tested against, not to be fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.sampling import SamplingBatch


def sampling_probabilities(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What `kernels.sampling.sample` draws from: float64 (rows, vocab), 0 for tokens filtered out."""
    return torch.stack([_row_probabilities(row.double(), batch, i) for i, row in enumerate(logits)])


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Token ids, int64 (rows,): the first whose cumulative probability exceeds the row's random number."""
    cumulative = sampling_probabilities(logits, batch).cumsum(-1)
    numbers = [uniform(int(s), int(p)) for s, p in zip(batch.seed, batch.position, strict=True)]
    targets = torch.tensor(numbers, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from Philox4x32-10 (Salmon et al. 2011) with key `seed` and counter `position`."""
    low = 0xFFFFFFFF
    seed %= 1 << 64
    key = [seed & low, seed >> 32]
    counter = [position & low, position >> 32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return ((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


def _row_probabilities(logits: Tensor, batch: SamplingBatch, row: int) -> Tensor:
    logits = _penalised(logits, batch, row)
    temperature = float(batch.temperature[row])
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.shape[0]).double()
    probabilities = (logits / temperature).softmax(-1)
    probabilities[probabilities < float(batch.min_p[row]) * probabilities.max()] = 0
    # A stable sort puts the lower id first among equals.
    by_logit = torch.sort(logits, descending=True, stable=True).indices
    if top_k := int(batch.top_k[row]):
        probabilities[by_logit[top_k:]] = 0
    if (top_p := float(batch.top_p[row])) < 1:
        mass = probabilities[by_logit].cumsum(-1) / probabilities.sum()
        probabilities[by_logit[1:][mass[:-1] >= top_p]] = 0
    return probabilities / probabilities.sum()


def _penalised(logits: Tensor, batch: SamplingBatch, row: int) -> Tensor:
    start, end = batch.history_offsets[row : row + 2].tolist()
    history = batch.history_ids[start:end].long()
    output = history[int(batch.prompt_lengths[row]) :]
    penalty = batch.repetition_penalty[row]
    repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
    seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, history, True)
    count = torch.bincount(output, minlength=logits.shape[0])
    logits = torch.where(seen, repeated, logits)
    return logits - batch.frequency_penalty[row] * count - batch.presence_penalty[row] * (count > 0)
