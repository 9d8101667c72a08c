"""Models trained here become folders that transformers loads, with the same logits, outputs and tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import models
from engine import LLM, SamplingParams
from models import checkpoint
from models.config import RopeScaling, TransformerConfig
from models.generation import GenerationConfig
from models.tokenizer import Tokenizer, train_vocabulary
from models.transformer import DecoderOnly, EncoderDecoder, build_model
from tests.engine.test_family_decoding import generated, padded
from tests.train.test_init_from import fine_tune, write_family
from tools.convert import main
from train.launch import main as launch

VOCAB = 53
TEXTS = ["abcdefghijklmnopqrstuvwxyz", " 0123456789", "<eos>ABCDEFGH"]
SIZES = {"vocab_size": VOCAB, "dim": 28, "depth": 2, "heads": 2, "ffn_dim": 44, "max_seqlen": 48}
DECODER = {"architecture": "decoder_only", **SIZES}
SEQ2SEQ = {"architecture": "encoder_decoder", **SIZES, "encoder_depth": 3}
RMS = {"norm": "rmsnorm", "norm_eps": 1e-6, "bias": False}
LLAMA = {**DECODER, **RMS, "activation": "swiglu", "kv_heads": 1}
MARIAN = {**SEQ2SEQ, "norm_place": "post", "positions": "sinusoidal"}
T5 = {**SEQ2SEQ, **RMS, "positions": "relative", "softmax_scale": 1.0, "activation": "relu", "relative_buckets": 8,
      "relative_max_distance": 12}  # fmt: skip
LEARNED = {"positions": "learned", "position_offset": 2, "embedding_norm": True}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-other": ("LlamaForCausalLM", {**LLAMA, "bias": True, "head_dim": 10, "tie_embeddings": False,
                                         "activation": "geglu", "attention_dropout": 0.1, "rope_theta": 500.0}),
    "llama-llama3": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": RopeScaling("llama3", 4.0, 16)}),
    "llama-linear": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": RopeScaling("linear", 2.0)}),
    "llama-yarn": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": RopeScaling("yarn", 4.0, 16, beta_fast=8.0)}),
    "default-text": ("GPTNeoXForCausalLM", DECODER),
    "gpt_neox": ("GPTNeoXForCausalLM", {**DECODER, "parallel_residual": True, "tie_embeddings": False,
                                        "rope_fraction": 0.3, "activation": "relu", "dropout": 0.2}),
    "gpt2": ("GPT2LMHeadModel", {**DECODER, "positions": "learned", "activation": "gelu_new", "heads": 4}),
    "marian": ("MarianMTModel", MARIAN),
    "marian-untied": ("MarianMTModel", {**MARIAN, "tie_embeddings": False, "activation": "silu"}),
    "marian-two": ("MarianMTModel", {**MARIAN, "target_vocab_size": VOCAB + 2, "activation": "gelu_new"}),
    "marian-two-untied": ("MarianMTModel", {**MARIAN, "target_vocab_size": VOCAB + 2, "tie_embeddings": False,
                                            "scale_embedding": False, "head_bias": True}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": ("T5ForConditionalGeneration", {**T5, "activation": "geglu_new", "head_dim": 10,
                                                "output_scale": 28**-0.5}),
    "t5-swiglu": ("T5ForConditionalGeneration", {**T5, "activation": "swiglu"}),
    "default-pairs": ("PegasusForConditionalGeneration", {**SEQ2SEQ, "positions": "sinusoidal"}),
    "pegasus-untied": ("PegasusForConditionalGeneration", {**SEQ2SEQ, "positions": "sinusoidal",
                                                           "tie_embeddings": False}),
    "bart": ("BartForConditionalGeneration", {**SEQ2SEQ, **LEARNED, "norm_place": "post"}),
    "mbart": ("MBartForConditionalGeneration", {**SEQ2SEQ, **LEARNED, "scale_embedding": True}),
}  # fmt: skip


def written(folder: Path, options: dict[str, Any], **tokens: Any) -> DecoderOnly | EncoderDecoder:
    """A random model of ours, norms and biases included, saved with a tokenizer."""
    torch.manual_seed(0)
    model = build_model(TransformerConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "relative_bias" in name:  # they start as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif model.config.softmax_scale == 1 and name.endswith(("q.weight", "qkv.weight")):
                parameter[: parameter.shape[1]] *= 0.3  # as T5 itself starts, for it does not scale scores
    model.generation = dataclasses.replace(GenerationConfig(), **tokens)
    vocabulary = train_vocabulary("char", TEXTS, 100)
    two = train_vocabulary("char", [*TEXTS, "XY"], 100) if options.get("target_vocab_size") else None
    folder.mkdir()
    checkpoint.save(folder, model, Tokenizer(vocabulary, two))
    return model


def convert(model: Path, output: Path) -> int:
    return main(["--model", str(model), "--to", "huggingface", "--output", str(output)])


def ragged(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Random token ids and the mask of what is no padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([width, *torch.randint(1, width, (rows - 1,), generator=generator).tolist()])
    ids = torch.randint(4, VOCAB, (rows, width), generator=generator)
    return ids, (torch.arange(width) < lengths[:, None]).long()


def load_theirs(folder: Path, name: str) -> Any:
    theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return theirs.eval()


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_same_logits_and_tokens(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    ours = written(tmp_path / "ours", options)
    assert convert(tmp_path / "ours", tmp_path / "theirs") == 0
    theirs = load_theirs(tmp_path / "theirs", name)
    (again, tokenizer), (ids, mask) = models.load(tmp_path / "theirs"), ragged(5, 31)
    target = ragged(5, 17)[0]
    with torch.inference_mode():
        if isinstance(ours, EncoderDecoder):
            got = ours(ids, target, source_lengths=mask.sum(1))
            wanted = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
            assert torch.equal(again(ids, target, source_lengths=mask.sum(1)), got)
        else:
            got, wanted = ours(ids)[mask.bool()], theirs(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            assert torch.equal(again(ids)[mask.bool()], got)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert same_greedy(tmp_path / "ours", theirs, ids, mask)
    peer, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs"), "Abc <eos> 99 ~"
    assert tokenizer is not None
    assert peer(text).input_ids == Tokenizer.load(tmp_path / "ours").encode(text) == tokenizer.encode(text)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id, peer.unk_token_id) == (1, 2, 0, 3)


def same_greedy(folder: Path, theirs: Any, ids: Tensor, mask: Tensor) -> bool:
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    seq2seq = theirs.config.is_encoder_decoder
    inputs = padded(prompts, left=not seq2seq)
    rows = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 1 if seq2seq else ids.shape[1] :]
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = LLM(folder, device="cpu").generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs] == [generated(row, [2]) for row in rows.tolist()]


OBSTACLES = {
    "norm 'layernorm' cannot be written as Llama, which has 'rmsnorm'": {**LLAMA, "norm": "layernorm",
                                                                         "positions": "alibi"},
    "out_bias False cannot be written as Llama, which has True": {**LLAMA, "bias": False, "qkv_bias": True},
    "window 7 cannot be written as Llama, which has None": {**LLAMA, "window": 7},
    "rope_fraction 0.3 cannot be written as Llama": {**LLAMA, "rope_fraction": 0.3},
    "head_bias True cannot be written as Llama": {**LLAMA, "head_bias": True},
    "GPT-2: dim 28 is not a multiple of heads 3": {**LLAMA, "heads": 3, "head_dim": 10, "activation": "silu"},
    "norm_eps 0.001 cannot be written as Marian, which has 1e-05": {**MARIAN, "norm_eps": 1e-3},
    "norm 'layernorm' cannot be written as T5, which has 'rmsnorm'": {**SEQ2SEQ},
    "activation 'geglu' cannot be written as T5, which has 'geglu_new'": {**T5, "activation": "geglu"},
    "softmax_scale 0.5 cannot be written as T5, which has 1.0": {**T5, "softmax_scale": 0.5},
    "kv_heads 1 cannot be written as Marian, which has 2": {**MARIAN, "kv_heads": 1},
    "output_scale 0.5 cannot be written as T5": {**T5, "output_scale": 0.5},
    "target_vocab_size 55 cannot be written as T5, which has 53": {**T5, "target_vocab_size": 55},
}  # fmt: skip


@pytest.mark.parametrize("message", OBSTACLES)
def test_what_no_family_holds_is_named(message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "ours", OBSTACLES[message])
    assert message in refused(tmp_path / "ours", tmp_path / "theirs", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def refused(model: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert convert(model, output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_what_is_no_checkpoint_of_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"t5": '{"model_type": "t5"}', "bert": '{"model_type": "bert"}', "broken": "{"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    written(tmp_path / "ours", LLAMA)
    (tmp_path / "file").touch()
    for model, output, message in (
        ("t5", "new", "is a Hugging Face checkpoint already: its model_type is t5"),
        ("bert", "new", "model_type 'bert'"),
        ("broken", "new", "not valid JSON"),
        ("nowhere", "new", "no model folder"),
        ("ours", "file", "exists and is not an empty folder"),
        ("ours", "ours", "exists and is not an empty folder"),
        ("ours", "file/new", "Not a directory"),
    ):
        assert message in refused(tmp_path / model, tmp_path / output, capsys)
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "ours", LLAMA)

    def full(*arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tools.export.folder.save_file", full)
    assert "No space left" in refused(tmp_path / "ours", tmp_path / "theirs", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_an_empty_folder_is_taken_and_a_second_vocabulary_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "ours", CASES["marian-two"][1])
    (tmp_path / "theirs").mkdir()
    assert convert(tmp_path / "ours", tmp_path / "theirs") == 0
    said = capsys.readouterr().out
    assert "AutoTokenizer reads the source's vocabulary only" in said
    assert said.count("\n") == 1
    files = [(tmp_path / folder / "target_tokenizer.json").read_bytes() for folder in ("ours", "theirs")]
    assert files[0] == files[1]


def test_special_tokens_are_the_models_own(tmp_path: Path) -> None:
    written(tmp_path / "ours", MARIAN, start_id=7, eos_ids=(5, 6), pad_id=None, forced_bos_id=9)
    assert convert(tmp_path / "ours", tmp_path / "theirs") == 0
    generation = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    assert generation == {"decoder_start_token_id": 7, "bos_token_id": 1, "eos_token_id": [5, 6], "pad_token_id": None,
                          "forced_bos_token_id": 9}  # fmt: skip
    ours = models.load(tmp_path / "ours")[0].generation
    assert models.load(tmp_path / "theirs")[0].generation == dataclasses.replace(ours, defaults={"do_sample": False})


@pytest.mark.parametrize("family", ["marian", "t5", "default"])
def test_what_training_wrote_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    shape = {
        "marian": ["model.norm_place=post", "model.activation=silu"],
        "t5": ["model.positions=relative", "model.norm=rmsnorm", "model.bias=false", "model.softmax_scale=1.0",
               "model.activation=relu"],
        "default": [],
    }[family]  # fmt: skip
    launch(["model.dim=28", "model.depth=1", "model.heads=2", "model.max_seqlen=32", *shape, "data.num_workers=0",
            "data.num_train_samples=400", "data.num_val_samples=9", "training.max_steps=30", "training.eval_samples=4",
            "training.batch_size=32", "training.learning_rate=3e-3", "training.warmup_steps=5",
            f"training.output_dir={tmp_path}", "training.name=run"])  # fmt: skip
    run = tmp_path / "run" / "checkpoints" / "last"
    assert convert(run, tmp_path / "theirs") == 0
    name = {"marian": "MarianMTModel", "t5": "T5ForConditionalGeneration"}.get(
        family, "PegasusForConditionalGeneration"
    )
    theirs, (ours, tokenizer) = load_theirs(tmp_path / "theirs", name), models.load(run)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    sources = ["stressed", "a", "drawer of tandem"]
    batch = peer(sources, padding=True, return_tensors="pt")
    assert tokenizer is not None and isinstance(ours, EncoderDecoder)
    assert [row[row != 0].tolist() for row in batch["input_ids"]] == tokenizer.encode_batch(sources)
    target = torch.tensor([[1, 5, 6, 7]] * 3)
    with torch.inference_mode():
        got = ours(batch["input_ids"], target, source_lengths=batch["attention_mask"].sum(1))
        wanted = theirs(**batch, decoder_input_ids=target).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    texts = peer.batch_decode(theirs.generate(**batch, max_new_tokens=20), skip_special_tokens=True)
    outputs = LLM(run, device="cpu").generate(sources, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert texts == [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(("family", "name"), [("t5", "T5"), ("bart", "Bart"), ("gpt2", "GPT2")])
def test_what_was_fine_tuned_goes_back_to_its_family(family: str, name: str, tmp_path: Path) -> None:
    original = write_family(family, tmp_path / "original")
    run = fine_tune(family, original, tmp_path / "tuned", "training.num_epochs=1") / "checkpoints" / "last"
    assert convert(run, tmp_path / "theirs") == 0
    kind = "LMHeadModel" if family == "gpt2" else "ForConditionalGeneration"
    theirs, (ours, _) = load_theirs(tmp_path / "theirs", name + kind), models.load(run)
    ids = ragged(3, 20)[0]
    with torch.inference_mode():
        if isinstance(ours, EncoderDecoder):
            got, wanted = ours(ids, ids), theirs(input_ids=ids, decoder_input_ids=ids).logits
        else:
            got, wanted = ours(ids), theirs(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    peers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (original, tmp_path / "theirs")]
    assert peers[0]("to be</s>").input_ids == peers[1]("to be</s>").input_ids
    generation = [models.load(folder)[0].generation for folder in (original, tmp_path / "theirs")]
    assert generation[0] == generation[1]
