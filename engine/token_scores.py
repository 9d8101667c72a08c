"""The log-probabilities of tokens that are given: a prompt's, or a target's."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import Logprob, Sequence
from kernels.sampling import top_k
from models.tokenizer import Tokenizer


def add_scores(sequence: Sequence, logits: Tensor, tokenizer: Tokenizer | None, num_threads: int | None) -> None:
    """Adds to the request's ``scores`` what logits (rows, vocab) say of the tokens that come next.

    The first row is that of the token before the first that is not scored yet. Where they are not finite, the request
    ends with an error.
    """
    request = sequence.request
    assert request.scored is not None
    first = request.scored[0] + len(request.scores)
    count = min(len(logits), request.scored[1] - first)
    targets = torch.tensor(sequence.token_ids[first : first + count], device=logits.device)
    logprobs = logits[:count].log_softmax(-1)
    chosen = logprobs.gather(1, targets[:, None])
    if not bool(chosen.isfinite().all()):
        request.scores.clear()
        for each in request.sequences:
            each.finish("error", error="the model gives no finite logits")
            each.broken = True
        return
    wanted = request.params.prompt_logprobs
    if wanted is None:
        request.scores += [
            {token_id: Logprob(logprob, 0)}
            for token_id, logprob in zip(targets.tolist(), chosen[:, 0].tolist(), strict=True)
        ]
        return
    ranks = ((logprobs > chosen).sum(1) + 1).tolist()
    values, ids = (
        top_k(logprobs, wanted, num_threads=num_threads) if wanted else (logprobs[:, :0], targets[:, None][:, :0])
    )
    for i, (token_id, logprob) in enumerate(zip(targets.tolist(), chosen[:, 0].tolist(), strict=True)):
        likeliest = enumerate(zip(ids[i].tolist(), values[i].tolist(), strict=True), 1)
        entry = {other: Logprob(value, rank, _name(other, tokenizer)) for rank, (other, value) in likeliest}
        entry.setdefault(token_id, Logprob(logprob, ranks[i], _name(token_id, tokenizer)))
        request.scores.append(entry)


def _name(token_id: int, tokenizer: Tokenizer | None) -> str | None:
    return tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else None
