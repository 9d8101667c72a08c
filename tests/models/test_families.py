"""Every family gives transformers' own logits, from its files as transformers 4 and 5 write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import models
from models.transformer import EncoderDecoder
from tests.models.small_families import CASES, ENCODER_DECODERS, build, rewrite_as_4x, save

LENGTHS = [97, 1, 40, 2, 63]


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, version: int, tmp_path: Path) -> None:
    theirs = build(name)
    save(theirs, tmp_path)
    if version == 4:
        rewrite_as_4x(tmp_path)
    ours, tokenizer = models.load(tmp_path)
    assert tokenizer is None
    torch.manual_seed(1)
    source, target = torch.randint(4, 900, (len(LENGTHS), 97)), torch.randint(4, 900, (len(LENGTHS), 31))
    lengths = torch.tensor(LENGTHS)
    with torch.inference_mode():
        if name in ENCODER_DECODERS:
            assert isinstance(ours, EncoderDecoder)
            got = ours(source, target, source_lengths=lengths)
            wanted = seq2seq_logits(theirs, source, target, lengths)
        else:
            got, wanted = ours(source), theirs(input_ids=source, attention_mask=real(lengths)).logits
            got, wanted = got[real(lengths).bool()], wanted[real(lengths).bool()]
    assert wanted.std() > 0.1, "the reference's logits are too flat to tell models apart"
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def real(lengths: Tensor) -> Tensor:
    return (torch.arange(97)[None, :] < lengths[:, None]).long()


def seq2seq_logits(model: transformers.PreTrainedModel, source: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    return model(input_ids=source, attention_mask=real(lengths), decoder_input_ids=target).logits
