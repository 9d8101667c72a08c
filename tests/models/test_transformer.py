"""The two models, in every shape the config allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.linear_cross_entropy
import models.transformer
from kernels.attention_options import AttentionOptions
from models import EncoderDecoder
from models.cache import Angles, Lengths
from tests.conftest import tiny_model

ARCHITECTURES = ["encoder_decoder", "decoder_only"]
SHAPES: list[dict[str, object]] = [
    {"norm": "rmsnorm", "activation": "swiglu", "bias": False},
    {"norm_place": "post", "activation": "gelu"},
    {"activation": "geglu", "positions": "learned"},
    {"positions": "rotary", "tie_embeddings": False},
    {"positions": "none", "activation": "relu", "kv_heads": 4},
    {"positions": "sinusoidal", "target_vocab_size": 50, "activation": "silu"},
    {"head_dim": 10, "activation": "gelu_new"},
]


def run(model: torch.nn.Module, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return model(source, target) if isinstance(model, EncoderDecoder) else model(target)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_runs_forward_and_backward(architecture: str, shape: dict[str, object]) -> None:
    model = tiny_model(architecture, **shape)
    logits = run(model, torch.randint(60, (2, 7)), torch.randint(50, (2, 5)))
    assert logits.shape == (2, 5, model.config.target_vocab_size)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoder_does_not_see_the_future(architecture: str) -> None:
    model = tiny_model(architecture)
    source, target = torch.randint(60, (1, 7)), torch.randint(60, (1, 6))
    changed = target.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 60
    before, after = run(model, source, target), run(model, source, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_padding_a_source_changes_nothing() -> None:
    model = tiny_model("encoder_decoder")
    source, target = torch.randint(4, 60, (1, 5)), torch.randint(60, (1, 4))
    padded = torch.cat((source, torch.randint(60, (1, 3))), dim=1)
    torch.testing.assert_close(model(padded, target, source_lengths=torch.tensor([5])), model(source, target))


def test_packed_and_padded_encoding_agree() -> None:
    model = tiny_model("encoder_decoder")
    assert isinstance(model, EncoderDecoder)
    source = torch.randint(4, 60, (2, 6))
    padded = model.encode(source, Lengths(key_lengths=torch.tensor([6, 3])))
    packed = model.encode(
        torch.cat((source[0], source[1, :3])),
        Lengths(cu_seqlens=torch.tensor([0, 6, 9], dtype=torch.int32), max_seqlen=6),
        positions=torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2]),
    )
    torch.testing.assert_close(packed, torch.cat((padded[0], padded[1, :3])))


def test_a_source_without_lengths_is_whole() -> None:
    model = tiny_model("encoder_decoder")
    assert isinstance(model, EncoderDecoder)
    source = torch.randint(4, 60, (2, 6))
    torch.testing.assert_close(model.encode(source), model.encode(source, Lengths(key_lengths=torch.tensor([6, 6]))))


def test_packed_tokens_without_positions_are_refused() -> None:
    model = tiny_model("encoder_decoder")
    assert isinstance(model, EncoderDecoder)
    packed = Lengths(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), max_seqlen=6)
    with pytest.raises(ValueError, match="packed tokens need positions"):
        model.encode(torch.randint(4, 60, (6,)), packed)
    # Without this the width of the embeddings would be taken for the number of tokens.
    vectors = model.decoder.embedding.embed_tokens(torch.randint(4, 60, (6,)))
    with pytest.raises(ValueError, match="packed tokens need positions"):
        model.decoder(None, inputs_embeds=vectors, cache=NoCache())


class NoCache:
    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, rotary: Angles | None
    ) -> Tensor:
        raise AssertionError("nothing is to be computed")

    def cross_attention(self, layer: int, q: Tensor, options: AttentionOptions) -> Tensor:
        raise AssertionError("nothing is to be computed")


def test_embeddings_may_stand_for_token_ids() -> None:
    decoder = tiny_model("decoder_only")
    target = torch.randint(60, (2, 5))
    torch.testing.assert_close(decoder(inputs_embeds=decoder.decoder.embedding.embed_tokens(target)), decoder(target))
    pair = tiny_model("encoder_decoder")
    assert isinstance(pair, EncoderDecoder)
    embedded = pair.encoder.embedding.embed_tokens(target)
    torch.testing.assert_close(pair(None, target, inputs_embeds=embedded), pair(target, target))


# Also: what a block leaves for the next norm to add makes the same sum as an addition of its own.
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("encoder_decoder", {"norm_place": place}) for place in ("pre", "post", "sandwich")]
    + [("decoder_only", {"parallel_residual": True, "shared_norm": shared}) for shared in (False, True)],
    ids=str,
)
def test_activation_checkpointing_gives_the_same_gradients(architecture: str, shape: dict[str, object]) -> None:
    model = tiny_model(architecture, **shape).train()
    source, target = torch.randint(60, (2, 6)), torch.randint(60, (2, 5))
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        run(model, source, target).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_tied_embeddings_share_one_weight() -> None:
    model = tiny_model("encoder_decoder")
    assert model.lm_head.weight is model.decoder.embedding.tokens.weight is model.encoder.embedding.tokens.weight
    apart = tiny_model("encoder_decoder", target_vocab_size=50)
    assert apart.decoder.embedding.tokens.weight is not apart.encoder.embedding.tokens.weight


HEADS: list[dict[str, object]] = [{}, {"logits_softcap": 5.0, "output_scale": 0.5, "head_bias": True}]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_labels_turn_logits_into_their_loss(
    architecture: str, head: dict[str, object], chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.transformer, "prefers_chunks", lambda hidden, weight: chunked)
    model = tiny_model(architecture, **head)
    inputs = [torch.randint(60, (2, 7)), torch.randint(60, (2, 5))][-1 if architecture == "decoder_only" else 0 :]
    labels = torch.randint(60, (2, 5))
    labels[1, 3:] = -100
    logits = model(*inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    expected = expected + 1e-2 * logits.logsumexp(-1)[labels != -100].square().sum()
    loss = model(*inputs, labels=labels, label_smoothing=0.1, z_loss=1e-2)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for actual, truth in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-5)


def test_a_small_vocabulary_or_a_cpu_keeps_its_logits_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def preferences() -> list[bool]:
        return [models.transformer.prefers_chunks(torch.zeros(2, 8), torch.zeros(n, 8)) for n in (60, 20_000)]

    assert preferences() == [False, False]
    monkeypatch.setattr(kernels.linear_cross_entropy, "choose", lambda *args, **kwargs: "triton")
    assert preferences() == [False, True]
