from __future__ import annotations

import itertools

import pytest
import torch

from train.optimizer import FLOOR, build_optimizer, learning_rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "linear", "constant"])
def test_every_schedule_warms_up_to_the_peak_and_never_exceeds_it(schedule: str) -> None:
    factors = [learning_rate_factor(step, schedule, 10, 100) for step in range(101)]  # type: ignore[arg-type]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[9] == pytest.approx(1.0)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(factors[10:]))


def test_schedules_end_where_they_should() -> None:
    assert learning_rate_factor(100, "cosine", 10, 100) == pytest.approx(FLOOR)
    assert learning_rate_factor(100, "linear", 10, 100) == pytest.approx(FLOOR)
    assert learning_rate_factor(55, "cosine", 10, 100) == pytest.approx((1 + FLOOR) / 2)
    assert learning_rate_factor(399, "inverse_sqrt", 100, 1000) == pytest.approx(0.5)
    assert learning_rate_factor(5, "inverse_sqrt", 0, 10) > 0


def test_norms_and_biases_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, plain = build_optimizer(model, 1e-3, 0.1, (0.9, 0.98)).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert plain["weight_decay"] == 0
    assert len(plain["params"]) == 3
