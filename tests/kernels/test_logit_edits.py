"""edit_logits against its reference and against the engine's rules, at its edges, and what it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.sampling import LogitEdits, edit_logits
from tests.kernels.conftest import RunOnPath

INF, NAN = float("inf"), float("nan")


def make_scores(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def make_masks(count: int, vocab: int, seed: int = 0) -> Tensor:
    """Bits at random, those behind the vocabulary among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count, -(-vocab // 32)), generator=generator).int()


def edited(scores: Tensor, edits: LogitEdits, **options: Any) -> Tensor:
    """What edit_logits makes of a copy, once that is seen to be what the reference makes of it."""
    result = scores.clone()
    edit_logits(result, edits, **options)
    torch.testing.assert_close(result, reference.edit_logits(scores, edits), rtol=0, atol=0, equal_nan=True)
    return result


def random_edits(draw: random.Random, rows: int, vocab: int) -> LogitEdits:
    """Edits of some of the rows, each of every kind or not; histories of few tokens, so that n-grams repeat."""
    n, few = draw.randint(0, rows), min(vocab, draw.choice([1, 2, 5, vocab]))
    masks = make_masks(draw.randint(1, 3), vocab + draw.choice([0, 0, 32, 100]), draw.randint(0, 99))
    masks[0] = draw.choice([0, -1])
    return LogitEdits.build(
        draw.sample(range(rows), n),
        repetition_penalty=[draw.choice([1.0, 1.0, 0.7, 1.3]) for _ in range(n)],
        no_repeat_ngram_size=[draw.choice([0, 0, 1, 2, 3, 50]) for _ in range(n)],
        bias=[
            [(draw.randrange(vocab), draw.choice([-INF, draw.uniform(-9, 9)])) for _ in range(draw.choice([0, 1, 5]))]
            for _ in range(n)
        ],
        forced=[draw.choice([-1, -1, -1, draw.randrange(vocab)]) for _ in range(n)],
        mask=[draw.randint(-1, len(masks) - 1) for _ in range(n)],
        masks=masks,
        token_ids=[[draw.randrange(few) for _ in range(draw.choice([0, 1, 2, 3, 40]))] for _ in range(n)],
    )


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 64, 129, 1000])
def test_edits_are_those_of_the_reference(vocab: int) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        rows = draw.randint(1, 6)
        scores = make_scores(rows, vocab, seed)
        for _ in range(draw.choice([0, 0, 3])):
            scores[draw.randrange(rows), draw.randrange(vocab)] = draw.choice([NAN, INF, -INF, 0.0])
        edited(scores, random_edits(draw, rows, vocab))


def test_rows_not_named_are_not_touched() -> None:
    scores = make_scores(4, 50)
    result = edited(scores, LogitEdits.build([2, 0], forced=[3, -1], bias=[{}, {49: -INF}]))
    assert torch.equal(result[[1, 3]], scores[[1, 3]])
    assert torch.equal(result[0, :49], scores[0, :49]) and result[0, 49] == -INF
    assert result[2, 3] == 0 and (result[2] == -INF).sum() == 49
    assert torch.equal(edited(scores, LogitEdits.build([])), scores)


def test_each_kind_in_a_small_case() -> None:
    scores = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    for edits, expected in [
        ({"repetition_penalty": 2.0, "token_ids": [[0, 1, 0]]}, [0.5, -2.0, 2.0, 0.5]),
        ({"no_repeat_ngram_size": 1, "token_ids": [[0, 3]]}, [-INF, -1.0, 2.0, -INF]),
        ({"no_repeat_ngram_size": 2, "token_ids": [[0, 3, 2, 0]]}, [1.0, -1.0, 2.0, -INF]),
        ({"no_repeat_ngram_size": 3, "token_ids": [[1, 1]]}, [1.0, -1.0, 2.0, 0.5]),
        ({"no_repeat_ngram_size": 2, "token_ids": [[]]}, [1.0, -1.0, 2.0, 0.5]),
        ({"bias": [{0: 1.5, 3: -INF}]}, [2.5, -1.0, 2.0, -INF]),
        ({"bias": [[(0, 1.0), (0, 2.0)]]}, [4.0, -1.0, 2.0, 0.5]),
        ({"forced": 1}, [-INF, 0.0, -INF, -INF]),
        ({"mask": 0, "masks": torch.tensor([[0b0110]], dtype=torch.int32)}, [-INF, -1.0, 2.0, -INF]),
        ({"mask": 0, "masks": torch.tensor([[-1, 0]], dtype=torch.int32)}, [1.0, -1.0, 2.0, 0.5]),
        ({"forced": 1, "bias": [{1: 5.0}]}, [-INF, 0.0, -INF, -INF]),
    ]:
        assert edited(scores, LogitEdits.build([0], **edits)).tolist() == [expected], edits


def test_a_history_and_values_may_change_in_place() -> None:
    table = torch.full((2, 8), 10**9, dtype=torch.int32)
    table[:, :3] = torch.tensor([[1, 2, 1], [3, 3, 4]])
    lengths = torch.tensor([3, 2], dtype=torch.int32)
    edits = LogitEdits.build([0, 1], no_repeat_ngram_size=2, history=(table.view(-1), torch.tensor([0, 8]), lengths))
    scores = make_scores(2, 9)
    assert (edited(scores, edits) == -INF).nonzero().tolist() == [[0, 2], [1, 3]]
    table[:, 3] = torch.tensor([5, 3])
    lengths.copy_(torch.tensor([4, 4]))
    edits.forced[0] = 8
    result = edited(scores, edits)
    assert (result[0] > -INF).nonzero().tolist() == [[8]]
    assert (result[1] == -INF).nonzero().tolist() == [[3], [4]]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(num_threads: int) -> None:
    scores = make_scores(40, 20_011)  # so large that threads are worth waking
    edits = random_edits(random.Random(3), 40, 20_011)
    wide = torch.zeros(80, 20_100)
    wide[::2, :20_011] = scores
    edit_logits(wide[::2, :20_011], edits, num_threads=num_threads)
    assert torch.equal(wide[::2, :20_011], edited(scores, edits, num_threads=num_threads))
    assert (wide[1::2] == 0).all() and (wide[:, 20_011:] == 0).all()


@pytest.mark.parametrize("path", ["generic", "avx2", "avx512"])
def test_edits_are_those_of_the_reference_on_every_cpu_path(run_on_path: RunOnPath, path: str) -> None:
    run_on_path(
        "import random\n"
        "from tests.kernels.test_logit_edits import edited, make_scores, random_edits\n"
        "for seed in range(60):\n"
        "    vocab = random.Random(seed).randint(1, 200)\n"
        "    edited(make_scores(5, vocab), random_edits(random.Random(seed), 5, vocab))",
        path,
    )


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"rows": [0, 2, 0]}, "rows must be distinct, got 0 twice"),
        ({"rows": [0, -1]}, "rows must be at least 0, got -1 in row 1"),
        ({"repetition_penalty": [1.0, 0.0]}, "repetition_penalty must be finite and above 0, got 0 in row 7"),
        ({"repetition_penalty": NAN}, "repetition_penalty must be finite and above 0, got nan in row 4"),
        ({"no_repeat_ngram_size": [0, -1]}, "no_repeat_ngram_size must be .*, got -1 in row 7"),
        ({"bias": [{}, {1: NAN}]}, "bias_values must be finite or -inf, got nan in row 7"),
        ({"bias": [{}, {1: INF}]}, "bias_values must be finite or -inf, got inf in row 7"),
        ({"bias": [{-1: 1.0}, {}]}, "bias_ids must be at least 0, got -1 in row 4"),
        ({"bias": [{}]}, "bias must hold one entry for each of 2 rows, got 1"),
        ({"bias": [{"a": 1.0}, {}]}, "bias must be"),
        ({"token_ids": [[]]}, "token_ids must hold one entry for each of 2 rows, got 1"),
        ({"forced": [-2, 0]}, "forced must be a token, or -1 for none, got -2 in row 4"),
        ({"mask": [-1, 0]}, "mask must be a row of masks, or -1 for none, got 0 in row 7"),
        ({"masks": torch.zeros(2, 3)}, "masks must be a contiguous int32 matrix, got float32"),
        ({"masks": torch.zeros(2, 6, dtype=torch.int32)[:, ::2]}, "masks must be a contiguous int32 matrix"),
        ({"masks": torch.zeros(6, dtype=torch.int32)}, "masks must be a contiguous int32 matrix"),
        ({"history": (torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(2).int())}, "history_ids must be"),
        ({"history": (torch.zeros(3).int(), torch.tensor([0, 2]), torch.tensor([3, 2]).int())},
         "history_starts must be .*, got 2 in row 7"),
    ],
)  # fmt: skip
def test_edits_that_mean_nothing_are_refused_by_field_and_row(edits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        LogitEdits.build(**{"rows": [4, 7], **edits})


def test_offsets_that_do_not_fit_are_refused() -> None:
    made = LogitEdits.build([0], bias=[{1: 2.0}])
    columns = {name: getattr(made, name) for name in LogitEdits.__match_args__}
    for offsets in ([0, 2], [1, 1], [0, 0], [0, -1]):
        with pytest.raises(ValueError, match=r"^bias_offsets must start at 0"):
            LogitEdits(**{**columns, "bias_offsets": torch.tensor(offsets)})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"rows": [0, 5]}, "rows must be below the 3 rows of the scores, got 5"),
        ({"bias": [{}, {40: 1.0}]}, "bias_ids must be below the vocabulary of 40, got 40 in row 2"),
        ({"forced": [-1, 40]}, "forced must be below the vocabulary of 40, got 40 in row 2"),
        ({"forced": [-1, 2**31 - 1]}, "forced must be below .* in row 2"),
        ({"repetition_penalty": 1.1, "token_ids": [[1], [2, 40]]}, "history_ids must be below .*, got 40 in row 2"),
        ({"no_repeat_ngram_size": 3, "token_ids": [[1], [-1]]}, "history_ids must be below .*, got -1 in row 2"),
        ({"mask": [-1, 0], "masks": torch.zeros(1, 1, dtype=torch.int32)},
         "masks must have a bit for each of 40 tokens, got 1 words in row 2"),
    ],
)  # fmt: skip
def test_what_lies_outside_the_scores_is_refused_before_anything_is_written(
    edits: dict[str, Any], message: str
) -> None:
    scores = make_scores(3, 40)
    before = scores.clone()
    made = LogitEdits.build(**{"rows": [0, 2], "forced": [3, -1], **edits})
    with pytest.raises(ValueError, match=f"^{message}"):
        edit_logits(scores, made)
    assert torch.equal(scores, before)


def test_a_history_that_nothing_reads_may_hold_anything() -> None:
    scores = make_scores(1, 10)
    edit_logits(scores, LogitEdits.build([0], forced=2, token_ids=[[99, -7]]))
    assert (scores[0] > -INF).nonzero().tolist() == [[2]]


def test_rows_made_equal_in_place_are_refused() -> None:
    made = LogitEdits.build([0, 1], forced=2)
    made.rows[1] = 0
    with pytest.raises(ValueError, match=r"^rows must be distinct, got 0 twice"):
        edit_logits(make_scores(2, 10), made)


def test_arrays_changed_out_of_their_bounds_are_refused_or_not_followed() -> None:
    made = LogitEdits.build(
        [0], repetition_penalty=1.5, bias=[{1: 2.0}], mask=0, masks=make_masks(1, 40), token_ids=[[1, 2]]
    )
    scores = make_scores(1, 40)
    for column, place, value in [
        ("rows", 0, 1), ("rows", 0, -(2**63)), ("bias_ids", 0, 40), ("bias_ids", 0, -1), ("forced", 0, 40),
        ("mask", 0, 1), ("mask", 0, 2**31 - 1), ("history_ids", 1, 40),
    ]:  # fmt: skip
        tensor = getattr(made, column)
        kept = tensor[place].clone()
        tensor[place] = value
        with pytest.raises(ValueError, match=r"^(rows|bias_ids|forced|mask|history_ids) must be"):
            edit_logits(scores, made)
        tensor[place] = kept
    for column, place, value in [
        ("bias_offsets", 0, -(2**63)), ("bias_offsets", 1, 2**63 - 1), ("bias_offsets", 0, 9),
        ("history_starts", 0, -5), ("history_starts", 0, 2**63 - 1), ("history_lengths", 0, 2**31 - 1),
        ("history_lengths", 0, -1), ("forced", 0, -9), ("mask", 0, -9), ("no_repeat_ngram_size", 0, 2**31 - 1),
        ("no_repeat_ngram_size", 0, -(2**31)),
    ]:  # fmt: skip
        tensor = getattr(made, column)
        kept = tensor[place].clone()
        tensor[place] = value
        edit_logits(scores, made)
        tensor[place] = kept


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "float32 CPU tensor"),
        (torch.zeros(2, 8, device="meta"), "float32 CPU tensor"),
        (torch.zeros(8), "float32 of shape"),
        (torch.zeros(2, 16)[:, ::2], "contiguous rows"),
        (torch.zeros(1, 8).expand(2, 8), "do not overlap"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^scores must be .*{message}"):
        edit_logits(scores, LogitEdits.build([0]))
