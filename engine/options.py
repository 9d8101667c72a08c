"""How an engine is set up: ``EngineOptions``, checked before anything is allocated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from engine.sampling import check_number
from engine.speculative_config import SpeculativeConfig
from kernels.backend import BACKENDS, TRITON_DEVICE, available, choose
from kernels.cached_attention import PAGE
from models.config import LARGEST, TransformerConfig
from models.quantized import FLOAT8, DeviceQuantization

RANGES = {
    "tensor_parallel_size": (1, 1),
    "num_threads": (1, 1024),
    "seed": (0, 2**63 - 1),
    "max_num_seqs": (1, 1 << 20),
}
LENGTH_WITHOUT_LIMIT = 2048  # of a model whose positions have no end
CACHE_LIMIT = 4 << 30  # bytes, unless kv_cache_memory_bytes says otherwise
# Few enough that those who decode meanwhile do not wait long.
STEP_TOKENS = {"cpu": 512, "cuda": 8192}
QUANTIZATIONS = (None, "auto", "int8", "int4", FLOAT8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = DTYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
NATIVE_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True)
class EngineOptions:
    """What ``LLM`` takes besides the model, its tokenizer, device and dtype. A wrong value is a ValueError naming it.

    Attributes:
        backend: auto, native (the C++ core runs the whole model, on a CPU), triton (torch runs it, attention and cache
            by our kernels for a GPU, which auto takes where there is one), torch or reference (torch runs it, with its
            own kernels or by the formulas).
        quantization: None: weights as floats. int8, int4: the linear layers and embeddings in eight or four bits; auto:
            in as many as the file has them in; fp8: the linear layers in floats of eight bits, on CUDA from sm_90 on.
            Where CUDA's own kernels run, embeddings stay floats.
        max_num_seqs: most sequences decoded at once.
        max_model_len: longest source, and longest prompt plus output; the model's own limit unless given, 2,048 for one
            that has none.
        max_num_batched_tokens: tokens of a step: one of each sequence that decodes, the rest of prompts and sources. A
            long prompt takes several steps, a long source a step of its own. 512 on a CPU, 8,192 on a GPU, or
            max_num_seqs, unless given.
        kv_cache_memory_bytes: the cache's size; unset, max_num_seqs x max_model_len tokens, but on a CPU 4 GiB at most,
            and on a GPU what gpu_memory_utilization, a share of its memory, leaves beside the weights.
        kv_cache_dtype: what keys and values are kept in: float32, bfloat16, float16, int8 (a scale a token and head) or
            fp8 (e4m3, no scales), the native backend having neither float16 nor fp8; auto: the weights' dtype, and on
            the native backend bfloat16 beside quantised ones.
        block_size: tokens in a block of the cache; for native a multiple of 16.
        enable_prefix_caching: keys and values of equal beginnings, and of equal sources, are computed once.
        speculative_config: how tokens to come are guessed, a dict (``engine.speculative_config``); None: not at all.
        enforce_eager: no CUDA graphs of decoding steps are captured: slower, but errors are where they happen.
        batch_invariant: results must not depend on the batch; the native backend's never do, others refuse.
        tensor_parallel_size: 1, the only one there is.
        num_threads: CPU threads, torch's own unless given. seed: of the requests that bring none.
    """

    backend: str = "auto"
    quantization: DeviceQuantization | None = None
    max_num_seqs: int = 256
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig | None = None
    batch_invariant: bool = False
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(f"unknown backend {self.backend!r}: choose one of auto, {', '.join(BACKENDS)}")
        for name, allowed in (("quantization", QUANTIZATIONS), ("kv_cache_dtype", ("auto", *CACHE_DTYPES))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(str, allowed))}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float):
                check_number(field.name, value, 0, 1, open_low=True)
                continue
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be True or False, got {value!r}")
                continue
            if (
                isinstance(field.default, str)
                or field.name in ("quantization", "speculative_config")
                or (value is None and field.default is None)
            ):
                continue
            low, high = RANGES.get(field.name, (1, 2**40))
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{field.name} must be an integer from {low} to {high}, got {value!r}")

    def check_invariance(self, native: bool) -> None:
        """Raises ValueError where results must not depend on the batch and may."""
        if self.batch_invariant and not native:
            raise ValueError("batch_invariant=True is what backend='native' gives, and this model runs on torch")

    def runs_native(self, device: torch.device) -> bool:
        """Whether the C++ core runs a model of a checkpoint. Raises ValueError where it was asked for and cannot."""
        names = available(device, triton=True, native=device.type == "cpu")
        requested = None if self.backend == "auto" else self.backend
        native = choose("the engine", names, requested) == "native"
        if native:
            self.check_native(device)
        return native

    def packs_for_device(self, device: torch.device) -> bool:
        """Whether linear layers keep quantised weights where torch runs the model.

        Raises ValueError for fp8 where they do not.
        """
        kernels = self.backend == "triton" or (self.backend == "auto" and device.type == "cuda")
        packs = self.quantization is not None and kernels and device.type == TRITON_DEVICE
        if self.quantization == FLOAT8 and not packs:
            raise ValueError(
                f"quantization='fp8' needs CUDA's own kernels, and this is backend {self.backend!r} on {device}"
            )
        return packs

    @property
    def linear_backend(self) -> str | None:
        """What quantised layers on a device are asked to run on; None: its own choice."""
        return None if self.backend == "auto" else self.backend

    def check_native(self, device: torch.device) -> None:
        """Raises ValueError for options that the native backend does not go with."""
        if device.type != "cpu":
            raise ValueError(f"backend='native' runs on a CPU, and the model is on {device.type}")
        if self.block_size % PAGE:
            raise ValueError(f"block_size is {self.block_size}: the native backend takes multiples of {PAGE}")
        if self.kv_cache_dtype not in NATIVE_CACHE_DTYPES:
            allowed = ", ".join(NATIVE_CACHE_DTYPES)
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype}: the native backend takes {allowed}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> EngineOptions:
        """The options of keyword arguments. Raises ValueError for one there is not."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(
                f"LLM has no option {unknown[0]!r}: choose from tokenizer, device, dtype, {', '.join(known)}"
            )
        if (speculative := options.get("speculative_config")) is not None:
            options = {**options, "speculative_config": SpeculativeConfig.of(speculative)}
        return cls(**options)

    def model_length(self, config: TransformerConfig) -> int:
        """The longest source, and the longest prompt plus output."""
        if self.max_model_len is not None and self.max_model_len > config.max_seqlen:
            raise ValueError(f"max_model_len {self.max_model_len} is beyond the model's {config.max_seqlen}")
        unlimited = config.max_seqlen >= LARGEST
        return self.max_model_len or (LENGTH_WITHOUT_LIMIT if unlimited else config.max_seqlen)

    def cache_dtype(self, weights: torch.dtype) -> torch.dtype:
        """What the cache is kept in where torch runs the model."""
        return weights if self.kv_cache_dtype == "auto" else CACHE_DTYPES[self.kv_cache_dtype]

    def step_tokens(self, device: torch.device) -> int:
        return self.max_num_batched_tokens or max(STEP_TOKENS[device.type], self.max_num_seqs)

    def num_blocks(self, config: TransformerConfig, bytes_per_block: int, device: torch.device) -> int:
        """How many blocks the cache gets, for targets and, beside them, sources."""
        a_sequence = -(-self.model_length(config) // self.block_size) * (2 if config.is_encoder_decoder else 1)
        wanted = self.max_num_seqs * a_sequence * bytes_per_block
        memory = self.kv_cache_memory_bytes or min(wanted, self._most_memory(device))
        if memory < bytes_per_block:
            raise ValueError(f"kv_cache_memory_bytes {memory} holds no block of {bytes_per_block} bytes")
        return memory // bytes_per_block

    def _most_memory(self, device: torch.device) -> int:
        """Bytes that a cache gets at most where nobody says how many."""
        if device.type != "cuda":
            return CACHE_LIMIT
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * self.gpu_memory_utilization) - (total - free))


def resolve_device(device: str | torch.device) -> torch.device:
    """auto, cpu or cuda as a device. Raises ValueError for another, or for cuda where there is none."""
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto is float32 on a CPU and bfloat16 on CUDA. Raises ValueError for an unknown name."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
