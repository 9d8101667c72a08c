"""The table of the weight-only layers' tiles: who gets what, and that it is read as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kernels.gpu import weight_only_configs as configs
from kernels.gpu import weight_only_linear as gpu
from kernels.weight_only_linear import MOST_ROWS, DeviceWeight


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    configs.choose.cache_clear()
    yield
    configs.choose.cache_clear()


def on(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda: architecture)
    monkeypatch.setattr(gpu, "architecture", lambda: architecture)


@pytest.mark.parametrize("architecture", ["sm80", "sm89", "sm90", "sm100", "gfx942", "interpreter"])
def test_every_kind_has_a_config_for_all_rows(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(architecture, monkeypatch)
    for kind in configs.KINDS:
        if kind == "fp8" and architecture not in ("sm90", "sm100", "interpreter"):
            with pytest.raises(ValueError, match="no entry for weights in fp8"):
                configs.choose(kind, 1, False)
            continue
        for rows in (1, 8, 9, 17, 33, MOST_ROWS):
            config = configs.choose(kind, rows, False)
            assert config.inputs % 64 == 0
            assert configs.choose(kind, rows, True).block_n in (16, config.block_n // 2)


def test_an_entry_serves_calls_with_no_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    on("sm90", monkeypatch)
    for entry in configs.entries():
        if entry.architecture == "sm90":
            assert configs.choose(entry.kind, entry.rows, False) == entry.config


def test_only_hopper_and_later_ask_for_weights_early(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = DeviceWeight.pack(torch.zeros(16, 4096), "cpu", torch.bfloat16)
    config = replace(configs.choose("half", 1, False), ahead=512)
    for architecture, ahead in (("sm80", 0), ("sm90", 512), ("interpreter", 0), ("gfx942", 0)):
        on(architecture, monkeypatch)
        assert gpu.ahead_of(weight, config) == ahead
    on("sm90", monkeypatch)
    assert gpu.ahead_of(DeviceWeight.pack(torch.zeros(16, 24), "cpu", torch.bfloat16), config) == 0


def test_a_table_is_saved_as_it_is_read(tmp_path: Path) -> None:
    rows = configs.entries()
    configs.save(rows, tmp_path / "table.json")
    assert configs.entries(tmp_path / "table.json") == rows
    assert (tmp_path / "table.json").read_text() == configs.TABLE.read_text()


def test_layers_of_few_outputs_take_narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    on("sm90", monkeypatch)
    monkeypatch.setattr(configs, "multiprocessors", lambda: 132)
    own = replace(configs.choose("int8", 8, False), block_n=32, deep=True, narrow=True)
    with configs.instead_of([configs.Entry("sm90", "int8", 64, own)]):
        assert configs.choose("int8", 8, False, 4096).block_n == 16  # 128 programs
        assert configs.choose("int8", 8, False, 11008).block_n == 32  # 344
        assert configs.choose("int8", 8, True, 4096).block_n == 16
    with configs.instead_of([configs.Entry("sm90", "int8", 64, replace(own, narrow=False))]):
        assert configs.choose("int8", 8, False, 4096).block_n == 32


def test_another_table_holds_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on("sm90", monkeypatch)
    before = configs.choose("int8", 8, False)
    other = replace(before, stages=2)
    with configs.instead_of([configs.Entry("sm90", "int8", 64, other)]):
        assert configs.choose("int8", 8, False) == other
    assert configs.choose("int8", 8, False) == before
