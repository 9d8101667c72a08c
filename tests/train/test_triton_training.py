"""Two layers trained on the Triton kernels alone, interpreted or on a GPU: step by step the losses of the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kernels import backend
from tests.conftest import tiny_model
from train.data.batching import Batch
from train.evaluation import sum_loss
from train.optimizer import build_optimizer

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, SEQLEN = 3, 9
MODELS = {
    "T5": {
        "architecture": "encoder_decoder", "encoder_depth": 2, "positions": "relative", "norm": "rmsnorm",
        "activation": "geglu_new", "relative_buckets": 8, "relative_max_distance": 6, "softmax_scale": 1.0,
    },
    "Llama": {"architecture": "decoder_only", "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
}  # fmt: skip


def make_batch(pair: bool) -> Batch:
    torch.manual_seed(0)
    source, target, labels = (torch.randint(4, 60, (2, SEQLEN)) for _ in range(3))
    labels[0, -2:] = -100
    lengths = torch.tensor([SEQLEN, 5]) if pair else None
    batch = Batch(source if pair else None, lengths, target, labels, 2 * SEQLEN - 2, 2 * SEQLEN)
    return batch.to(torch.device(DEVICE))


def losses(name: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(backend, "PROCESS_CHOICE", choice)
    model = tiny_model(**MODELS[name]).to(DEVICE).train()  # type: ignore[arg-type]
    optimizer = build_optimizer(model, 1e-2, 0.1, (0.9, 0.98))
    batch = make_batch(MODELS[name]["architecture"] == "encoder_decoder")
    seen = []
    for _ in range(STEPS):
        loss = sum_loss(model, batch, label_smoothing=0.1, z_loss=1e-3)
        (loss / batch.num_target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_each_steps_loss_is_that_of_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(name, "reference", monkeypatch)
    assert expected[-1] < expected[0]
    assert losses(name, "triton", monkeypatch) == pytest.approx(expected, rel=2e-5)


def test_ddp_finds_every_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PROCESS_CHOICE", "triton")
    batch = make_batch(pair=True)
    gradients = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrapped in (False, True):
            model = tiny_model(**MODELS["T5"]).to(DEVICE).train()  # type: ignore[arg-type]
            module = DistributedDataParallel(model, gradient_as_bucket_view=True) if wrapped else model
            sum_loss(module, batch).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        dist.destroy_process_group()
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == len(list(model.parameters()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
