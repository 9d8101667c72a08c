"""One rank's part in a single update, as ``test_distributed`` starts it; the first rank writes the gradients down."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from train import distributed
from train.config import parse
from train.data.dataset import load_data
from train.trainer import Trainer


def main(output: Path, arguments: list[str]) -> None:
    config = parse(arguments)
    own = distributed.start("cpu")
    trainer = Trainer(config, load_data(config.data, 0, config.model.max_seqlen), own)
    batches, tokens, _ = next(trainer._updates())
    loss = trainer.accumulate_gradients(batches, tokens)
    total = own.sum(float(loss))[0]
    if own.is_main:
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        torch.save({"gradients": gradients, "tokens": tokens, "loss": total}, output)
    # Nothing that has threads of the group's may outlive it, here or on the other rank.
    del trainer, batches
    gc.collect()
    own.barrier()
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
