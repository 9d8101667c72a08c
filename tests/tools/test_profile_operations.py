"""What `python -m tools.profile OP` measures: tiny shapes, correct rows, the least work counted right."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import TRITON_DEVICE
from tests.tools.profiling import options
from tools.profile import (
    activation,
    attention,
    attention_shapes,
    contenders,
    cross_entropy,
    gpu_linear,
    linear,
    linear_cross_entropy,
    measure,
    norm,
    paged_attention,
    paged_attention_gpu,
    paged_attention_shapes,
    rotary,
    rows,
)
from tools.profile.attention_shapes import SHAPES, Shape, shapes
from tools.profile.report import read
from tools.profile.timing import Timing

pytestmark = pytest.mark.usefixtures("cpu_of_known_ceilings")


def test_attention_is_measured_forward_and_backward_against_its_peers(tmp_path) -> None:
    names = ["1x24x2x16", "1x24x2x16-causal", "1x24x2x16-causal-t5", "2x7:24x2x16", "1x24x2x16-t5"]
    path = tmp_path / "a.json"
    report = attention.run(options(shapes=names, against=["eager", "math", "flash", "cudnn"], json=path))
    assert not report.failures
    assert [row["shape"] for row in report.rows[::12]] == names
    assert {row["mode"] for row in report.rows} == {"forward", "backward"}
    timed = [row for row in report.rows if row["ms"] is not None]
    assert {row["who"] for row in timed} == {"tandem native", "tandem torch", "eager", "math", "flash"}
    for row in timed:
        assert 0 < row["20%"] <= row["ms"] <= row["80%"]  # type: ignore[operator]
        assert 0 <= row["error"] < 1e-5  # type: ignore[operator]
        assert row["GFLOP/s"] == pytest.approx(row["flops"] / row["ms"] / 1e6)  # type: ignore[operator]
    assert all(row["x ours"] == 1 for row in timed if row["who"] == "tandem native")
    assert all(row["note"] for row in report.rows if row["who"] == "cudnn")
    assert read(path)["rows"] == report.rows


def test_attention_in_bfloat16_runs_on_the_backends_that_have_it() -> None:
    report = attention.run(options(shapes=["1x24x2x16"], dtypes=[torch.bfloat16], modes=["both"]))
    assert not report.failures
    assert [row["who"] for row in report.rows] == ["tandem torch", "eager"]


@pytest.mark.parametrize(
    ("operation", "shapes", "native"),
    [
        (norm, [f"12x48-{kind}" for kind in norm.KINDS], []),
        (rotary, [f"12x256-{kind}" for kind in rotary.KINDS], ["halves"]),
        (activation, [f"12x48-{kind}" for kind in activation.KINDS], ["gelu", "gelu_new"]),
        (cross_entropy, [f"12x50-{kind}" for kind in cross_entropy.KINDS], []),
        (linear_cross_entropy, ["12x16x50"], []),
    ],
)
def test_an_operation_is_measured_in_all_its_kinds_and_modes(operation, shapes: list[str], native: list[str]) -> None:
    report = operation.run(options(shapes=shapes))
    assert not report.failures
    assert list(dict.fromkeys(row["shape"] for row in report.rows)) == shapes
    assert all(row["ms"] and row["error"] < 1e-5 for row in report.rows)
    modes = {"forward", "both"} if operation is linear_cross_entropy else {"forward", "backward"}
    assert {row["mode"] for row in report.rows} == modes
    assert {row["who"] for row in report.rows} >= {"tandem torch", "eager"}
    kinds = {str(row["shape"]).split("-")[-1] for row in report.rows if row["who"] == "tandem native"}
    assert kinds == set(native)


def test_packed_layers_are_measured_in_every_precision() -> None:
    report = linear.run(options(shapes=["5x64x96"], against=list(linear.PEERS)))
    assert not report.failures
    assert [(row["shape"], row["dtype"], row["who"]) for row in report.rows] == [
        (f"5x64x96-{precision}", "fp32" if precision == "fp32" else "int8", who)
        for precision, peers in (("fp32", ["eager"]), ("int8", linear.PEERS), ("int4", ["eager"]))
        for who in ("tandem native", *peers)
    ]
    errors = [row["error"] for row in report.rows if row["who"] == "tandem native"]
    assert errors[0] < 1e-5 < errors[1] < 0.02 and 1e-5 < errors[2] < 0.02  # type: ignore[operator]
    assert all(row["ms"] for row in report.rows if row["who"] != "dynamic")
    assert linear.shapes(["gpt2"], ["int8"])[5] == linear.Shape(8, 768, 3072, "int8")
    assert linear.Shape(8, 768, 3072, "int8").work() == contenders.Work(
        2 * 8 * 768 * 3072, 768 * 3072 + 4 * 8 * (768 + 3072), reads=True
    )
    for name in ("8x768", "0x1x1", "gpt3"):
        with pytest.raises(ValueError, match=f"unknown shape '{name}'"):
            linear.shapes([name], ["fp32"])


@pytest.mark.skipif(TRITON_DEVICE is None, reason="needs triton")
def test_layers_of_a_gpu_are_checked_in_every_precision() -> None:
    device = torch.device(TRITON_DEVICE or "cpu")
    everyone = gpu_linear.contenders(256, 64, device, gpu_linear.PRECISIONS, None)
    assert list(everyone) == [*(f"tandem {name}" for name in gpu_linear.PRECISIONS), "eager"]
    x = torch.randn(3, 256, device=device).to(gpu_linear.DTYPE)
    assert all(0 < gpu_linear.error_of(contender, x) < 0.02 for contender in everyone.values())
    assert everyone["tandem int4"].nbytes == 256 * 64 * 9 // 16
    assert everyone["tandem int4-minimums"].nbytes == 256 * 64 * 10 // 16
    assert linear.sizes(["decode", "8x768x3072"])[-2:] == [(64, 11008, 4096), (8, 768, 3072)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures it")
def test_weights_that_only_a_gpu_measures_are_refused_without_one() -> None:
    with pytest.raises(ValueError, match="weights in fp8 are not measured here: choose from fp32, int8, int4"):
        linear.run(options(precisions=["fp8"]))


def test_attention_over_caches_of_every_type_is_measured() -> None:
    names = ["2x1:20x4:2x16", "2x3:20x4:4x16-bf16", "1x20:20x2:2x16-int8"]
    report = paged_attention.run(options(shapes=names, against=list(paged_attention.PEERS)))
    assert not report.failures
    assert [(row["dtype"], row["who"]) for row in report.rows] == [
        (dtype, who)
        for dtype, ours in (("fp32", ("pages", "native", "torch")), ("bf16", ("pages",)), ("int8", ("pages",)))
        for who in (*(f"tandem {name}" for name in ours), "eager", "sdpa")
    ]
    assert all(row["ms"] or "aligned top-left" in str(row["note"]) for row in report.rows)
    assert [row["note"] for row in report.rows].count("") == 10
    shape = paged_attention.Shape(2, 3, 20, 4, 2, 16, "bf16")
    assert shape.label == "2x3:20x4:2x16-bf16"
    pairs, cached, rows_moved = 18 + 19 + 20, 2 * 20 * 2 * 2, 2 * 3 * 4 * 4
    assert shape.work() == contenders.Work(4 * 2 * pairs * 4 * 16, 2 * 16 * (cached + rows_moved), reads=True)
    for name in ("2x1:20x4:3x16", "2x21:20x4:4x16", "2x1:20x4:4x16-fp4", "decoding"):
        with pytest.raises(ValueError, match=f"unknown shape '{name}'"):
            paged_attention.shapes([name])
    for name in ("2x1:20x4:4x16-fp8", "2x1:20x4:4x16-fp32-t5"):
        with pytest.raises(ValueError, match="is measured on a GPU alone"):
            paged_attention.run(options(shapes=[name]))


@pytest.mark.skipif(TRITON_DEVICE != "cpu", reason="needs Triton's interpreter")
def test_what_a_gpu_measures_of_paged_attention() -> None:
    names = ["2x1:20x4:2x16-bf16", "2x3:20x4:4x16-int8", "1x1:20x2:2x16-fp8", "1x20:20x2:2x16-fp32-t5"]
    report = paged_attention_gpu.run(options(shapes=names, against=["sdpa"]))
    assert not report.failures
    assert [(row["shape"], row["who"]) for row in report.rows] == [
        (name, who) for name in names for who in ("tandem triton", "sdpa")
    ]
    for row in report.rows:
        assert not row["note"]
        assert row["TB/s"] == pytest.approx(row["bytes"] / row["us"] / 1e6)  # type: ignore[operator]
    keys = 2 * 20 * 4 * (16 + 4)
    assert report.rows[2]["bytes"] == 2 * (keys + 2 * 3 * 4 * 16 * 2)
    assert all(shape.label for shapes in paged_attention_shapes.GPU_SHAPES.values() for shape in shapes)


@pytest.mark.skipif(TRITON_DEVICE != "cpu", reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (attention, "1x24x2x16-causal-t5"),
        (norm, "8x48-rms_norm_add"),
        (rotary, "4x128-halves"),
        (activation, "8x48-silu"),
        (cross_entropy, "8x50-smoothed"),
        (linear_cross_entropy, "8x16x50"),
    ],
)
def test_triton_kernels_take_part(operation, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "our_backends", lambda *_: ["triton"])
    monkeypatch.setattr(contenders, "our_backends", lambda *_: ["triton"])
    monkeypatch.setattr(measure, "interleaved", lambda runs, *_: dict.fromkeys(runs, Timing(1.0, 1.0, 1.0, 1)))
    report = operation.run(options(shapes=[shape], against=[]))
    assert not report.failures
    assert all(row["ms"] == 1000 for row in report.rows)
    deterministic = {row["mode"] for row in report.rows if row["who"] == "tandem triton, deterministic"}
    assert deterministic == ({"backward"} if operation is attention else set())


def test_the_bytes_of_an_operation_are_what_it_cannot_help_moving() -> None:
    def moved(operation, shape: str) -> tuple[float, float]:
        (report,) = [operation.run(options(shapes=[shape], against=[]))]
        return tuple(next(row["bytes"] for row in report.rows if row["mode"] == m) for m in ("forward", "backward"))  # type: ignore[return-value]

    one = 12 * 256 * 4
    assert moved(norm, "12x256-rms_norm") == (2 * one, 3 * one)
    assert moved(norm, "12x256-layer_norm_add") == (4 * one, 4 * one)
    assert moved(rotary, "12x256-halves") == (2 * one + 2 * 12 * 64 * 4,) * 2
    assert moved(activation, "12x256-silu") == (3 * one, 5 * one)
    assert moved(cross_entropy, "12x256-plain") == (one, 2 * one)


def test_rows_fill_more_than_a_cache() -> None:
    shapes = rows.shapes([], ["a", "b"], "widths")
    assert [(shape.width, shape.kind) for shape in shapes] == [(w, kind) for kind in "ab" for w in rows.WIDTHS]
    assert all(shape.rows * shape.width * 4 >= 32 << 20 for shape in shapes)
    assert rows.shapes(["8x16", "b"], ["a", "b"], "widths", [5], rows=3) == [
        rows.Rows(8, 16, "a"), rows.Rows(8, 16, "b"), rows.Rows(3, 5, "b"),
    ]  # fmt: skip


@pytest.mark.parametrize("operation", [norm, rotary, activation, cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("shape", ["widest", "0x5", "5x", "5x5-nothing", "5x5x5x5"])
def test_shapes_that_are_none_are_refused(operation, shape: str) -> None:
    with pytest.raises(ValueError, match=f"unknown shape {shape!r}: choose from"):
        operation.run(options(shapes=[shape]))


def test_a_rotary_width_is_whole_heads() -> None:
    with pytest.raises(ValueError, match="100"):
        rotary.run(options(shapes=["4x100"]))


def test_the_work_of_attention_is_counted_as_papers_count_it() -> None:
    full, causal = Shape(4, 4096, 4096, 16, 128), Shape(4, 4096, 4096, 16, 128, causal=True)
    assert full.forward(2).flops == 4 * 4 * 16 * 4096**2 * 128
    assert causal.forward(2).flops == full.forward(2).flops / 2
    assert full.backward(2).flops == 2.5 * full.forward(2).flops
    assert full.forward(2).bytes == 4 * (4 * 4096 * 16 * 128 * 2)
    assert full.backward(2).bytes == 8 * (4 * 4096 * 16 * 128 * 2)
    cross = Shape(1, 64, 512, 12, 64)
    assert cross.forward(4).bytes == 4 * 12 * 64 * (2 * 64 + 2 * 512)


def test_the_grid_of_flash_attention_3_is_the_papers() -> None:
    grid = SHAPES["fa3"]
    assert len(grid) == 3 * 6 * 2
    assert {shape.batch * shape.seqlen_q for shape in grid} == {16384}
    assert {shape.heads * shape.head_dim for shape in grid} == {2048}


@pytest.mark.parametrize("preset", SHAPES)
def test_a_shapes_label_names_it(preset: str) -> None:
    for shape in SHAPES[preset]:
        assert shapes([shape.label], on_gpu=False) == [shape]


def test_a_cpu_and_a_gpu_have_shapes_of_their_own() -> None:
    assert shapes([], on_gpu=False) == SHAPES["small"]
    assert shapes([], on_gpu=True) == [*SHAPES["fa3"], *SHAPES["t5"]]


def test_peers_that_write_all_scores_are_left_out_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "memory", lambda device: 1000)
    report = attention.run(options(shapes=["1x24x2x16"], modes=["forward"], against=["eager", "flash"]))
    assert {row["who"]: bool(row["note"]) for row in report.rows} == {
        "tandem native": False,
        "tandem torch": False,
        "flash": False,
        "eager": True,
    }
    assert not report.failures


def test_shape_parsing_reads_queries_and_keys() -> None:
    assert attention_shapes.shapes(["2x3:5x4x8-t5"], True) == [Shape(2, 3, 5, 4, 8, t5=True)]
