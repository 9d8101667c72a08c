"""A checkpoint's weights as quantised ones: which are, in which form, and what they stand for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from kernels.quantization import QuantizedWeight, quantize
from models.assembly import Weight
from models.checkpoint import open_model
from models.files import CheckpointError
from models.sources import Quantization
from tests.models import small_families
from tests.models.made_folders import llama_config, llama_shapes, t5_config, t5_shapes, write

# Of every family a matrix that is transposed, stacked or reordered is among these.
FAMILIES = ["gpt2", "llama", "gpt_neox", "phi", "gemma2", "t5-1.1", "bart", "marian-two-vocabularies"]
# Rows that are whole groups of four bits, as those of the families' odd sizes are not.
WHOLE_GROUPS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4},
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96},
    "t5-1.1": {"d_model": 64, "d_ff": 96},
}


def weights_of(folder: Path, quantization: Quantization | None) -> dict[str, Weight]:
    return {name: weight for names, weight in open_model(folder, quantization)[2] for name in names}


def is_linear(name: str, floats: dict[str, Tensor]) -> bool:
    """Whether a weight is quantised: matrices are, but for tables of positions and of relative biases."""
    return floats[name].dim() == 2 and "positions" not in name and "relative_bias" not in name


def is_vocabulary(name: str) -> bool:
    return name == "lm_head.weight" or "embedding.tokens" in name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in FAMILIES), *WHOLE_GROUPS.items()],
    ids=[*FAMILIES, *(f"{name}-whole-groups" for name in WHOLE_GROUPS)],
)  # fmt: skip
def test_linear_layers_and_embeddings_are_quantised(
    name: str, changes: dict[str, Any], quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = small_families.CASES[name]
    monkeypatch.setitem(small_families.CASES, name, (kind, options | changes))
    small_families.save(small_families.build(name), tmp_path)
    model, _ = models.load(tmp_path)
    floats = {key: tensor.detach() for key, tensor in model.named_parameters(remove_duplicate=False)}
    found = weights_of(tmp_path, quantization)
    assert set(found) == set(floats)
    reference = dict(models.load(tmp_path, quantization=quantization)[0].named_parameters(remove_duplicate=False))
    assert (
        any(isinstance(w, QuantizedWeight) and w.bits == 4 for w in found.values())
        or quantization == "int8"
        or not changes
    )
    for key, weight in found.items():
        assert isinstance(weight, QuantizedWeight) == is_linear(key, floats), key
        if isinstance(weight, Tensor):
            assert torch.equal(weight, floats[key])
            assert torch.equal(reference[key], floats[key])
            continue
        in_four = quantization == "int4" and not is_vocabulary(key) and weight.shape[1] % 32 == 0
        assert weight.bits == (4 if in_four else 8)
        expected = quantize(floats[key], weight.bits).dequantize()
        assert torch.equal(weight.dequantize(), expected), key
        assert torch.equal(reference[key], expected), key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, llama_config(), llama_shapes(llama_config()))


def test_four_bits_where_rows_divide_into_groups(folder: Path) -> None:
    found = weights_of(folder, "int4")
    bits = {name: weight.bits for name, weight in found.items() if isinstance(weight, QuantizedWeight)}
    assert bits["decoder.blocks.1.attention.qkv.weight"] == 4  # 32 inputs
    assert bits["decoder.blocks.1.ffn.down.weight"] == 8  # 48
    assert bits["lm_head.weight"] == bits["decoder.embedding.tokens.weight"] == 8  # 32, but a row for each token


def test_tied_weights_come_once(tmp_path: Path) -> None:
    write(tmp_path, t5_config(), t5_shapes(t5_config()))
    names = [names for names, _ in open_model(tmp_path, "int8")[2]]
    (tied,) = [each for each in names if "lm_head.weight" in each]
    assert sorted(tied) == ["decoder.embedding.tokens.weight", "encoder.embedding.tokens.weight", "lm_head.weight"]
    assert len({name for each in names for name in each}) == sum(map(len, names))


def test_floats_stay_floats_unless_asked(folder: Path) -> None:
    plain, auto = weights_of(folder, None), weights_of(folder, "auto")
    for name, weight in plain.items():
        assert isinstance(weight, Tensor)
        assert torch.equal(weight, auto[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_the_floats_of_quantised_weights_have_the_dtype_asked_for(dtype: torch.dtype | None, folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = models.load(folder, dtype=dtype, quantization="int8")
    assert {p.dtype for p in model.parameters()} == ({torch.bfloat16, torch.float32} if dtype is None else {dtype})
    expected = quantize(tensors["model.layers.0.mlp.down_proj.weight"], 8).dequantize(dtype or torch.float32)
    assert torch.equal(model.decoder.blocks[0].ffn.down.weight, expected)


def test_a_half_precision_t5_keeps_its_float32_layer(tmp_path: Path) -> None:
    write(tmp_path, t5_config(), t5_shapes(t5_config()))
    model, _ = models.load(tmp_path, dtype=torch.float16, quantization="int8")
    feed_forward = model.decoder.blocks[0].ffn
    assert (feed_forward.up.weight.dtype, feed_forward.down.weight.dtype) == (torch.float16, torch.float32)


def test_what_cannot_be_quantised_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantization is 'int3': expected None, auto, int8, int4"):
        open_model(folder, "int3")  # type: ignore[arg-type]
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight cannot be quantised: a weight is nan"):
        models.load(folder, quantization="int4")


def test_shapes_are_checked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"the config asks for"):
        models.load(folder, quantization="int8")


PEAK = """
import sys
from pathlib import Path
from models.checkpoint import open_model

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

list(open_model(sys.argv[1], sys.argv[3])[2])  # whatever the first load brings into memory for good
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
model = list(open_model(sys.argv[2], sys.argv[3])[2])
print((resident("VmHWM") - before) / 2**20, sum(weight.nbytes for _, weight in model) / 2**20)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads its memory from Linux's /proc")
def test_quantising_peaks_at_the_result_and_a_tensor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = llama_config(dim=1024, depth=6, ffn=3072, vocab=2000)
    large = write(tmp_path_factory.mktemp("large"), config, llama_shapes(config))
    command = [sys.executable, "-W", "error", "-c", PEAK, str(folder), str(large), "int8"]
    peak, result = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    # The largest tensor, 24 MiB of mapped float32, becomes 6 MiB, and what works on a slice of it takes its share.
    assert peak < result + 36
