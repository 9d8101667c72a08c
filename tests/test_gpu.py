"""What a CUDA device must give: the CPU's tokens, the reference's attention, a training step in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import models
from engine import LLM, BeamSearchParams, SamplingParams
from kernels.attention import attention
from kernels.attention_options import RelativeBias
from tests.conftest import tiny_model
from train.launch import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_the_device_agrees_with_the_reference(causal: bool, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 111, 4, 64, generator=generator).cuda().to(dtype)
    k, v = (torch.randn(3, 128, 2, 64, generator=generator).cuda().to(dtype) for _ in range(2))
    lengths = torch.tensor([0, 63, 128]).cuda()
    out, expected = (
        attention(q, k, v, causal=causal, key_lengths=lengths, backend=name) for name in (backend, "reference")
    )
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, expected, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=1e-2)


def test_attention_forward_and_backward_replay_in_a_cuda_graph() -> None:
    def step() -> list[torch.Tensor]:
        bias = RelativeBias(table, 128, bidirectional=True)
        out = attention(q, k, v, relative_bias=bias, backend="triton")
        assert isinstance(out, torch.Tensor)
        return [out, *torch.autograd.grad(out, [q, k, v, table], above)]

    q, k, v, above = (torch.randn(2, 500, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    table = torch.randn(32, 4, device="cuda", requires_grad=True)
    for x in (q, k, v):
        x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, which a capture may not
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v, above):
            x.normal_()
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


def test_the_relative_bias_takes_memory_by_the_length_not_its_square() -> None:
    used = []
    for seqlen in (4096, 8192):
        q, k, v = (torch.randn(1, seqlen, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        table = torch.randn(32, 8, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bias = RelativeBias(table, 128, bidirectional=True)
        out = attention(q.requires_grad_(), k, v, relative_bias=bias, backend="triton")
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
        used.append(torch.cuda.max_memory_allocated() - before)
        del q, k, v, table, bias, out
    assert used[1] < 2.5 * used[0]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_the_device_decodes_the_tokens_of_the_cpu(architecture: str) -> None:
    prompts = [{"prompt_token_ids": list(range(4, 4 + n))} for n in (1, 17, 5, 33)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    tokens = []
    for device in ("cpu", "cuda"):
        model = tiny_model(architecture).to(device)
        outputs = LLM.from_model(model, None, device=device).generate(prompts, params, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_the_device_finds_the_beams_of_the_cpu(architecture: str) -> None:
    prompts = [{"prompt_token_ids": list(range(4, 4 + n))} for n in (1, 17, 5, 33)]
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(architecture, tie_embeddings=False)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # clear preferences: beams that nearly tie may swap
        outputs = LLM.from_model(model.to(device), None, device=device).beam_search(prompts, BeamSearchParams(4, 20))
        found.append([[sequence.token_ids for sequence in output.sequences] for output in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3", "mistral", "qwen3", "phi", "gemma2", "t5-1.1", "umt5", "bart", "m2m_100"]
)
def test_a_family_on_the_device_gives_the_logits_of_the_cpu(name: str, tmp_path: Path) -> None:
    families = pytest.importorskip("tests.models.small_families")
    families.save(families.build(name), tmp_path)
    torch.manual_seed(0)
    source, target, lengths = torch.randint(4, 900, (3, 40)), torch.randint(4, 900, (3, 9)), torch.tensor([40, 1, 17])
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        model, _ = models.load(tmp_path, device, dtype)
        inputs = [x.to(device) for x in (source, target, lengths)]
        with torch.inference_mode():
            pair = isinstance(model, models.EncoderDecoder)
            logits = model(*inputs[:2], source_lengths=inputs[2]) if pair else model(inputs[0])
        found.append(logits.float().cpu())
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    assert (found[2] - found[0]).std() < 0.1 * found[0].std()


@pytest.mark.parametrize("options", [["training.precision=bf16"], ["training.precision=fp16"]], ids=str)
def test_training_on_the_device_learns(options: list[str], tmp_path: Path) -> None:
    main(
        ["model.dim=64", "model.depth=2", "model.heads=4", "data.num_train_samples=2000", "data.num_val_samples=100",
         "data.task=copy", "training.num_epochs=3", "training.learning_rate=2e-3", "training.device=cuda",
         "data.num_workers=2", f"training.output_dir={tmp_path}", "training.name=run", *options]
    )  # fmt: skip
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
