"""log_softmax_ against torch's in float64, at its edges, and bit for bit on every CPU path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.sampling import log_softmax_
from tests.kernels.conftest import RunOnPath

INF, NAN = float("inf"), float("nan")


def make_scores(rows: int, vocab: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("vocab", [1, 2, 15, 128, 129, 1000, 50257])
def test_rows_become_torchs_log_softmax(vocab: int, scale: float) -> None:
    scores = make_scores(3, vocab, scale)
    expected = scores.double().log_softmax(-1)
    assert log_softmax_(scores) is scores
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-6)


def test_tokens_that_cannot_be_stay_so_and_rows_that_have_none_become_nan() -> None:
    scores = make_scores(6, 300)
    scores[0, 7:290] = -INF
    scores[1, 299] = NAN
    scores[2, 0] = INF
    scores[3] = -INF
    scores[4] = 3e38
    scores[5, 0], scores[5, 1:] = 3e38, -3e38
    expected = scores.double().log_softmax(-1).float()
    log_softmax_(scores)
    assert scores[1:4].isnan().all()
    torch.testing.assert_close(scores, expected, equal_nan=True)


def test_a_row_does_not_depend_on_others_on_threads_or_on_its_place() -> None:
    scores = make_scores(40, 20_000)  # so large that threads are worth waking
    wide = torch.full((80, 20_100), NAN)
    wide[::2, 50:20_050] = scores
    alone = torch.cat([log_softmax_(row[None].clone()) for row in scores])
    for threads in (1, 2, 5):
        assert torch.equal(log_softmax_(scores.clone(), num_threads=threads), alone)
    log_softmax_(wide[::2, 50:20_050])
    assert torch.equal(wide[::2, 50:20_050], alone)
    assert wide[1::2].isnan().all() and wide[:, :50].isnan().all() and wide[:, 20_050:].isnan().all()


def test_every_cpu_path_gives_the_same_bits(run_on_path: RunOnPath) -> None:
    script = (
        "from kernels.sampling import log_softmax_\n"
        "scores = 5 * torch.randn(4, 5003, generator=torch.Generator().manual_seed(0))\n"
        "print(log_softmax_(scores).tolist())"
    )
    generic = run_on_path(script, "generic")
    assert run_on_path(script, "avx2") == generic
    assert run_on_path(script, "avx512") == generic


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "float32 CPU tensor"),
        (torch.zeros(8), "float32 of shape"),
        (torch.zeros(2, 0), "float32 of shape"),
        (torch.zeros(2, 16)[:, ::2], "contiguous rows"),
        (torch.zeros(1, 8).expand(2, 8), "do not overlap"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^scores must be .*{message}"):
        log_softmax_(scores)


def test_no_rows_and_no_threads() -> None:
    assert log_softmax_(torch.zeros(0, 8)).shape == (0, 8)
    with pytest.raises(ValueError, match="num_threads must be between 1 and 1024, got 0"):
        log_softmax_(torch.zeros(1, 8), num_threads=0)
