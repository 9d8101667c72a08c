"""A GGUF file gives the config and the weights that the Hugging Face folder it came from would have given."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from torch import Tensor

import models
from kernels.quantization import QuantizedWeight
from models.checkpoint import open_model
from models.files import CheckpointError
from models.gguf import blocks
from models.gguf import folder as gguf
from models.gguf.config import llama3_divisors
from models.gguf.folder import open_gguf
from models.sources import Quantization
from tests.models.gguf_files import Stored, smollm2, write

LLAMA = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA_METADATA = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8, "rope.freq_base": 5000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
T5 = {
    "vocab_size": 24, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0, "n_positions": 64,
}  # fmt: skip
T5_METADATA = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "decoder_block_count": 3,
    "feed_forward_length": 48, "attention.head_count": 4, "attention.key_length": 8,
    "attention.relative_buckets_count": 8, "attention.layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0,
}  # fmt: skip


def random_state(model: torch.nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def llama_state(tied: bool) -> dict[str, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    state = random_state(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    if tied:
        del state["lm_head.weight"]
    return state


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q and k."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def to_gguf(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, np.ndarray]:
    """The state under llama.cpp's names, which are given as replacements of parts."""
    tensors = {}
    for name, tensor in state.items():
        short = name
        for old, new in names.items():
            short = short.replace(old, new)
        heads = {"attn_q": 4, "attn_k": 2}.get(short.split(".")[-2]) if short.startswith("blk.") else None
        tensors[short] = tensor.numpy() if heads is None else interleaved(tensor.numpy(), heads)
    return tensors


LLAMA_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
}  # fmt: skip
T5_PARTS = {
    "shared": "token_embd", "lm_head": "output", "final_layer_norm": "output_norm", "encoder.": "enc.",
    "decoder.": "dec.", "block": "blk", "SelfAttention.relative_attention_bias": "attn_rel_b",
    "SelfAttention.": "attn_", "EncDecAttention.": "cross_attn_", "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up", "DenseReluDense.wi": "ffn_up", "DenseReluDense.wo": "ffn_down",
    "layer.0.layer_norm": "attn_norm", "layer.0.": "",
}  # fmt: skip


def t5_parts(name: str) -> dict[str, str]:
    last = {"enc": {"layer.1.layer_norm": "ffn_norm"}, "dec": {"layer.1.layer_norm": "cross_attn_norm"}}
    return T5_PARTS | last[name[:3]] | {"layer.2.layer_norm": "ffn_norm", "layer.1.": "", "layer.2.": ""}


def write_llama(path: Path, tied: bool = True, kind: Kind = Kind.F32, **changes: Any) -> Path:
    metadata = {key: value for key, value in (LLAMA_METADATA | changes).items() if value is not None}
    return write(path, "llama", metadata, to_gguf(llama_state(tied), LLAMA_PARTS), kind)


def check(weights: gguf.Weights, state: dict[str, Tensor]) -> None:
    assert sorted(weights.names()) == sorted(state)
    for name, tensor in state.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights.read(name), tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_comes_back_as_it_was(tied: bool, tmp_path: Path) -> None:
    config, weights, vocabulary = open_gguf(write_llama(tmp_path / "llama.gguf", tied))
    assert vocabulary is None
    expected = {"model_type": "llama", "head_dim": 8, "rope_scaling": None, "tie_word_embeddings": tied}
    assert {**config, **LLAMA, **expected} == config
    check(weights, llama_state(tied))


@pytest.mark.parametrize(("feed_forward", "tied"), [("gated-gelu", False), ("relu", True)])
def test_a_t5_comes_back_as_it_was(feed_forward: str, tied: bool, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj=feed_forward))
    dropped = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    state = {name: tensor for name, tensor in random_state(model).items() if name not in dropped}
    tensors = {}
    for name, tensor in state.items():
        tensors |= to_gguf({name: tensor}, t5_parts(name) if name[:3] in ("enc", "dec") else T5_PARTS)
    config, weights, _ = open_gguf(write(tmp_path / "t5.gguf", "t5", T5_METADATA, tensors))
    expected = {**T5, "model_type": "t5", "feed_forward_proj": feed_forward, "tie_word_embeddings": tied}
    assert {**config, **expected} == config
    check(weights, state)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_matrices_of_every_kind_are_dequantised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SLICE", 200)  # several slices, the last of them short
    values = np.random.default_rng(0).standard_normal((24, 32), np.float32)
    path = write(tmp_path / "one.gguf", "llama", LLAMA_METADATA, llama_tensors(token_embd=values), Kind[name])
    read = open_gguf(path)[1].read("model.embed_tokens.weight")
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.from_numpy(dequantize(quantize(values, Kind[name]), Kind[name])))
    assert (read - torch.from_numpy(values)).abs().max() < 0.5


NORM = np.ones(32, np.float32)


def llama_tensors(**changes: Stored) -> dict[str, Stored]:
    """Norms of two blocks and an embedding: the least that is a llama."""
    tensors = {"blk.0.attn_norm": NORM, "blk.1.attn_norm": NORM, "token_embd": np.zeros((24, 32), np.float32)}
    return {f"{name}.weight": tensor for name, tensor in (tensors | changes).items()}


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_that_only_llama_cpp_writes_are_dequantised(name: str, tmp_path: Path) -> None:
    values, size = GGML_QUANT_SIZES[Kind[name]]
    # Bytes under 0x3c: as the halves of a float16 scale they are finite, and anything will do for the rest.
    blocks = np.random.default_rng(0).integers(0, 0x3C, (24, 2 * size), np.uint8)
    path = write(tmp_path / "k.gguf", "llama", LLAMA_METADATA, llama_tensors(token_embd=(blocks, Kind[name])))
    read = open_gguf(path)[1].read("model.embed_tokens.weight")
    assert read.shape == (24, 2 * values)
    assert torch.equal(read, torch.from_numpy(dequantize(blocks, Kind[name])))


def quantized_weight(path: Path, name: str = "model.embed_tokens.weight") -> QuantizedWeight:
    weight = open_gguf(path)[1].quantized(name)
    assert weight is not None
    return weight


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1"])
def test_four_bits_are_kept_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SLICE", 200)
    values = np.random.default_rng(0).standard_normal((24, 64), np.float32)
    path = write(tmp_path / "one.gguf", "llama", LLAMA_METADATA, llama_tensors(token_embd=values), Kind[name])
    weight = quantized_weight(path)
    assert (weight.bits, weight.group, weight.symmetric) == (4, 32, name == "Q4_0")
    assert torch.equal(weight.dequantize(), open_gguf(path)[1].read("model.embed_tokens.weight"))


def test_q4_k_is_kept_but_for_its_scales_rounding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (24, 2, 144), np.uint8)
    stored[..., :4] = rng.uniform(0.01, 0.02, (24, 2, 2)).astype(np.float16).view(np.uint8)  # the two factors
    tensors = llama_tensors(token_embd=(stored.reshape(24, 288), Kind.Q4_K))
    path = write(tmp_path / "k.gguf", "llama", LLAMA_METADATA, tensors)
    weight, exact = quantized_weight(path), open_gguf(path)[1].read("model.embed_tokens.weight")
    assert (weight.bits, weight.group, weight.symmetric) == (4, 32, False)
    assert weight.minimums is not None
    steps, minimums = (t.float().abs().repeat_interleave(32, dim=1) for t in (weight.scales, weight.minimums))
    assert ((weight.dequantize() - exact).abs() <= 0.0075 * steps + 0.0005 * minimums).all()


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1", "Q8_0", "Q6_K"])
def test_other_kinds_become_eight_bits_a_row(name: str, tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[Kind[name]]
    stored = np.random.default_rng(0).integers(0, 0x3C, (24, 512 // block * size), np.uint8)
    path = write(tmp_path / "k.gguf", "llama", LLAMA_METADATA, llama_tensors(token_embd=(stored, Kind[name])))
    weight, exact = quantized_weight(path), open_gguf(path)[1].read("model.embed_tokens.weight")
    assert weight.bits == 8
    assert ((weight.dequantize() - exact).abs() <= 0.501 / 127 * exact.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_not_quantised(name: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf", kind=Kind[name])
    assert all(open_gguf(path)[1].quantized(name) is None for name in open_gguf(path)[1].names())


def write_quantised_llama(path: Path, kind: Kind, **others: Kind) -> Path:
    """A llama of the kind, but for the parts that ``others`` names and for rows that are no whole blocks."""
    tensors: dict[str, Stored] = {}
    for name, values in to_gguf(llama_state(True), LLAMA_PARTS).items():
        own = Kind.F32 if values.ndim == 1 or values.shape[1] % 32 else others.get(name.split(".")[-2], kind)
        tensors[name] = (quantize(values, own), own)
    return write(path, "llama", LLAMA_METADATA, tensors)


def quantised(path: Path, quantization: Quantization) -> dict[str, QuantizedWeight]:
    weights = ((names[0], weight) for names, weight in open_model(path, quantization)[2])
    return {name: weight for name, weight in weights if isinstance(weight, QuantizedWeight)}


def test_a_quantised_file_is_loaded_as_it_is_stored(tmp_path: Path) -> None:
    path = write_quantised_llama(tmp_path / "llama.gguf", Kind.Q4_0)
    model, _ = models.load(path, quantization="auto")
    floats, _ = models.load(path)
    for (name, ours), theirs in zip(model.named_parameters(), floats.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    found = quantised(path, "auto")
    qkv = found["decoder.blocks.0.attention.qkv.weight"]
    assert (qkv.bits, qkv.shape, qkv.symmetric) == (4, (64, 32), True)
    assert "decoder.blocks.0.ffn.down.weight" not in found


def test_stacked_rows_of_different_kinds_become_the_widest(tmp_path: Path) -> None:
    path = write_quantised_llama(tmp_path / "mixed.gguf", Kind.Q4_1, attn_v=Kind.Q8_0)
    exact = dict(models.load(path)[0].named_parameters())
    key = "decoder.blocks.1.attention.qkv.weight"
    bits: dict[Quantization, int] = {"auto": 8, "int8": 8, "int4": 4}
    for quantization, expected in bits.items():
        weight = quantised(path, quantization)[key]
        assert (weight.bits, weight.symmetric) == (expected, expected == 8)
        error = (weight.dequantize() - exact[key]).norm(dim=1)
        assert (error < 0.12 * exact[key].norm(dim=1)).all()
        assert expected == 8 or not error[:48].any()  # q and k stay as they are


def test_llama_3_positions_are_known_by_their_divisors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    theirs = LlamaConfig(head_dim=64, rope_parameters={**scaling, "rope_theta": 500_000.0})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    divisors = (plain / frequencies).numpy()
    np.testing.assert_allclose(divisors, llama3_divisors(scaling, 64, 500_000.0), rtol=1e-5)
    metadata = LLAMA_METADATA | {"rope.dimension_count": 64, "rope.freq_base": 500_000.0}
    for table, expected in ((divisors, scaling), (np.ones(32, np.float32), None)):
        tensors = llama_tensors(rope_freqs=table.astype(np.float32))
        config, weights, _ = open_gguf(write(tmp_path / "rope.gguf", "llama", metadata, tensors))
        assert config["rope_scaling"] == expected
        assert "rope_freqs.weight" not in weights.names()
    tensors = llama_tensors(rope_freqs=np.linspace(1, 3, 32, dtype=np.float32))
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        open_gguf(write(tmp_path / "rope.gguf", "llama", metadata, tensors))


PEAK = """
import sys, torch
from pathlib import Path
from models.gguf.folder import open_gguf

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

_, weights, _ = open_gguf(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = resident("VmRSS")
model = {name: weights.read(name) for name in weights.names()}
print((resident("VmHWM") - before) / sum(tensor.nbytes for tensor in model.values()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads its memory from Linux's /proc")
def test_dequantising_takes_little_more_memory_than_the_result(tmp_path: Path) -> None:
    tensors = {f"blk.{block}.ffn_up.weight": np.ones((1 << 10, 1 << 10), np.float32) for block in range(24)}
    tensors["token_embd.weight"] = NORM[None]
    path = write(tmp_path / "big.gguf", "llama", LLAMA_METADATA | {"block_count": 24}, tensors, Kind.F16)
    command = [sys.executable, "-W", "error", "-c", PEAK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.15


def test_the_real_file_reads_as_gguf_reads_it() -> None:
    config, weights, _ = open_gguf(smollm2())
    assert config["num_hidden_layers"] == 30
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"]
    assert len(weights.names()) == 272
    theirs = {tensor.name: tensor for tensor in GGUFReader(smollm2()).tensors}
    for source, name, heads in (
        ("blk.29.attn_k", "self_attn.k_proj", 3),
        ("blk.29.attn_q", "self_attn.q_proj", 9),
        ("blk.29.ffn_down", "mlp.down_proj", None),
    ):
        expected = theirs[f"{source}.weight"]
        read = weights.read(f"model.layers.29.{name}.weight").numpy()
        values = read if heads is None else interleaved(read, heads)
        assert np.array_equal(values, dequantize(expected.data, expected.tensor_type))


@pytest.mark.slow
def test_the_real_file_reads_as_transformers_reads_it() -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate's help")
    file = smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = theirs.state_dict()
    del state["lm_head.weight"]  # the embedding again
    check(open_gguf(file)[1], state)


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(write_llama(path).read_bytes()))


def patched(position: int, layout: str, *values: int) -> Callable[[Path], object]:
    new = struct.pack(layout, *values)
    return damaged(lambda data: data[:position] + new + data[position + len(new) :])


def hostile_array(kind: int, count: int) -> Callable[[Path], object]:
    """A header with one entry, an array of so many things that are not there."""
    entry = struct.pack("<Q1sIIQ", 1, b"a", 9, kind, count)
    return lambda path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)


def llama(**changes: Any) -> Callable[[Path], object]:
    return lambda path: write_llama(path, **{key.replace("__", "."): value for key, value in changes.items()})


def other_tensor(name: str, values: Stored) -> Callable[[Path], object]:
    return lambda path: write(path, "llama", LLAMA_METADATA, llama_tensors() | {name: values})


EMBEDDING_SHAPE = b"token_embd.weight" + struct.pack("<IQQ", 2, 32, 24)  # the type's number comes next
BREAKAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "is missing"),
    (lambda path: path.mkdir(), "is no GGUF file we can read"),
    (lambda path: path.write_bytes(b""), "is no GGUF file we can read"),
    (lambda path: path.write_bytes(b"PK" * 100), "does not begin with GGUF"),
    (damaged(lambda data: data[:-100]), "truncated"),
    (damaged(lambda data: data[:200]), "truncated"),
    (damaged(lambda data: data[:30]), "truncated"),
    (patched(4, "<I", 1), "version is 1"),
    (patched(4, ">I", 3), "big-endian"),
    (patched(8, "<Q", 1 << 60), "truncated or corrupt"),
    (patched(16, "<Q", 1 << 60), "truncated or corrupt"),
    (patched(24, "<Q", 1 << 60), "truncated or corrupt"),
    (damaged(lambda data: data.replace(EMBEDDING_SHAPE + b"\0", EMBEDDING_SHAPE + b"c")), "unknown to us, number 99"),
    (damaged(lambda data: data.replace(EMBEDDING_SHAPE + b"\0", EMBEDDING_SHAPE + b"\x0c")), "blocks of 256 for Q4_K"),
    (hostile_array(0, 1 << 60), "truncated or corrupt"),
    (hostile_array(8, 1 << 60), "truncated or corrupt"),
    (hostile_array(9, 3), "array of unknown type 9"),
    (hostile_array(77, 3), "array of unknown type 77"),
    (lambda path: write(path, "t5encoder", {}, {}), "architecture 't5encoder': expected one of llama, t5"),
    (lambda path: write(path, "gemma3", {}, {}), "architecture 'gemma3'"),
    (llama(embedding_length=None), "llama.embedding_length is None"),
    (llama(attention__head_count=[4, 4]), r"head_count is \[4, 4\]"),
    (llama(attention__layer_norm_rms_epsilon=0.0), "expected a positive number"),
    (llama(block_count=1 << 23), "tensors of 2"),
    (llama(expert_count=8), "mixture of experts"),
    (llama(rope__dimension_count=4, attention__key_length=8), "turn 4 of 8"),
    (llama(rope__scaling__type="yarn"), "scaled by yarn"),
    (llama(attention__head_count_kv=3), "not pairs of rows a head"),
    (other_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)), "holds 'blk.0.attn_sinks.weight', which no"),
    (other_tensor("blk.1.ffn_up.weight", (np.ones((4, 32), np.int32), Kind.I32)), "is I32, which cannot be deq"),
    (llama(block_count=3), "block_count is 3, but there are tensors of 2"),
    (lambda path: write(path, "llama", LLAMA_METADATA, {"blk.0.attn_norm.weight": NORM}), "no token_embd.weight"),
]


@pytest.mark.parametrize(("make", "message"), BREAKAGES)
def test_a_broken_file_is_one_sentence(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gguf(tmp_path / "model.gguf")[1].read("model.layers.0.self_attn.k_proj.weight")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
