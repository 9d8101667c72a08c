"""How good a model is: loss a token, and exact match of what the engine decodes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from engine import LLM, SamplingParams
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder
from train.data.batching import IGNORED, Batch, Collate
from train.data.corpora import Pair
from train.data.dataset import PairData, TextData
from train.distributed import Distributed


def sum_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy summed over the batch's target tokens, float32."""
    if batch.source_ids is None:
        logits = model(batch.input_ids)
    else:
        logits = model(batch.source_ids, batch.input_ids, source_lengths=batch.source_lengths)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum",
        label_smoothing=label_smoothing,
    )  # fmt: skip


@torch.no_grad()
def validation_loss(
    model: nn.Module, data: PairData | TextData, batch_size: int, distributed: Distributed
) -> float:  # fmt: skip
    """Mean loss a target token over the validation set, its batches shared among the ranks."""
    collate = Collate(data.validation)
    ordered = sorted(range(len(data.validation)), key=lambda i: len(data.validation[i].target))
    loss = tokens = 0.0
    for start in range(batch_size * distributed.rank, len(ordered), batch_size * distributed.world_size):
        batch = collate(ordered[start : start + batch_size]).to(distributed.device)
        loss += float(sum_loss(model, batch))
        tokens += batch.num_target_tokens
    loss, tokens = distributed.sum(loss, tokens)
    return loss / tokens


def decode(
    model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer, pairs: list[Pair], device: torch.device
) -> list[str]:
    """The engine's greedy output for each pair's source."""
    longest = max(len(tokenizer.encode_target(reference)) for pair in pairs for reference in pair.references)
    llm = LLM.from_model(model, tokenizer, device=str(device))
    # Half again the longest reference: room to be wrong in, without letting a young model babble on.
    params = SamplingParams(temperature=0.0, max_tokens=longest * 3 // 2 + 2)
    outputs = llm.generate([pair.source for pair in pairs], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def decoded_exact_match(
    model: DecoderOnly | EncoderDecoder, data: PairData | TextData, samples: int, distributed: Distributed
) -> float:  # fmt: skip
    """The fraction of validation sources whose greedy output equals a reference."""
    pairs = data.validation_pairs[:samples][distributed.rank :: distributed.world_size]
    predictions = decode(model, data.tokenizer, pairs, distributed.device) if pairs else []
    right = sum(p in pair.references for p, pair in zip(predictions, pairs, strict=True))
    right_all, count = distributed.sum(right, len(pairs))
    return right_all / count
