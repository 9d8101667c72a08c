"""AWQ's and GPTQ's files, packed here as AutoAWQ and AutoGPTQ pack them, read as the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from kernels.quantization import QuantizedWeight
from models.checkpoint import open_model
from models.files import CheckpointError
from models.packed_file import PackedFile
from tests.models.made_folders import llama_config, llama_shapes, write

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each half byte of an int32 holds, from the low end
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
NO_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def pack(values: np.ndarray, order: tuple[int, ...]) -> Tensor:
    """(rows, 8 * columns) of 0 to 15 as int32 (rows, columns), number by number."""
    packed = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for row in range(values.shape[0]):
        for column in range(packed.shape[1]):
            for place, which in enumerate(order):
                packed[row, column] |= np.uint32(int(values[row, 8 * column + which]) << (4 * place))
    return torch.from_numpy(packed.view(np.int32))


def packed_parts(
    config: dict[str, Any], shape: tuple[int, int], rng: np.random.Generator, zero: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix (out, in) as the method's tensors, and as floats."""
    outputs, inputs = shape
    group = inputs if config["group_size"] == -1 else config["group_size"]
    values = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(0, 16, (inputs // group, outputs)) if zero is None else np.full((inputs // group, outputs), 8)
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    exact = (values - zeros.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)
    if config["quant_method"] == "awq":
        parts = {"qweight": pack(values, AWQ_ORDER), "qzeros": pack(zeros, AWQ_ORDER)}
    else:
        stored = zeros if config.get("checkpoint_format") == "gptq_v2" else (zeros - 1) % 16
        parts = {"qweight": pack(values.T, NO_ORDER).t().contiguous(), "qzeros": pack(stored, NO_ORDER)}
        parts["g_idx"] = torch.arange(inputs, dtype=torch.int32) // group
    return parts | {"scales": torch.from_numpy(scales)}, torch.from_numpy(exact.T.astype(np.float32))


class Tensors:
    """Weights in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def quantized(self, name: str) -> None:
        return None


def opened(config: dict[str, Any], parts: dict[str, Tensor]) -> PackedFile:
    return PackedFile(Tensors({f"x.{name}": tensor for name, tensor in parts.items()}), config, Path("folder"))


@pytest.mark.parametrize(("size", "own"), [(32, 32), (64, 64), (96, 32), (128, 64), (-1, 64)])
@pytest.mark.parametrize("config", [AWQ, GPTQ, V2], ids=["awq", "gptq", "gptq_v2"])
def test_a_matrix_is_what_was_packed(
    config: dict[str, Any], size: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.packed_file.COLUMNS", 2)  # several slices, the last of them short
    config = config | {"group_size": size}
    shape = (40, 384 if size != -1 else 64)
    parts, exact = packed_parts(config, shape, np.random.default_rng(0))
    file = opened(config, parts)
    assert file.names() == ["x.weight"]
    assert file.shape("x.weight") == shape
    weight = file.quantized("x.weight")
    assert weight is not None
    assert (weight.shape, weight.group, weight.symmetric) == (shape, own, False)
    steps = weight.scales.float().repeat_interleave(own, dim=1)
    assert ((weight.dequantize() - exact).abs() <= 0.0075 * steps).all()
    assert torch.equal(file.read("x.weight"), weight.dequantize())


@pytest.mark.parametrize("config", [AWQ, GPTQ, V2], ids=["awq", "gptq", "gptq_v2"])
def test_symmetric_weights_need_no_minimums(config: dict[str, Any]) -> None:
    parts, exact = packed_parts(config, (16, 96), np.random.default_rng(0), zero=8)
    weight = opened(config, parts).quantized("x.weight")
    assert weight is not None and weight.symmetric
    assert torch.equal(weight.dequantize(), exact)


def packed_llama(folder: Path, config: dict[str, Any], zero: int | None = None) -> dict[str, Tensor]:
    """A small llama with packed linear layers, and the weights that it stands for."""
    ours = llama_config(ffn=64)
    write(folder, ours, llama_shapes(ours))
    rng, exact = np.random.default_rng(0), load_file(folder / "model.safetensors")
    tensors = {name: tensor.half() for name, tensor in exact.items()}
    for name in [name for name in exact if "_proj" in name]:
        rows, columns = tensors.pop(name).shape
        parts, exact[name] = packed_parts(config, (rows, columns), rng, zero)
        tensors |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(ours | {"quantization_config": config}))
    return exact


@pytest.mark.parametrize("config", [AWQ, GPTQ, V2], ids=["awq", "gptq", "gptq_v2"])
def test_a_folder_is_loaded_as_floats_or_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    exact = packed_llama(tmp_path, config)
    wanted = torch.cat([exact[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    for quantization in (None, "auto", "int4"):
        model, _ = models.load(tmp_path, quantization=quantization)  # type: ignore[arg-type]
        torch.testing.assert_close(model.decoder.blocks[1].attention.qkv.weight.detach(), wanted, rtol=0, atol=8e-4)
    found = {names[0]: weight for names, weight in open_model(tmp_path, "auto")[2]}
    qkv, up = found["decoder.blocks.1.attention.qkv.weight"], found["decoder.blocks.0.ffn.up.weight"]
    assert isinstance(qkv, QuantizedWeight) and isinstance(up, QuantizedWeight)
    assert (qkv.shape, qkv.bits, up.shape, up.bits) == ((64, 32), 4, (128, 32), 4)
    head = found["lm_head.weight"]
    assert isinstance(head, Tensor) and head.dtype == torch.float16


def test_biases_of_zeros_belong_to_layers_without_one(tmp_path: Path) -> None:
    packed_llama(tmp_path, GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {name: torch.zeros(32)}, tmp_path / "model.safetensors")
    models.load(tmp_path)
    save_file(tensors | {name: torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"has 1 weights the model lacks, the first {name}"):
        models.load(tmp_path)


def test_layers_stored_the_other_way_round_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60, "n_positions": 64,
              "quantization_config": GPTQ}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (60, 32), "wpe.weight": (64, 32)}
    for name, rows in (("attn.c_attn", 96), ("attn.c_proj", 32), ("mlp.c_fc", 128), ("mlp.c_proj", 32)):
        shapes[f"h.0.{name}.weight"], shapes[f"h.0.{name}.bias"] = (32 if "mlp.c_p" not in name else 128, rows), (rows,)
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    parts, _ = packed_parts(GPTQ, (32, 32), np.random.default_rng(0))
    del tensors["h.0.attn.c_proj.weight"]
    tensors |= {f"h.0.attn.c_proj.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for quantization in (None, "auto"):
        with pytest.raises(CheckpointError, match=r"c_proj.weight is quantised, which this family"):
            models.load(tmp_path, quantization=quantization)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("awq", "quantization_config is 'awq': expected an object"),
        ({"quant_method": "fp8"}, "quantization_config of 'fp8' is not supported: expected awq or gptq"),
        ({"load_in_4bit": True}, "of 'None' is not supported"),
        (AWQ | {"bits": 8}, "awq in 8 bits is not supported: expected 4"),
        ({"quant_method": "gptq", "group_size": 32}, "lacks 'bits'"),
        (AWQ | {"group_size": "all"}, "group_size in config.json is 'all'"),
        (AWQ | {"group_size": 16}, "group_size 16 is not supported"),
        (AWQ | {"group_size": 0}, "group_size 0 is not supported"),
        (AWQ | {"version": "gemv"}, "version 'gemv' of awq is not supported: expected gemm"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' of gptq is not supported"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format True is not supported"),
    ],
)
def test_a_method_that_we_lack_is_named(config: Any, message: str, tmp_path: Path) -> None:
    packed_llama(tmp_path, AWQ)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path)


NAME = "model.layers.1.mlp.up_proj"


def changed(part: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], object]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(f"{NAME}.{part}")
        if change is not None:
            tensors[f"{NAME}.{part}"] = change(tensor).contiguous()

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("scales", None), f"has {NAME}.qweight, but no {NAME}.scales"),
        (changed("qzeros", None), f"has {NAME}.qweight, but no {NAME}.qzeros"),
        (changed("qweight", None), "lacks 1 weights of the model, the first model.layers.1.mlp.gate_proj.weight"),
        (changed("qweight", lambda x: x[:, :-8]), f"{NAME}.qzeros is|{NAME}.weight is .*, the config asks for"),
        (changed("qweight", lambda x: x[:-1]), "which is no multiple of"),
        (changed("qweight", lambda x: x.long()), f"{NAME}.qweight holds torch.int64, expected torch.int32"),
        (changed("qweight", lambda x: x[0]), "expected a matrix"),
        (changed("qzeros", lambda x: x.float()), f"{NAME}.qzeros holds torch.float32, expected torch.int32"),
        (changed("qzeros", lambda x: x[:, :-1]), f"{NAME}.qzeros is"),
        (changed("scales", lambda x: torch.cat((x, x))), f"{NAME}.scales is"),
        (changed("scales", lambda x: x.float() * 1e9), f"{NAME}.scales holds numbers that float16 does not"),
        (changed("g_idx", lambda x: x.flip(0) + 1), f"{NAME}.g_idx reorders inputs"),
        (changed("g_idx", lambda x: x[:-1]), f"{NAME}.g_idx reorders inputs"),
    ],
)
@pytest.mark.parametrize("quantization", [None, "auto"])
def test_a_broken_file_is_one_sentence(
    damage: Callable[[dict[str, Tensor]], object], message: str, quantization: Any, tmp_path: Path
) -> None:
    packed_llama(tmp_path, GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path, quantization=quantization)


def test_the_order_of_inputs_matters_only_where_it_differs() -> None:
    parts, exact = packed_parts(GPTQ, (8, 64), np.random.default_rng(0), zero=8)
    del parts["g_idx"]
    assert torch.equal(opened(GPTQ, parts).read("x.weight"), exact)
    with pytest.raises(CheckpointError, match=r"x.g_idx reorders inputs \(desc_act\)"):
        opened(GPTQ, parts | {"g_idx": torch.arange(64) % 2}).read("x.weight")
