"""What the tests of the profiling command share."""

from __future__ import annotations

import pytest

from tests.tools.profiling import CPU, LIMITS
from tools.profile import ceilings, measure


@pytest.fixture
def cpu_of_known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring this machine's takes longer than the tests do."""
    monkeypatch.setattr(measure, "default_device", lambda: CPU)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes: LIMITS)
