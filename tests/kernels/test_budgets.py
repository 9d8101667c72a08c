"""Every Triton kernel compiles for the GPUs it is written for, and takes no more of them than it is known to."""

from __future__ import annotations

import pytest

from tools.profile import budget_check

pytest.importorskip("triton")


def test_every_kernel_keeps_to_its_budget() -> None:
    report = budget_check.run(None, update=False, path=None)
    assert not report.failures, "\n".join(report.failures)
