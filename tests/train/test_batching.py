"""Batches: every example once an epoch, the same ones for every number of ranks and workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.data.batching import (
    IGNORED,
    Collate,
    Example,
    lengths_of,
    load_batches,
    plan_epoch,
    share_of,
    updates_in,
)


def examples(count: int = 103) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example([5] * int(rng.integers(1, 9)), [6] * int(rng.integers(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_a_plan_holds_every_example_once(max_tokens: int | None) -> None:
    plan = plan_epoch(lengths_of(examples()), seed=1, epoch=2, batch_size=8, max_tokens=max_tokens)
    assert sorted(np.concatenate(plan).tolist()) == list(range(103))


def test_a_plan_depends_on_seed_and_epoch_alone() -> None:
    lengths = lengths_of(examples())
    plans = [plan_epoch(lengths, seed, epoch, 8) for seed, epoch in [(1, 2), (1, 2), (1, 3), (2, 2)]]
    orders = [np.concatenate(plan).tolist() for plan in plans]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_a_token_budget_bounds_the_padded_batch() -> None:
    lengths = lengths_of(examples())
    for batch in plan_epoch(lengths, 0, 0, batch_size=8, max_tokens=40):
        assert lengths[batch].max(0).sum() * len(batch) <= 40


def test_batches_gather_similar_lengths() -> None:
    lengths = lengths_of(examples(1000))
    plan = plan_epoch(lengths, 0, 0, batch_size=10)
    padded = sum(lengths[batch].max(0).sum() * len(batch) for batch in plan)
    assert padded < 1.15 * lengths.sum()


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (2, 3), (8, 1)])
def test_ranks_share_the_plan_without_overlap(world_size: int, accumulation: int) -> None:
    plan = plan_epoch(lengths_of(examples()), 0, 0, batch_size=8)
    shares = [share_of(plan, rank, world_size, accumulation) for rank in range(world_size)]
    updates = updates_in(plan, world_size * accumulation)
    assert all(len(share) == updates * accumulation for share in shares)
    seen = [index for share in shares for batch in share for index in batch if index >= 0]
    assert sorted(seen) == list(range(103))


def test_an_update_has_the_same_examples_whatever_the_number_of_ranks() -> None:
    plan = plan_epoch(lengths_of(examples()), 0, 0, batch_size=8)
    alone = share_of(plan, 0, 1, 4)
    pair = [share_of(plan, rank, 2, 2) for rank in range(2)]
    for update in range(updates_in(plan, 4)):
        one = {i for batch in alone[update * 4 : update * 4 + 4] for i in batch}
        two = {i for share in pair for batch in share[update * 2 : update * 2 + 2] for i in batch}
        assert one == two


def test_skipping_updates_is_the_same_as_running_them() -> None:
    plan = plan_epoch(lengths_of(examples()), 0, 0, batch_size=8)
    assert share_of(plan, 1, 2, 2, first_update=2) == share_of(plan, 1, 2, 2)[4:]


def test_collating_pads_and_marks_what_is_real() -> None:
    batch = Collate([Example([5, 6, 7], [8]), Example([5], [8, 9])])([0, 1])
    assert batch.source_ids is not None
    assert batch.source_ids.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch.source_lengths is not None
    assert batch.source_lengths.tolist() == [3, 1]
    assert batch.input_ids.tolist() == [[1, 8, 0], [1, 8, 9]]
    assert batch.labels.tolist() == [[8, 2, IGNORED], [8, 9, 2]]
    assert (batch.num_target_tokens, batch.num_tokens) == (5, 9)


def test_a_silenced_batch_has_nothing_to_learn() -> None:
    batch = Collate(examples())([-1])
    assert batch.num_target_tokens == 0
    assert (batch.labels == IGNORED).all()


def test_lengths_round_up_to_a_multiple() -> None:
    batch = Collate(examples(), multiple=8)(list(range(10)))
    assert batch.source_ids is not None
    assert batch.source_ids.shape[1] % 8 == batch.input_ids.shape[1] % 8 == 0


def test_workers_change_nothing_and_leave_the_global_generator_alone() -> None:
    indices = [[0, 1], [2], [3, 4, 5]]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone = [batch.labels.tolist() for batch in load_batches(Collate(examples()), indices, 0)]
    helped = [batch.labels.tolist() for batch in load_batches(Collate(examples()), indices, 2)]
    assert alone == helped
    assert torch.equal(state, torch.get_rng_state())
