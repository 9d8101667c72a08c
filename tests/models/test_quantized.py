"""Models whose linear layers are quantised on the device: their weights, their logits, and what is generated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.options import EngineOptions
from engine.runners import open_checkpoint
from kernels.backend import TRITON_DEVICE
from models import checkpoint, quantized
from models.layers import Linear
from models.quantized import DeviceQuantization, QuantizedFeedForward, QuantizedLinear, quantized_copy
from models.transformer import DecoderOnly, EncoderDecoder
from tests.conftest import tiny_model

pytestmark = pytest.mark.skipif(TRITON_DEVICE is None, reason="needs triton")
DEVICE = torch.device(TRITON_DEVICE or "cpu")
T5 = {"positions": "relative", "norm": "rmsnorm", "activation": "geglu_new", "head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("decoder_only", {"activation": "swiglu", "tie_embeddings": False}),
    "decoder-tied": ("decoder_only", {"activation": "gelu_new", "tie_embeddings": True, "ffn_bias": True}),
    "t5": ("encoder_decoder", {**T5, "encoder_depth": 2, "tie_embeddings": True, "share_embeddings": True}),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_QUANTIZATION = pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])


def model_of(kind: str) -> DecoderOnly | EncoderDecoder:
    architecture, changes = KINDS[kind]
    return tiny_model(architecture, dim=64, **changes)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint.save(folder, model_of(request.param), None)
    return folder


def load(folder: Path, quantization: DeviceQuantization, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    return quantized.load(folder, DEVICE, dtype, quantization, backend)[0]


def logits_of(model: Any) -> Tensor:
    tokens = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        return model(tokens, tokens.flip(1)) if isinstance(model, EncoderDecoder) else model(tokens)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_stand_for_the_floats_that_loading_gives(folder: Path, quantization: DeviceQuantization) -> None:
    model, floats = load(folder, quantization, "triton"), checkpoint.load(folder, quantization=quantization)[0]
    plain = checkpoint.load(folder)[0]
    assert not any(isinstance(module, Linear) for module in model.modules())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert sum(isinstance(module, Linear) for module in floats.modules()) == len(layers)
    for name, layer in layers.items():
        same = floats.get_submodule(name)
        assert isinstance(same, Linear)
        assert torch.equal(layer.weight.dequantize().cpu(), same.weight)
        assert layer.weight.bits == (4 if quantization == "int4" and name != "lm_head" else 8)
        assert (layer.bias is None) == (same.bias is None)
    tables = [name for name, _ in plain.named_parameters() if "tokens" in name]
    for name in tables:
        assert torch.equal(model.get_parameter(name).cpu(), plain.get_parameter(name))


@EACH_QUANTIZATION
def test_logits_are_those_of_the_same_floats(folder: Path, quantization: DeviceQuantization) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        ours, expected = (logits_of(load(folder, quantization, name, dtype)) for name in ("triton", "reference"))
        assert ours.dtype == dtype
        assert (ours.float() - expected.float()).std() <= tolerance * expected.float().std()


@EACH_QUANTIZATION
def test_greedy_search_finds_the_same_tokens(folder: Path, quantization: DeviceQuantization) -> None:
    found = []
    for name in ("triton", "reference"):
        llm = LLM.from_model(load(folder, quantization, name), None, backend="torch", max_num_seqs=4)
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        prompts = [{"prompt_token_ids": [5, 9, 11]}, {"prompt_token_ids": [7]}]
        found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1]


@EACH_KIND
@EACH_QUANTIZATION
def test_a_live_models_copy(kind: str, quantization: DeviceQuantization) -> None:
    model = model_of(kind).to(DEVICE)
    before = copy.deepcopy(model.state_dict())
    twin = quantized_copy(model, quantization, "triton")
    assert twin.generation is model.generation
    plain = logits_of(model)
    error = (logits_of(twin) - plain).std() / plain.std()
    assert 0 < error < (0.5 if quantization == "int4" else 0.2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert twin.decoder.embedding.tokens.weight.data_ptr() == model.decoder.embedding.tokens.weight.data_ptr()


def test_activations_join_the_first_layer(folder: Path) -> None:
    model = load(folder, "int8", "triton")
    assert all(isinstance(block.ffn, QuantizedFeedForward) for block in model.decoder.blocks)


def test_a_half_precision_t5_keeps_its_float32_layer() -> None:
    model = tiny_model("encoder_decoder", dim=64, **T5, encoder_depth=2, float32_residual=True).half()
    for block in (*model.encoder.blocks, *model.decoder.blocks):  # type: ignore[union-attr]
        block.ffn.down.float()
    model = model.to(DEVICE)
    twin = quantized_copy(model, "int8", "triton")
    ffn = twin.decoder.blocks[0].ffn
    assert (ffn.up.weight.dtype, ffn.down.weight.dtype) == (torch.float16, torch.float32)  # type: ignore[union-attr]
    assert ffn(torch.randn(3, 64, device=DEVICE).half()).dtype == torch.float32  # type: ignore[operator]
    assert torch.isfinite(logits_of(twin)).all()


def test_an_engine_packs_where_our_kernels_run(folder: Path) -> None:
    options = EngineOptions.of({"backend": "triton", "quantization": "int8"})
    model, _, apart = open_checkpoint(folder, options, DEVICE, torch.float32)
    assert apart is None
    assert isinstance(model.lm_head, QuantizedLinear)
    plain, _, _ = open_checkpoint(folder, EngineOptions.of({"backend": "triton"}), DEVICE, torch.float32)
    assert isinstance(plain.lm_head, Linear)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_fp8_elsewhere_is_one_sentence(folder: Path, backend: str) -> None:
    with pytest.raises(ValueError, match=r"quantization='fp8' needs .*"):
        LLM(folder, device="cpu", backend=backend, quantization="fp8")
    with pytest.raises(ValueError, match=r"quantization='fp8' needs .*"):
        LLM.from_model(model_of("decoder"), None, device="cpu", backend=backend, quantization="fp8")
    with pytest.raises(ValueError, match="quantization is 'fp8'"):
        checkpoint.load(folder, quantization="fp8")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH_QUANTIZATION
def test_an_engine_on_the_device(folder: Path, quantization: str) -> None:
    llm = LLM(folder, device="cuda", quantization=quantization, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": [5, 9, 11]}] * 2, params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert isinstance(llm.model.lm_head, QuantizedLinear)
