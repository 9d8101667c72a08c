"""How good a model is: loss a token, and exact match of what the engine decodes."""

from __future__ import annotations

import torch
from torch import nn

from engine import LLM, SamplingParams
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder
from train.data.batching import Batch, Collate, lengths_of, plan_validation
from train.data.corpora import Pair
from train.data.dataset import PairData, TextData
from train.distributed import Distributed


def sum_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
    """Cross-entropy summed over the batch's target tokens, float32."""
    # Through forward, which is what DDP and torch.compile wrap.
    options = {"labels": batch.labels, "label_smoothing": label_smoothing, "z_loss": z_loss}
    if batch.source_ids is None:
        return model(batch.input_ids, **options)
    return model(batch.source_ids, batch.input_ids, source_lengths=batch.source_lengths, **options)


@torch.no_grad()
def validation_loss(
    model: DecoderOnly | EncoderDecoder, data: PairData | TextData, batch_size: int, max_tokens: int | None,
    distributed: Distributed,
) -> float:  # fmt: skip
    """Mean loss a target token over the validation set, its batches shared among the ranks."""
    collate = Collate(data.validation, generation=model.generation)
    plan = plan_validation(lengths_of(data.validation), batch_size, max_tokens)
    loss = tokens = 0.0
    for indices in plan[distributed.rank :: distributed.world_size]:
        batch = collate(indices.tolist()).to(distributed.device)
        loss += float(sum_loss(model, batch))
        tokens += batch.num_target_tokens
    loss, tokens = distributed.sum(loss, tokens)
    return loss / tokens


def decode(model: DecoderOnly | EncoderDecoder, tokenizer: Tokenizer, pairs: list[Pair]) -> list[str]:
    """The engine's greedy output for each pair's source."""
    longest = max(len(tokenizer.encode_target(reference)) for pair in pairs for reference in pair.references)
    longest_source = max(len(tokenizer.encode(pair.source)) for pair in pairs)
    # Half again the longest reference: room to be wrong in, without letting a young model babble on.
    params = SamplingParams(temperature=0.0, max_tokens=longest * 3 // 2 + 2)
    room = max(longest_source, 1 + longest * 3 // 2 + 2)
    # So few steps are over before their graphs would be captured.
    llm = LLM.from_model(
        model, tokenizer, max_num_seqs=min(256, len(pairs)), max_model_len=min(room, model.config.max_seqlen),
        enforce_eager=True,
    )  # fmt: skip
    outputs = llm.generate([pair.source for pair in pairs], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def decoded_exact_match(
    model: DecoderOnly | EncoderDecoder, data: PairData | TextData, samples: int, distributed: Distributed
) -> float:  # fmt: skip
    """The fraction of validation sources whose greedy output equals a reference."""
    pairs = data.validation_pairs[:samples][distributed.rank :: distributed.world_size]
    predictions = decode(model, data.tokenizer, pairs) if pairs else []
    right = sum(p in pair.references for p, pair in zip(predictions, pairs, strict=True))
    right_all, count = distributed.sum(right, len(pairs))
    return right_all / count
