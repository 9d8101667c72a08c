"""The compiled sampler against its reference: by support, by distribution, by seed, and at its edges."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels._C as _C
from kernels import reference
from kernels.sampling import SamplingBatch, sample, top_k
from tests.kernels.conftest import CPU_PATHS

ROOT = Path(__file__).resolve().parents[2]
INF = float("inf")

FILTERS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in itertools.product((0.7, 1.5), (0, 1, 5, 17), (1.0, 0.8, 0.3), (0.0, 0.2))
]
TYPICAL = [
    {"temperature": temperature, "typical_p": typical_p, **others}
    for temperature, typical_p, others in itertools.product(
        (0.7, 1.5), (0.05, 0.3, 0.9), ({}, {"top_k": 17}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05})
    )
]
PENALTIES = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.2},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.4},
]


def make_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def one_row(logits: Tensor, draws: int, **params: object) -> tuple[Tensor, Tensor]:
    """How often each token is drawn from a row over as many positions, and the reference's probabilities."""
    batch = SamplingBatch.build(draws, seed=11, position=range(draws), **params)
    result = sample(logits.expand(draws, -1), batch)
    assert result.errors == [None] * draws
    counts = torch.bincount(result.token_ids, minlength=logits.numel())
    return counts, reference.sampling_probabilities(logits[None], SamplingBatch.build(1, **params))[0]


def assert_same(a: object, b: object) -> None:
    for name in ("token_ids", "logprobs", "ranks", "top_logprobs", "top_ids"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("params", FILTERS + TYPICAL, ids=str)
def test_tokens_drawn_are_exactly_those_the_reference_leaves(params):
    counts, probabilities = one_row(make_logits(1, 40, scale=1.0)[0], 20_000, **params)
    assert torch.equal(counts > 0, probabilities > 0)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"typical_p": 0.7},
        {"typical_p": 0.6, "top_k": 50},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_draws_follow_the_reference_distribution(params):
    from scipy.stats import chisquare  # slow to import, and this module is imported by subprocesses

    counts, probabilities = one_row(make_logits(1, 300, seed=3, scale=1.5)[0], 40_000, **params)
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [1, 2, 15, 127, 128, 129, 1000, 50257])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.95},
        {"top_k": 700},
        {"min_p": 0.03, "top_p": 0.7},
        {"typical_p": 0.9},
        {"typical_p": 0.4, "top_p": 0.95},
        {"typical_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_each_token_is_the_reference_token_at_any_vocabulary_size(vocab, params):
    rows = 2 if vocab > 1000 else 24
    batch = SamplingBatch.build(rows, temperature=0.9, seed=range(rows), position=7, **params)
    for scale in (0.1, 3.0):
        logits = make_logits(rows, vocab, scale=scale)
        assert torch.equal(sample(logits, batch).token_ids, reference.sample(logits, batch))


def test_the_random_number_is_philox_of_seed_and_position():
    # The generator's published answer for key 0 and counter 0 is 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    assert _C.uniform(0, 0) == (0x6627E8D5E169C58D >> 11) * 2.0**-53
    for seed, position in [(1, 2), (-1, 5), (2**63 - 1, 2**40 + 3), (-(2**63), 2**63 - 1)]:
        assert _C.uniform(seed, position) == reference.uniform(seed, position)


def test_a_token_depends_on_seed_and_position_alone():
    logits = make_logits(1, 5000, scale=1.0)
    tokens = {}
    for seed, position in itertools.product(range(20), range(20)):
        batch = SamplingBatch.build(1, seed=seed, position=position)
        tokens[seed, position] = int(sample(logits, batch).token_ids)
        assert tokens[seed, position] == int(sample(logits, batch).token_ids)
    assert len({tokens[seed, 0] for seed in range(20)}) > 10
    assert len({tokens[0, position] for position in range(20)}) > 10


def mixed_batch(rows: int, vocab: int = 777) -> tuple[Tensor, dict[str, list]]:
    """Rows of every kind side by side."""
    kinds = [
        {},
        {"temperature": 0.0, "num_logprobs": 2},
        {"top_k": 9, "num_logprobs": 4},
        {"top_p": 0.9, "presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"min_p": 0.1, "frequency_penalty": 0.5, "num_logprobs": 0},
        {"typical_p": 0.5},
    ]
    names = {name for kind in kinds for name in kind}
    defaults = {"temperature": 0.9, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "num_logprobs": -1}
    columns = {
        name: [kinds[row % len(kinds)].get(name, defaults.get(name, 0)) for row in range(rows)] for name in names
    }
    columns["seed"] = [row * 17 for row in range(rows)]
    columns["prompt_ids"] = [[row % 7, 3, 3] for row in range(rows)]
    columns["output_ids"] = [[5, row % 11, 5] for row in range(rows)]
    return make_logits(rows, vocab), columns


def test_a_row_does_not_depend_on_its_batch_or_its_place_in_it():
    logits, columns = mixed_batch(23)
    whole = sample(logits, SamplingBatch.build(23, **columns))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits[order], SamplingBatch.build(23, **{k: [v[i] for i in order] for k, v in columns.items()}))
    assert torch.equal(whole.token_ids[order], shuffled.token_ids)
    for row in range(23):
        alone = sample(logits[row : row + 1], SamplingBatch.build(1, **{k: [v[row]] for k, v in columns.items()}))
        n = alone.top_ids.shape[1]
        assert alone.token_ids[0] == whole.token_ids[row]
        assert alone.ranks[0] == whole.ranks[row]
        torch.testing.assert_close(alone.logprobs[0], whole.logprobs[row], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(alone.top_ids[0], whole.top_ids[row, :n])
        assert (whole.top_ids[row, n:] == -1).all()
        assert (whole.top_logprobs[row, n:] == -INF).all()


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_the_number_of_threads_changes_nothing(num_threads):
    logits, columns = mixed_batch(64, 20_000)  # so large that threads are worth waking
    batch = SamplingBatch.build(64, **columns)
    for _ in range(20):
        assert_same(sample(logits, batch, num_threads=1), sample(logits, batch, num_threads=num_threads))


def test_callers_in_several_threads_do_not_disturb_each_other():
    logits, columns = mixed_batch(64, 20_000)  # so large that threads are worth waking
    batch = SamplingBatch.build(64, **columns)
    wanted = sample(logits, batch)
    results = []
    work = lambda: results.extend(sample(logits, batch, num_threads=2) for _ in range(20))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        assert_same(result, wanted)


def test_a_forked_child_samples_with_threads_of_its_own():
    script = (
        "import os, torch; from kernels.sampling import SamplingBatch, sample\n"
        "x = torch.randn(64, 9000); b = SamplingBatch.build(64, seed=range(64))\n"
        "want = sample(x, b, num_threads=4).token_ids\n"
        "child = os.fork()\n"
        "same = torch.equal(sample(x, b, num_threads=4).token_ids, want)\n"
        "if child == 0: os._exit(not same)\n"
        "assert same and os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=ROOT, timeout=60)


def test_rows_may_be_strided_and_the_input_is_not_written():
    logits, columns = mixed_batch(16)
    batch = SamplingBatch.build(16, **columns)
    wide = torch.full((32, 1000), float("nan"))
    wide[::2, 100:877] = logits
    before = wide.clone()
    assert_same(sample(wide[::2, 100:877], batch), sample(logits, batch))
    torch.testing.assert_close(wide, before, rtol=0, atol=0, equal_nan=True)


def test_values_changed_in_place_are_those_of_the_next_call():
    logits = make_logits(1, 1000)
    batch = SamplingBatch.build(1, seed=4)
    for position in range(5):
        wanted = sample(logits, SamplingBatch.build(1, seed=4, position=position)).token_ids
        assert torch.equal(sample(logits, batch).token_ids, wanted)
        batch.position.add_(1)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.zeros(3, 500)
    logits[1, [77, 300, 499]] = 2.0
    logits[2] = -INF
    logits[2, [400, 450]] = -3.0
    result = sample(logits, SamplingBatch.build(3, temperature=0, num_logprobs=2))
    assert result.token_ids.tolist() == [0, 77, 400]
    assert result.ranks.tolist() == [1, 1, 1]
    assert result.top_ids.tolist() == [[0, 1], [77, 300], [400, 450]]


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.3}, {"top_k": 6, "top_p": 0.5}, {"typical_p": 0.4}], ids=str
)
@pytest.mark.parametrize("vocab", [10, 1000])
def test_filters_keep_the_lower_ids_of_equal_logits(vocab, params):
    counts, probabilities = one_row(torch.full((vocab,), 1.25), 20_000, **params)
    assert torch.equal(counts > 0, probabilities > 0)
    kept = int((counts > 0).sum())
    assert (counts[:kept] > 0).all()


def test_the_sign_of_zero_is_no_difference():
    logits = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0])
    counts, _ = one_row(logits, 200, top_k=2)
    assert (counts > 0).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_are_those_of_the_reference(penalties, temperature):
    rows, vocab = 32, 50
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, vocab, row % 5).tolist() for row in range(rows)]
    outputs = [generator.integers(0, 10, row).tolist() for row in range(rows)]
    logits = make_logits(rows, vocab, scale=1.0)
    batch = SamplingBatch.build(
        rows, temperature=temperature, seed=range(rows), prompt_ids=prompts, output_ids=outputs, **penalties
    )
    result = sample(logits, batch)
    assert torch.equal(result.token_ids, reference.sample(logits, batch))
    assert torch.equal(sample(logits, batch).token_ids, result.token_ids)


@pytest.mark.parametrize("vocab", [1, 7, 130, 5001])
def test_logprobs_and_ranks_are_those_of_the_raw_logits(vocab):
    rows, n = 12, 5
    logits = make_logits(rows, vocab)
    batch = SamplingBatch.build(
        rows,
        temperature=0.5,
        top_k=20,
        repetition_penalty=1.4,
        seed=range(rows),
        num_logprobs=n,
        output_ids=[[0, vocab // 2]] * rows,
    )
    result = sample(logits, batch)
    logprobs = logits.double().log_softmax(-1)
    chosen = logprobs.gather(1, result.token_ids[:, None])
    torch.testing.assert_close(result.logprobs[:, None], chosen.float(), rtol=0, atol=2e-6)
    assert torch.equal(result.ranks, 1 + (logprobs > chosen).sum(1).int())
    top = logprobs.topk(min(n, vocab))
    torch.testing.assert_close(result.top_logprobs[:, :n][:, :vocab], top.values.float(), rtol=0, atol=2e-6)
    assert torch.equal(result.top_ids[:, :vocab], top.indices)
    assert (result.top_ids[:, vocab:] == -1).all()


def test_very_many_logprobs_are_in_order():
    logits = make_logits(2, 3000).round()  # many ties
    result = sample(logits, SamplingBatch.build(2, num_logprobs=2000))
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(result.top_ids, order[:, :2000])


def test_logprobs_not_asked_for_are_nan():
    result = sample(make_logits(2, 10), SamplingBatch.build(2, num_logprobs=[-1, 0]))
    assert result.logprobs.isnan().tolist() == [True, False]
    assert result.ranks[0] == 0
    assert result.top_ids.shape == (2, 0)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("place", [0, 64, 299])
def test_a_row_that_cannot_be_sampled_is_an_error_of_its_own(params, place):
    logits = make_logits(5, 300)
    batch = SamplingBatch.build(5, seed=range(5), num_logprobs=1, **params)
    healthy = sample(logits, batch)
    logits[1, place] = float("nan")
    logits[2, place] = INF
    logits[3] = -INF
    result = sample(logits, batch)
    assert [e and e.split()[-1].rstrip(".") for e in result.errors] == [None, "NaN", "+inf", "-inf", None]
    assert result.token_ids.tolist()[1:4] == [-1, -1, -1]
    for row in (0, 4):
        assert result.token_ids[row] == healthy.token_ids[row]
        assert result.logprobs[row] == healthy.logprobs[row]


def test_a_history_outside_the_vocabulary_is_an_error_of_its_row():
    batch = SamplingBatch.build(2, presence_penalty=1.0, output_ids=[[3], [10]])
    result = sample(make_logits(2, 10), batch)
    assert result.errors == [None, "the history holds a token id outside the vocabulary"]
    assert result.token_ids[1] == -1


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 1e-6},
        {"top_p": 1e-6, "typical_p": 0.5},
        {"min_p": 1.0},
        {"top_k": 1},
        {"temperature": 2e-5},
        {"temperature": 1e-38},
    ],
    ids=str,
)
def test_one_token_left_is_always_that_token(params):
    logits = make_logits(50, 400)
    batch = SamplingBatch.build(50, seed=range(50), **params)
    assert torch.equal(sample(logits, batch).token_ids, logits.argmax(-1))


def test_the_typical_token_need_not_be_the_likeliest():
    for share, kept in [(0.7, [True, *[False] * 16]), (0.4, [False, *[True] * 3, *[False] * 13])]:
        logits = torch.tensor([share, *[(1 - share) / 16] * 16]).log()
        counts, _ = one_row(logits, 2000, typical_p=0.1)
        assert (counts > 0).tolist() == kept


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_typical_tokens_are_those_of_transformers(temperature):
    from transformers import TypicalLogitsWarper

    logits = make_logits(1, 200, scale=2.0)
    for typical_p in (0.2, 0.5, 0.9, 0.99):
        theirs = TypicalLogitsWarper(typical_p)(None, logits / temperature)[0]
        batch = SamplingBatch.build(1, temperature=temperature, typical_p=typical_p)
        assert torch.equal(reference.sampling_probabilities(logits, batch)[0] > 0, theirs > -INF)


@pytest.mark.parametrize("params", [*FILTERS[::5], *TYPICAL[::5], {"temperature": 1e38}, {"top_k": 10_000}], ids=str)
def test_tokens_at_minus_infinity_are_never_drawn(params):
    logits = torch.full((200,), -INF)
    logits[[3, 130, 199]] = torch.tensor([1.0, 0.5, 0.9])
    counts, probabilities = one_row(logits, 2000, **params)
    assert torch.equal(counts > 0, probabilities > 0)


def test_extreme_finite_logits_are_sampled():
    logits = torch.tensor([[3e38, -3e38, 3e38], [-3e38, -3.3e38, -3e38]])
    result = sample(logits, SamplingBatch.build(2, top_p=0.9, num_logprobs=0))
    assert result.errors == [None, None]
    torch.testing.assert_close(result.logprobs, torch.tensor([0.5, 0.5]).log(), rtol=0, atol=1)


def test_an_empty_batch_gives_an_empty_result():
    result = sample(torch.empty(0, 10), SamplingBatch.build(0))
    assert result.token_ids.shape == (0,)
    assert result.errors == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", INF),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("position", -1),
        ("num_logprobs", -2),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_row(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*, got .* in row 2$"):
        SamplingBatch.build(3, **{field: [1, 1, value]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 1.5),
        ("temperature", "hot"),
        ("seed", [1, 2]),
        ("seed", 2**64),
        ("top_p", [[1.0]]),
        ("top_k", True),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        SamplingBatch.build(3, **{field: value})


def test_histories_that_do_not_fit_the_batch_are_refused():
    with pytest.raises(ValueError, match="must hold 2 lists"):
        SamplingBatch.build(2, prompt_ids=[[1]])
    places = places_of([[1, 2]], [[3]])
    with pytest.raises(ValueError, match="history must come alone"):
        SamplingBatch.build(1, history=places, output_ids=[[1]])
    with pytest.raises(ValueError, match="history_lengths must be a contiguous int32 array"):
        SamplingBatch.build(1, history=(*places[:2], places[2].long(), places[3]))


@pytest.mark.parametrize(
    ("starts", "lengths", "prompt_lengths", "message"),
    [
        ([0, 0], [6, 5], [0, 0], "^history_starts must be .*, got 0 in row 0$"),
        ([0, 2], [5, 4], [0, 0], "^history_starts must be .*, got 2 in row 1$"),
        ([-1, 0], [0, 0], [0, 0], "^history_starts must be .*, got -1 in row 0$"),
        ([2**63 - 1, 0], [1, 0], [0, 0], "^history_starts must be .* in row 0$"),
        ([0, 0], [0, -1], [0, 0], "^history_lengths must be at least 0, got -1 in row 1$"),
        ([0, 0], [1, 1], [2, 0], "^prompt_lengths must be .*, got 2 in row 0$"),
        ([0, 0], [1, 1], [0, -1], "^prompt_lengths must be .*, got -1 in row 1$"),
    ],
)
def test_a_history_outside_its_buffer_is_refused_by_row(starts, lengths, prompt_lengths, message):
    ids = torch.zeros(5, dtype=torch.int32)
    columns = torch.tensor(starts), *(torch.tensor(x, dtype=torch.int32) for x in (lengths, prompt_lengths))
    with pytest.raises(ValueError, match=message):
        SamplingBatch.build(2, history=(ids, *columns))


def places_of(prompts: list[list[int]], outputs: list[list[int]], width: int = 40) -> tuple[Tensor, ...]:
    """A table of tokens with room for more, one row a sequence, last row first."""
    table = torch.full((len(prompts), width), 10**9, dtype=torch.int32)
    lengths = torch.zeros(len(prompts), dtype=torch.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        lengths[row] = len(prompt) + len(output)
        table[-1 - row, : len(prompt) + len(output)] = torch.tensor([*prompt, *output])
    starts = torch.arange(len(prompts)).flip(0) * width
    return table.view(-1), starts, lengths, torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)


def test_a_history_grows_in_its_place():
    rows, vocab = 3, 12
    logits = make_logits(rows, vocab)
    prompts, outputs = [[1, 2], [], [3]], [[], [4], [5, 5]]
    params = {"repetition_penalty": 1.7, "frequency_penalty": 1.0, "seed": [1, 2, 3]}
    ids, starts, lengths, prompt_lengths = places_of(prompts, outputs)
    batch = SamplingBatch.build(rows, history=(ids, starts, lengths, prompt_lengths), **params)
    for position in range(20):
        copied = SamplingBatch.build(rows, prompt_ids=prompts, output_ids=outputs, position=position, **params)
        tokens = sample(logits, batch).token_ids
        assert torch.equal(tokens, sample(logits, copied).token_ids)
        assert torch.equal(tokens, reference.sample(logits, batch))
        ids[starts + lengths] = tokens.int()
        lengths.add_(1)
        batch.position.add_(1)
        outputs = [[*output, token] for output, token in zip(outputs, tokens.tolist(), strict=True)]


def test_a_history_moved_out_of_its_buffer_is_not_followed():
    ids, starts, lengths, prompt_lengths = places_of([[1, 2]], [[3]], width=3)
    batch = SamplingBatch.build(1, presence_penalty=1.0, history=(ids, starts, lengths, prompt_lengths))
    wanted = sample(make_logits(1, 10), batch).token_ids
    for start, length in [(0, 2**31 - 1), (-(2**63), 3), (2**63 - 1, 2**31 - 1), (0, -5), (1, 7)]:
        starts[0], lengths[0], prompt_lengths[0] = start, length, 2**31 - 1
        assert sample(make_logits(1, 10), batch).errors == [None]
    starts[0], lengths[0], prompt_lengths[0] = 0, 3, 2
    assert torch.equal(sample(make_logits(1, 10), batch).token_ids, wanted)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2, 8, dtype=torch.float64),
        torch.zeros(2, 8, dtype=torch.bfloat16),
        torch.zeros(2, 8, device="meta"),
        torch.zeros(16),
        torch.zeros(2, 0),
        torch.zeros(3, 8),
        torch.zeros(2, 16)[:, ::2],
    ],
    ids=["float64", "bfloat16", "meta", "1d", "no vocabulary", "rows", "strided vocabulary"],
)
def test_logits_that_do_not_fit_are_refused_in_one_sentence(logits):
    with pytest.raises(ValueError, match=r"^logits [^\n]*$"):
        sample(logits, SamplingBatch.build(2))


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="num_threads must be between 1 and 1024, got 0"):
        sample(torch.zeros(1, 8), SamplingBatch.build(1), num_threads=0)


PATH_SCRIPT = """
import sys, torch
import kernels._C as _C
from tests.kernels.test_sampling import make_logits, mixed_batch
from kernels.sampling import SamplingBatch, sample, top_k
from tests.kernels.conftest import CPU_PATHS
logits, columns = mixed_batch(40)
wide = make_logits(4, 33333, scale=1.0)
results = [sample(logits, SamplingBatch.build(40, **columns))]
for params in ({}, {"top_p": 0.9}, {"top_k": 600}, {"min_p": 0.2, "num_logprobs": 40}, {"typical_p": 0.6}):
    results.append(sample(wide, SamplingBatch.build(4, seed=range(4), **params)))
for r in results:
    print([x.tolist() for x in (r.token_ids, r.ranks, r.logprobs, r.top_ids, r.top_logprobs)])
print(_C.cpu_path, file=sys.stderr)
"""


def start_on(path: str) -> subprocess.Popen[str]:
    env = {**os.environ, "TANDEM_CPU": path}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", PATH_SCRIPT], env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_every_cpu_path_gives_the_same_bits():
    paths = ["generic", "avx2", "avx512"]
    runs = [start_on(path) for path in paths]
    outputs = [run.communicate(timeout=120) for run in runs]
    available = [i for i, (_, stderr) in enumerate(outputs) if "this CPU does not have it" not in stderr]
    outputs, paths = [outputs[i] for i in available], [paths[i] for i in available]
    assert paths[0] == "generic"
    assert [stderr.strip().splitlines()[-1] for _, stderr in outputs] == paths
    assert {stdout for stdout, _ in outputs} == {outputs[0][0]}
    assert outputs[0][0].count("\n") == 6


def test_an_unknown_cpu_path_is_refused_by_name():
    _, stderr = start_on("sse9").communicate(timeout=120)
    assert f"TANDEM_CPU must be one of {', '.join(CPU_PATHS)}, not sse9" in stderr


@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 1, 1), (3, 7, 7), (5, 1000, 8), (33, 20_011, 64)])
def test_the_largest_of_each_row_come_in_order(rows: int, vocab: int, k: int) -> None:
    scores = make_logits(rows, vocab)
    values, ids = top_k(scores, k)
    expected = scores.topk(k)
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)
    assert torch.equal(top_k(scores, k, num_threads=1)[1], ids)


def test_equal_scores_come_by_id_and_what_cannot_be_is_left_out() -> None:
    scores = torch.tensor(
        [[1.0, 3, 3, -INF], [-INF, -INF, 2, -INF], [-INF] * 4, [0, INF, 1, 1], [0, float("nan"), 1, 1]]
    )
    values, ids = top_k(scores, 3)
    assert ids[:4].tolist() == [[1, 2, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert values[:3].tolist() == [[3, 3, 1], [2, -INF, -INF], [-INF] * 3]
    assert values[3:].isnan().all()


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (torch.zeros(2, 5), 6, "k must be from 1 to 5, got 6"),
        (torch.zeros(2, 5), 0, "k must be from 1 to 5, got 0"),
        (torch.zeros(5), 1, "float32 of shape"),
        (torch.zeros(2, 5, dtype=torch.float64), 1, "float32 CPU tensor"),
        (torch.zeros(5, 2).T, 1, "contiguous rows"),
    ],
)
def test_scores_that_have_no_largest_are_refused(scores: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(scores, k)
