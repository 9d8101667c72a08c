"""Whether what an engine generated on a GPU is what its model would: one pass of the whole model over each output.

The pass has no cache, no graph and no batch, so nothing that those may do wrong is in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from models import DecoderOnly, EncoderDecoder

CHECKED = 4  # outputs of a batch, spread over it
# Standard deviations of the logits, within which rounding may order two tokens either way; a token at random is four
# below the best. Of weights in a few bits, whose products may be rounded otherwise in a batch.
TIES = {"fp32": 1e-3, "bf16": 0.5, "int8": 0.75, "int4": 1.5}


@dataclass(frozen=True)
class Output:
    """One generated output. log_probability: what a beam search says of it; None for greedy tokens."""

    source: list[int] | None
    prompt: list[int]  # the decoder's
    token_ids: list[int]
    log_probability: float | None = None


@dataclass(frozen=True)
class Verdict:
    """same: share of greedy tokens that are the pass's own best, None for beams. worst: in standard deviations of the
    logits, how far a greedy token is below the best, or how far a hypothesis's log-probability a token is off."""

    same: float | None
    worst: float


def check(model: DecoderOnly | EncoderDecoder, outputs: list[Output]) -> Verdict:
    """Judges a few of the outputs, which are all greedy or all hypotheses."""
    step = -(-len(outputs) // CHECKED)
    found = [judge(logits_of(model, output), output) for output in outputs[::step]]
    shares = [verdict.same for verdict in found if verdict.same is not None]
    return Verdict(fmean(shares) if shares else None, max(verdict.worst for verdict in found))


@torch.inference_mode()
def logits_of(model: DecoderOnly | EncoderDecoder, output: Output) -> Tensor:
    """float32 (tokens, vocabulary): those that each token of the output was chosen from."""
    device = next(model.parameters()).device
    target = torch.tensor([[*output.prompt, *output.token_ids[:-1]]], device=device)
    if isinstance(model, EncoderDecoder):
        logits = model(torch.tensor([output.source], device=device), target)
    else:
        logits = model(target)
    return logits[0, len(output.prompt) - 1 :].float()


def judge(logits: Tensor, output: Output) -> Verdict:
    """Logits that are not finite are infinitely wrong."""
    chosen = logits.gather(1, torch.tensor(output.token_ids, device=logits.device)[:, None])[:, 0]
    spread = logits.std(-1)
    if output.log_probability is None:
        below = (logits.amax(-1) - chosen) / spread
        return Verdict(float((below == 0).float().mean()), _finite(float(below.max())))
    likely = float((chosen - logits.logsumexp(-1)).double().sum())
    off = abs(likely - output.log_probability) / len(output.token_ids) / float(spread.mean())
    return Verdict(None, _finite(off))


def _finite(value: float) -> float:
    return value if value == value else float("inf")
