"""Which runner an engine has, and the memory of its cache."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.decode_graphs import DecodeGraphs
from engine.kv_cache import KVCache
from engine.native_runner import NativeRunner, NativeStorage
from engine.options import EngineOptions
from engine.runner import Runner, TorchRunner
from engine.tensor_cache import TensorStorage
from kernels.backend import TRITON_DEVICE, available, choose, triton_serves
from kernels.cached_attention import CacheFormat
from models import checkpoint, quantized
from models.assembly import NamedWeights
from models.config import TransformerConfig
from models.native import Weights, lower
from models.quantized import FLOAT8
from models.tokenizer import Tokenizer
from models.transformer import DecoderOnly, EncoderDecoder

if TRITON_DEVICE is not None:
    from kernels.gpu.target import serves_float8


def open_checkpoint(
    folder: str | Path, options: EngineOptions, device: torch.device, dtype: torch.dtype
) -> tuple[DecoderOnly | EncoderDecoder, Tokenizer | None, NamedWeights | None]:
    """A checkpoint's model and tokenizer; with its weights apart where the C++ core runs it, else in the model."""
    packs, quantization = options.packs_for_device(device), options.quantization
    if options.runs_native(device):
        assert quantization != FLOAT8
        return checkpoint.open_model(folder, quantization, dtype=dtype)
    if packs and quantization is not None:
        return *quantized.load(folder, device, dtype, quantization, options.linear_backend), None
    assert quantization != FLOAT8
    return *checkpoint.load(folder, device, dtype, quantization), None


def runner_of(
    model: DecoderOnly | EncoderDecoder, weights: NamedWeights | None, options: EngineOptions
) -> Runner:  # fmt: skip
    """A runner of the weights that are apart, or where there are none of the model as it is, and a cache for it."""
    options.check_invariance(native=weights is not None)
    return torch_runner(model, options) if weights is None else native_runner(model, weights, options)


def torch_runner(model: DecoderOnly | EncoderDecoder, options: EngineOptions) -> TorchRunner:
    """A runner of a model that has its weights."""
    config, weight = model.config, next(model.parameters())
    backend = None if options.backend == "auto" else options.backend
    serving = available(weight.device, triton=triton_serves(weight))
    ragged = choose("the engine's cache", serving, backend) == "triton"
    dtype = options.cache_dtype(weight.dtype)
    if ragged and dtype == torch.float8_e4m3fn and not serves_float8():
        raise ValueError("kv_cache_dtype is fp8, which needs a GPU of compute capability 8.9 or later")
    per_block = TensorStorage.bytes_per_block(config, options.block_size, dtype)
    num_blocks = options.num_blocks(config, per_block, weight.device)
    storage = TensorStorage(config, num_blocks, options.block_size, weight.device, dtype, backend)
    cache = KVCache(storage, options.max_num_seqs, options.model_length(config), options.enable_prefix_caching)
    runner = TorchRunner(model, cache, storage, ragged=ragged)
    on_gpu = weight.device.type == "cuda"
    if on_gpu:
        runner.drawn = torch.zeros(options.max_num_seqs, dtype=torch.int64, device=weight.device)
    if ragged:
        captures = on_gpu and not options.enforce_eager
        runner.graphs = DecodeGraphs(runner.run, cache, weight.device, runner.drawn, captures=captures)
    return runner


def native_runner(model: DecoderOnly | EncoderDecoder, weights: NamedWeights, options: EngineOptions) -> NativeRunner:
    """A runner of a model that the weights are packed for; its own are not read."""
    config = model.config
    packed = Weights(model, weights)
    cache_format = _cache_format(config, packed, options)
    num_blocks = options.num_blocks(config, config.depth * cache_format.layer_bytes, torch.device("cpu"))
    storage = NativeStorage(config.depth, cache_format, num_blocks)
    cache = KVCache(storage, options.max_num_seqs, options.model_length(config), options.enable_prefix_caching)
    return NativeRunner(lower(model, packed, cache_format), cache, storage, options.num_threads)


def _cache_format(config: TransformerConfig, weights: Weights, options: EngineOptions) -> CacheFormat:
    dtype = options.kv_cache_dtype
    if dtype == "auto":
        dtype = "float32" if weights.are_exact else "bfloat16"
    assert config.kv_heads is not None and config.head_dim is not None
    return CacheFormat(dtype, config.kv_heads, config.head_dim, options.block_size)
