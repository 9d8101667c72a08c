"""The Triton sampler against the compiled one on the same logits: tokens, supports, distributions, and its edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.backend import TRITON_DEVICE
from kernels.sampling import SampleResult, SamplingBatch, sample, top_k
from tests.kernels.conftest import DEVICE, poison

pytestmark = pytest.mark.skipif(TRITON_DEVICE != DEVICE, reason="Triton does not run here")
INF, NAN = float("inf"), float("nan")
ALL = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}


def make_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def on_both(logits: Tensor, batch: SamplingBatch) -> tuple[SampleResult, SampleResult]:
    """What the device makes of float32, bfloat16 or float16 logits, and what the CPU makes of the same numbers."""
    return sample(logits.to(DEVICE), batch, backend="triton"), sample(logits.float(), batch, backend="native")


def assert_alike(ours: SampleResult, native: SampleResult) -> None:
    assert ours.errors == native.errors
    assert torch.equal(ours.token_ids, native.token_ids)
    assert torch.equal(ours.ranks, native.ranks)
    assert torch.equal(ours.top_ids, native.top_ids)
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(native, name), rtol=1e-5, atol=1e-5, equal_nan=True)


def draws(logits: Tensor, rows: int, seed: int = 11, **params: Any) -> Tensor:
    """Tokens drawn from one row of logits at as many positions."""
    batch = SamplingBatch.build(rows, seed=seed, position=range(rows), **params)
    result = sample(logits.to(DEVICE).expand(rows, -1), batch, backend="triton")
    assert result.errors == [None] * rows
    return result.token_ids


def support(logits: Tensor, **params: Any) -> Tensor:
    return reference.sampling_probabilities(logits[None], SamplingBatch.build(1, **params))[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 63, 64, 129, 50257])
def test_greedy_tokens_are_those_of_the_cpu(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    logits = make_logits(3, vocab).to(dtype)  # half precision has ties
    logits[1, : vocab - 1] = -INF
    logits[2] = 0
    ours, native = on_both(logits, SamplingBatch.build(3, temperature=0))
    assert_alike(ours, native)
    assert ours.token_ids.tolist() == [int(logits[0].argmax()), vocab - 1, 0]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 1},
        {"top_k": 17, "temperature": 1.5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"typical_p": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"top_k": 700},
        ALL,
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [40, 5003])
def test_tokens_are_those_of_the_cpu(vocab: int, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    rows = 12
    batch = SamplingBatch.build(rows, seed=range(rows), position=range(3, 3 + rows), **params)
    for scale in (0.3, 3.0):
        ours, native = on_both(make_logits(rows, vocab, scale=scale), batch)
        assert ours.errors == native.errors
        assert (ours.token_ids != native.token_ids).sum() <= 1  # by rounding at a boundary


@pytest.mark.parametrize(
    ("temperature", "k", "top_p", "min_p", "typical_p"),
    [*itertools.product((0.7, 1.5), (0, 5), (1.0, 0.5), (0.0, 0.2), (1.0,)), (1.0, 12, 0.9, 0.0, 0.4)],
)
def test_draws_stay_within_what_the_filters_keep(
    temperature: float, k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    params = {"temperature": temperature, "top_k": k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    logits = make_logits(1, 20, scale=1.0)[0]
    kept = support(logits, **params)
    tokens = draws(logits, 40, **params)
    assert kept[tokens].all()
    assert len(tokens.unique()) > 0.3 * kept.sum()


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.3}, {"top_k": 6, "top_p": 0.5}, {"typical_p": 0.4}], ids=str
)
@pytest.mark.parametrize("vocab", [10, 300, 4500])
def test_filters_keep_the_lower_ids_of_equal_logits(vocab: int, params: dict[str, Any]) -> None:
    logits = torch.full((vocab,), 1.25)
    logits[vocab // 2 :: 7] = 1.0
    kept = support(logits, **params)
    tokens = draws(logits, 12, **params)
    assert kept[tokens].all()
    batch = SamplingBatch.build(12, seed=11, position=range(12), **params)
    assert torch.equal(tokens, sample(logits.expand(12, -1), batch).token_ids)


def test_draws_follow_the_distribution() -> None:
    from scipy.stats import chisquare

    rows = 500
    logits = make_logits(1, 8, seed=3, scale=1.0)[0]
    counts = torch.bincount(draws(logits, rows, temperature=1.3), minlength=8)
    expected = (logits.double() / 1.3).softmax(-1) * rows
    assert chisquare(counts, expected).pvalue > 1e-4


def test_the_sign_of_zero_is_no_difference() -> None:
    logits = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0])
    assert set(draws(logits, 30, top_k=2).tolist()) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("vocab", [50, 700])
def test_penalties_are_those_of_the_cpu(vocab: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    rows = 8
    generator = torch.Generator().manual_seed(vocab)
    outputs = [torch.randint(0, 12, (row * 11,), generator=generator).tolist() for row in range(rows)]
    batch = SamplingBatch.build(
        rows,
        temperature=temperature,
        seed=range(rows),
        top_k=[0, 20] * 4,
        repetition_penalty=[1.0, 1.5, 0.8, 1.3] * 2,
        presence_penalty=[0.0, 0.7, -0.5, 0.0] * 2,
        frequency_penalty=[0.0, 0.0, 0.4, -0.7] * 2,
        num_logprobs=[-1, 0, 3, 1] * 2,
        prompt_ids=[[row, 3, 3, vocab - 1] for row in range(rows)],
        output_ids=outputs,
    )
    logits = make_logits(rows, vocab, scale=1.0)
    before = logits.clone()
    assert_alike(*on_both(logits, batch))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab", [1, 7, 130, 5001])
def test_logprobs_and_ranks_are_those_of_the_cpu(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    rows = 6
    logits = make_logits(rows, vocab)
    logits[0, : vocab // 2] = -INF
    logits[1] = logits[1].round()
    batch = SamplingBatch.build(rows, seed=range(rows), temperature=1.2, num_logprobs=[5, 2, 0, -1, 5, 1])
    assert_alike(*on_both(logits, batch))


def test_very_many_logprobs_are_in_order() -> None:
    logits = make_logits(2, 1000).round()  # many ties
    result = sample(logits.to(DEVICE), SamplingBatch.build(2, num_logprobs=300), backend="triton")
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(result.top_ids, order[:, :300])


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_a_row_that_cannot_be_sampled_is_an_error_of_its_own(params: dict[str, Any]) -> None:
    logits = make_logits(6, 300)
    logits[1, 64] = NAN
    logits[2, 299] = INF
    logits[3] = -INF
    logits[5, 0] = -NAN
    batch = SamplingBatch.build(
        6, seed=range(6), num_logprobs=1, presence_penalty=1.0, output_ids=[[3], [], [1], [2], [300], [7]], **params
    )
    ours, native = on_both(logits, batch)
    assert_alike(ours, native)
    assert [e and e.split()[-1] for e in ours.errors] == [None, "NaN", "+inf", "-inf", "vocabulary", "NaN"]


@pytest.mark.parametrize(
    "params",
    [{"top_p": 1e-6}, {"top_p": 1e-6, "typical_p": 0.5}, {"min_p": 1.0}, {"temperature": 2e-5}, {"temperature": 1e-38}],
    ids=str,
)
def test_one_token_left_is_always_that_token(params: dict[str, Any]) -> None:
    logits = make_logits(8, 400)
    result = sample(logits.to(DEVICE), SamplingBatch.build(8, seed=range(8), **params), backend="triton")
    assert torch.equal(result.token_ids, logits.argmax(-1))


def test_extreme_logits_are_sampled() -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38, -INF], [-3e38, -3.3e38, -3e38, -3e38], [1.0, -INF, 0.5, 0.9]])
    for params in ({"top_p": 0.9}, {"temperature": 1e38}, {"typical_p": 0.9}, {"top_k": 10_000}):
        batch = SamplingBatch.build(3, num_logprobs=0, seed=5, **params)
        ours, native = on_both(logits, batch)
        assert ours.errors == native.errors == [None] * 3
        assert torch.equal(ours.token_ids, native.token_ids)


def test_rows_may_be_strided_and_a_row_does_not_depend_on_its_batch() -> None:
    logits = make_logits(6, 700)
    wide = torch.full((12, 1000), NAN)
    wide[::2, 100:800] = logits
    params = {"top_k": [0, 5, 0, 9, 0, 0], "top_p": [1.0, 0.9, 0.8, 1.0, 1.0, 1.0], "temperature": [0.0, *[0.9] * 5]}
    whole = sample(wide.to(DEVICE)[::2, 100:800], SamplingBatch.build(6, seed=range(6), **params), backend="triton")
    for row in range(6):
        own = {name: values[row] for name, values in params.items()}
        alone = sample(logits[row : row + 1].to(DEVICE), SamplingBatch.build(1, seed=row, **own), backend="triton")
        assert alone.token_ids[0] == whole.token_ids[row]


@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 1, 1), (3, 7, 7), (4, 1000, 8), (2, 20_011, 64)])
def test_the_largest_of_each_row_come_in_order(rows: int, vocab: int, k: int) -> None:
    scores = make_logits(rows, vocab)
    values, ids = top_k(scores.to(DEVICE), k, backend="triton")
    expected = top_k(scores, k, backend="native")
    assert torch.equal(values.cpu(), expected[0]) and torch.equal(ids.cpu(), expected[1])


def test_equal_scores_come_by_id_and_what_cannot_be_is_left_out() -> None:
    scores = torch.tensor([[1.0, 3, 3, -INF], [-INF, -INF, 2, -INF], [-INF] * 4, [0, INF, 1, 1], [0, NAN, 1, 1]])
    values, ids = (x.cpu() for x in top_k(scores.to(DEVICE), 3, backend="triton"))
    assert ids[:4].tolist() == [[1, 2, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert values[:3].tolist() == [[3, 3, 1], [2, -INF, -INF], [-INF] * 3]
    assert values[3:].isnan().all()
    assert (ids[3:] == 0).all()


def test_nothing_gives_an_empty_result() -> None:
    result = sample(torch.empty(0, 10, device=DEVICE), SamplingBatch.build(0), backend="triton")
    assert result.token_ids.shape == (0,) and result.errors == []
    assert top_k(torch.empty(0, 10, device=DEVICE), 3, backend="triton")[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "no triton backend|must be of float32"),
        (torch.zeros(16), "must have the shape"),
        (torch.zeros(2, 0), "must have the shape"),
        (torch.zeros(3, 8), "must have the 2 rows of the batch, got 3"),
        (torch.zeros(2, 16)[:, ::2], "contiguous rows"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: Tensor, message: str) -> None:
    strange = logits.to(DEVICE) if logits.is_contiguous() else torch.zeros(2, 16, device=DEVICE)[:, ::2]
    with pytest.raises(ValueError, match=message):
        sample(strange, SamplingBatch.build(2), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, "num_logprobs": 5},
        {"num_logprobs": 0},
        {"top_p": 0.9},
        {"top_k": 1000, "top_p": 0.95},
        {"typical_p": 0.9},
        {**ALL, "num_logprobs": 20},
    ],
    ids=str,
)
def test_a_large_batch_of_a_large_vocabulary(params: dict[str, Any], dtype: torch.dtype) -> None:
    rows = 128
    logits = make_logits(rows, 131_072, scale=2.0).to(dtype)
    ours, native = on_both(logits, SamplingBatch.build(rows, seed=range(rows), **params))
    assert ours.errors == native.errors
    assert (ours.token_ids != native.token_ids).sum() <= (0 if params.get("temperature") == 0 else 2)
    same = ours.token_ids == native.token_ids
    torch.testing.assert_close(ours.logprobs[same], native.logprobs[same], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(ours.ranks[same], native.ranks[same])
    assert torch.equal(ours.top_ids, native.top_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.7}], ids=str)
def test_many_draws_follow_the_distribution_and_are_those_of_the_cpu(params: dict[str, Any]) -> None:
    check_many_draws(300, params)


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"top_k": 12, "top_p": 0.9}], ids=str)
def test_as_many_draws_interpreted(params: dict[str, Any]) -> None:
    check_many_draws(24, params)


def check_many_draws(vocab: int, params: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    rows = 10_000
    logits = make_logits(1, vocab, seed=3, scale=1.5)[0]
    tokens = draws(logits, rows, **params)
    batch = SamplingBatch.build(rows, seed=11, position=range(rows), **params)
    assert (tokens != sample(logits.expand(rows, -1), batch).token_ids).sum() <= rows // 1000
    expected = reference.sampling_probabilities(logits[None], SamplingBatch.build(1, **params))[0] * rows
    counts = torch.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rest = float(expected[~common].sum())
    observed, wanted = counts[common].tolist(), expected[common].tolist()
    if rest >= 5:
        observed, wanted = [*observed, int(counts[~common].sum())], [*wanted, rest]
        assert chisquare(observed, wanted).pvalue > 1e-4
    else:
        scale = sum(observed) / sum(wanted)
        assert chisquare(observed, [scale * x for x in wanted]).pvalue > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {**ALL, "presence_penalty": 0.5, "num_logprobs": 2}], ids=str
)
def test_a_graph_replays_with_other_logits_positions_and_histories(params: dict[str, Any]) -> None:
    from kernels.gpu.sampling import MESSAGES, launch
    from kernels.gpu.sampling_columns import upload

    rows, vocab = 4, 50_257
    histories = [[1, 2, 3], [4], [], [5, 5]]
    first = SamplingBatch.build(rows, seed=range(rows), output_ids=histories, **params)
    logits = make_logits(rows, vocab).to(DEVICE)
    columns = upload(first, logits.device, capacity=100, longest=64)
    launch(logits, columns)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch(logits, columns)
    for step in range(3):
        histories = [[*history, 7 + step] for history in histories]
        batch = SamplingBatch.build(rows, seed=range(rows), position=step, output_ids=histories, **params)
        fresh = make_logits(rows, vocab, seed=step)
        columns.refill(batch)
        logits.copy_(fresh)
        graph.replay()
        found = result.download()()
        errors = [MESSAGES[code] for code in found.errors.tolist()]
        ours = SampleResult(found.token_ids, found.logprobs, found.ranks, found.top_logprobs, found.top_ids, errors)
        assert_alike(ours, sample(fresh, batch, backend="native"))


def test_columns_take_no_more_than_they_have_room_for() -> None:
    from kernels.gpu.sampling_columns import upload

    batch = SamplingBatch.build(2, presence_penalty=1.0, output_ids=[[1, 2], [3]])
    columns = upload(batch, torch.device(DEVICE), capacity=4)
    columns.refill(SamplingBatch.build(2, presence_penalty=0.5, temperature=0.0, output_ids=[[7], [3, 4]]))
    assert columns["presence_penalty"].tolist() == [0.5, 0.5]
    assert columns["scale"].tolist() == [0.0, 0.0]
    for params in ({"top_k": 3}, {"presence_penalty": 1.0, "output_ids": [[1, 2, 3], []]}, {"num_logprobs": 0}):
        with pytest.raises(ValueError, match=r"^columns hold 2 rows"):
            columns.refill(SamplingBatch.build(2, **params))
