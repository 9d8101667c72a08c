from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

cpu_path: str  # "generic", "avx2" or "avx512"

class SamplingBatch:
    def __init__(self, fields: dict[str, NDArray[np.generic]]) -> None: ...

def sample(
    logits: NDArray[np.float32], batch: SamplingBatch, num_threads: int
) -> tuple[
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.int64],
    list[str | None],
]: ...
def uniform(seed: int, position: int) -> float: ...
