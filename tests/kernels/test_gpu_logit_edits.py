"""Triton's edits of scores against the compiled ones, bit for bit, and what both refuse; and its log-softmax."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import TRITON_DEVICE
from kernels.sampling import LogitEdits, edit_logits, log_softmax_
from tests.kernels.conftest import DEVICE
from tests.kernels.test_logit_edits import make_masks, make_scores, random_edits

pytestmark = pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
INF, NAN = float("inf"), float("nan")


def assert_edited_alike(scores: Tensor, edits: LogitEdits) -> Tensor:
    expected, ours = scores.clone(), scores.to(DEVICE, copy=True)
    edit_logits(expected, edits)
    edit_logits(ours, edits, backend="triton")
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    return expected


@pytest.mark.parametrize("vocab", [1, 31, 33, 1000, 5000])
def test_edits_are_those_of_the_cpu(vocab: int) -> None:
    for seed in range(12):
        draw = random.Random(seed)
        rows = draw.randint(1, 5)
        scores = make_scores(rows, vocab, seed)
        for _ in range(draw.choice([0, 0, 3])):
            scores[draw.randrange(rows), draw.randrange(vocab)] = draw.choice([NAN, INF, -INF, 0.0])
        assert_edited_alike(scores, random_edits(draw, rows, vocab))


def test_long_histories_and_many_biases() -> None:
    draw = random.Random(1)
    scores = make_scores(3, 700)
    edits = LogitEdits.build(
        [2, 0],
        repetition_penalty=[1.3, 0.7],
        no_repeat_ngram_size=[2, 3],
        bias=[[(draw.randrange(200), draw.uniform(-3, 3)) for _ in range(300)], {5: -INF}],
        token_ids=[[draw.randrange(9) for _ in range(200)], [draw.randrange(4) for _ in range(150)]],
    )
    result = assert_edited_alike(scores, edits)
    assert torch.equal(result[1], scores[1])


def test_rows_that_lie_apart_and_no_edits() -> None:
    wide = torch.full((6, 100), NAN)
    wide[::2, 20:60] = make_scores(3, 40)
    edits = LogitEdits.build([0, 2], forced=[3, -1], mask=[-1, 0], masks=make_masks(1, 40))
    expected = wide[::2, 20:60].clone()
    edit_logits(expected, edits)
    device = wide.to(DEVICE, copy=True)
    edit_logits(device[::2, 20:60], edits, backend="triton")
    assert torch.equal(device.cpu()[::2, 20:60], expected)
    assert device[1::2].isnan().all() and device[:, :20].isnan().all() and device[:, 60:].isnan().all()
    assert_edited_alike(make_scores(2, 10), LogitEdits.build([]))


def test_a_history_that_grows_in_its_place() -> None:
    table = torch.full((2, 8), 10**9, dtype=torch.int32)
    table[:, :3] = torch.tensor([[1, 2, 1], [3, 3, 4]])
    lengths = torch.tensor([3, 2], dtype=torch.int32)
    edits = LogitEdits.build([0, 1], no_repeat_ngram_size=2, history=(table.view(-1), torch.tensor([0, 8]), lengths))
    assert_edited_alike(make_scores(2, 9), edits)
    table[:, 3] = torch.tensor([5, 3])
    lengths.copy_(torch.tensor([4, 4]))
    edits.forced[0] = 8
    assert_edited_alike(make_scores(2, 9), edits)


@pytest.mark.parametrize(
    "edits",
    [
        {"rows": [0, 5]},
        {"bias": [{}, {40: 1.0}]},
        {"forced": [-1, 40]},
        {"repetition_penalty": 1.1, "token_ids": [[1], [2, 40]]},
        {"no_repeat_ngram_size": 3, "token_ids": [[1], [-1]]},
        {"mask": [-1, 0], "masks": torch.zeros(1, 1, dtype=torch.int32)},
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(edits: dict[str, Any]) -> None:
    scores = make_scores(3, 40)
    made = LogitEdits.build(**{"rows": [0, 2], "forced": [3, -1], **edits})
    with pytest.raises(ValueError, match=r"^\w+ must ") as expected:
        edit_logits(scores.clone(), made)
    ours = scores.to(DEVICE, copy=True)
    with pytest.raises(ValueError, match=r"^\w+ must ") as error:
        edit_logits(ours, made, backend="triton")
    assert str(error.value) == str(expected.value)
    assert torch.equal(ours.cpu(), scores)


def test_arrays_changed_out_of_their_bounds_are_refused_or_not_followed() -> None:
    made = LogitEdits.build(
        [0], repetition_penalty=1.5, bias=[{1: 2.0}], mask=0, masks=make_masks(1, 40), token_ids=[[1, 2]]
    )
    for column, place, value in [
        ("rows", 0, 1), ("bias_ids", 0, 40), ("forced", 0, 40), ("mask", 0, 1), ("history_ids", 1, 40),
    ]:  # fmt: skip
        tensor = getattr(made, column)
        kept = tensor[place].clone()
        tensor[place] = value
        with pytest.raises(ValueError, match=r"^(rows|bias_ids|forced|mask|history_ids) must be"):
            edit_logits(make_scores(1, 40).to(DEVICE), made, backend="triton")
        tensor[place] = kept
    for column, place, value in [
        ("bias_offsets", 0, -(2**63)), ("bias_offsets", 1, 2**63 - 1), ("bias_offsets", 0, 9),
        ("history_starts", 0, -5), ("history_starts", 0, 2**63 - 1), ("history_lengths", 0, 2**31 - 1),
        ("history_lengths", 0, -1), ("forced", 0, -9), ("mask", 0, -9), ("no_repeat_ngram_size", 0, 2**31 - 1),
    ]:  # fmt: skip
        tensor = getattr(made, column)
        kept = tensor[place].clone()
        tensor[place] = value
        assert_edited_alike(make_scores(1, 40), made)
        tensor[place] = kept


@pytest.mark.parametrize("vocab", [1, 15, 129, 5000])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_log_softmax_is_torchs(vocab: int, scale: float) -> None:
    scores = make_scores(3, vocab) * scale
    expected = scores.double().log_softmax(-1)
    ours = scores.to(DEVICE, copy=True)
    assert log_softmax_(ours, backend="triton") is ours
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-6, atol=2e-6)


def test_log_softmax_of_what_cannot_be() -> None:
    scores = make_scores(6, 300)
    scores[0, 7:290] = -INF
    scores[1, 299] = NAN
    scores[2, 0] = INF
    scores[3] = -INF
    scores[4] = 3e38
    scores[5, 0], scores[5, 1:] = 3e38, -3e38
    wide = torch.full((12, 400), NAN)
    wide[::2, 50:350] = scores
    device = wide.to(DEVICE)
    log_softmax_(device[::2, 50:350], backend="triton")
    torch.testing.assert_close(device[::2, 50:350].cpu(), log_softmax_(scores), rtol=1e-6, atol=2e-6, equal_nan=True)
    assert device[1::2].isnan().all() and device[:, :50].isnan().all() and device[:, 350:].isnan().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((2, 8), torch.bfloat16, "must be of float32"), ((8,), torch.float32, "shape"), ((2, 0), torch.float32, "shape")],
)
def test_scores_that_do_not_fit_are_refused(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    scores = torch.zeros(shape, dtype=dtype, device=DEVICE)
    for call in (
        lambda: log_softmax_(scores, backend="triton"),
        lambda: edit_logits(scores, LogitEdits.build([0]), backend="triton"),
    ):
        with pytest.raises(ValueError, match=f"^scores .*{message}"):
            call()
    with pytest.raises(ValueError, match="do not overlap"):
        log_softmax_(torch.zeros(1, 8, device=DEVICE).expand(2, 8), backend="triton")
