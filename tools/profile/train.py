"""`train`: one eager training step, forward to optimizer, of our models and of the same shapes in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import TransformerConfig, build_model
from tools.profile.ceilings import product
from tools.profile.machine import Cell, default_device
from tools.profile.options import Options
from tools.profile.report import Report
from tools.profile.timing import Timing, interleaved
from train.data.batching import Batch
from train.evaluation import sum_loss
from train.optimizer import build_optimizer

VOCAB, DIM, HEADS = 256, 256, 8
GEMM = 2048


@dataclass(frozen=True)
class Shape:
    """Layers of the decoder and, for a pair, of the encoder; tokens of a sequence on either side. No dropout."""

    depth: int
    seqlen: int = 32
    encoder_depth: int = 0


SHAPES = {"encoder_decoder": Shape(6, encoder_depth=6), "decoder_only": Shape(4)}
PEERS = ("transformers",)
BATCHES = [64]
KEYS = ("shape", "batch", "who")
OPTIONS = ("batch",)

Loss = Callable[[Batch], Tensor]
Step = Callable[[], Tensor]


def run(options: Options) -> Report:
    device = default_device()
    torch.set_flush_denormal(True)
    limit = product(device, torch.float32, GEMM)
    report = Report("train", KEYS, ("step ms", "20%", "80%"), path=options.json)
    report.ceilings = {"fp32 product GFLOP/s": round(limit / 1e9)}
    report.start()
    for name in options.shapes or list(SHAPES):
        for size in options.batches or BATCHES:
            shape = SHAPES[name]
            batch = make_batch(shape, size).to(device)
            losses = {"tandem": ours(shape, device)}
            if "transformers" in (options.against or ()):
                losses["transformers"] = theirs(shape, device)
            steps = {who: stepper(model, loss, batch) for who, (model, loss) in losses.items()}
            report.failures += [f"{name}: {who} does not learn" for who, step in steps.items() if not learns(step)]
            timings = interleaved(steps, seconds=max(options.seconds, 1.0) * 8)
            for who, timing in timings.items():
                report.add(row(name, who, shape, size, timing, timings, limit))
    return report


def row(
    name: str, who: str, shape: Shape, size: int, timing: Timing, timings: dict[str, Timing], limit: float
) -> dict[str, Cell]:
    tokens = size * shape.seqlen * (2 if shape.encoder_depth else 1)
    rate = flops(shape, size) / timing.median
    return {
        "shape": f"{name} {shape.encoder_depth or ''}{'+' if shape.encoder_depth else ''}{shape.depth} x {DIM}",
        "batch": f"{size} x {shape.seqlen}",
        "who": who,
        "step ms": timing.median * 1e3,
        "20%": timing.low * 1e3,
        "80%": timing.high * 1e3,
        "tokens/s": tokens / timing.median,
        "GFLOP/s": rate / 1e9,
        "% of limit": 100 * rate / limit,
        "times tandem": timing.median / timings["tandem"].median,
    }


def make_batch(shape: Shape, size: int) -> Batch:
    torch.manual_seed(0)
    source, target = (torch.randint(4, VOCAB, (size, shape.seqlen)) for _ in range(2))
    labels = torch.randint(4, VOCAB, (size, shape.seqlen))
    return Batch(source if shape.encoder_depth else None, None, target, labels, labels.numel(), labels.numel())


def ours(shape: Shape, device: torch.device) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    config = TransformerConfig(
        "encoder_decoder" if shape.encoder_depth else "decoder_only", VOCAB, dim=DIM, heads=HEADS, depth=shape.depth,
        encoder_depth=shape.encoder_depth or None, positions="sinusoidal" if shape.encoder_depth else "rotary",
        activation="gelu" if shape.encoder_depth else "gelu_new",
    )  # fmt: skip
    model = build_model(config).to(device)
    return model, lambda batch: sum_loss(model, batch) / batch.num_target_tokens


def theirs(shape: Shape, device: torch.device) -> tuple[nn.Module, Loss]:
    """Marian or GPT-2 with the same widths, depths, activation and vocabulary, their attention through SDPA."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model: nn.Module = _marian(transformers, shape) if shape.encoder_depth else _gpt2(transformers, shape)
    model.to(device).train()
    if shape.encoder_depth:
        return model, lambda b: _cross_entropy(model(input_ids=b.source_ids, decoder_input_ids=b.input_ids).logits, b)
    return model, lambda b: _cross_entropy(model(input_ids=b.input_ids).logits, b)


def _gpt2(transformers: Any, shape: Shape) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=DIM, n_layer=shape.depth, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, n_positions=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _marian(transformers: Any, shape: Shape) -> Any:
    config = transformers.MarianConfig(
        vocab_size=VOCAB, d_model=DIM, encoder_layers=shape.encoder_depth, decoder_layers=shape.depth,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * DIM, decoder_ffn_dim=4 * DIM,
        dropout=0.0, activation_function="gelu", pad_token_id=0, eos_token_id=2, decoder_start_token_id=1,
        max_position_embeddings=512,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def stepper(model: nn.Module, loss_of: Loss, batch: Batch) -> Step:
    """A whole update: gradients, clipping, fused AdamW. Returns the loss, read back so that a GPU has finished."""
    optimizer = build_optimizer(model, 1e-3, 0.01, (0.9, 0.98))

    def step() -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().cpu()

    return step


def learns(step: Step) -> bool:
    """Whether a few steps on one batch bring its loss down."""
    losses = [float(step()) for _ in range(6)]
    return losses[-1] < losses[0]


def flops(shape: Shape, size: int) -> float:
    """FLOPs of a step: 6 a weight and token in linear layers, 12 a score and channel in attention."""
    block = 12 * DIM * DIM
    tokens = size * shape.seqlen
    weights = shape.depth * block + VOCAB * DIM
    attentions = shape.depth
    if shape.encoder_depth:
        weights += shape.encoder_depth * block + shape.depth * 4 * DIM * DIM
        attentions = shape.encoder_depth + 2 * shape.depth
    return 6.0 * weights * tokens + 12.0 * attentions * tokens * shape.seqlen * DIM
