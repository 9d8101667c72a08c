"""``model.init_from``: fine-tuning what transformers wrote, and what was trained here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers import models as vocabulary_models

import models
from engine import LLM, SamplingParams
from tests.train.test_launch import launch, refused
from train.config import parse
from train.data.corpora import load_pairs, texts
from train.data.dataset import load_data
from train.launch import main

PAIRS = [("ab cd", "dc ba"), ("one two", "owt eno"), ("tandem", "mednat"), ("a", "a"), ("stressed", "desserts"),
         ("live on", "no evil"), ("draw", "ward"), ("parts", "strap")]  # fmt: skip
TEXT = "to be or not to be, that is the question. " * 40
BART = {"d_model": 28, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 44,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 44, "max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 28, "d_kv": 10, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 3,
           "decoder_start_token_id": 0},
    "bart": {**BART, "decoder_start_token_id": 1, "bos_token_id": 2, "forced_eos_token_id": 1},
    "gpt2": {"n_embd": 28, "n_head": 2, "n_layer": 2, "n_positions": 64, "bos_token_id": 1},
}  # fmt: skip
STEPS = ["training.batch_size=8", "training.num_epochs=6", "training.learning_rate=1e-2", "training.warmup_steps=2",
         "training.log_interval=1", "training.eval_samples=2", "training.eval_interval=100", "data.num_workers=0",
         "training.device=cpu"]  # fmt: skip
NO_DROPOUT = ["model.dropout=0", "model.attention_dropout=0"]


def vocabulary(*, adds_end: bool) -> Vocabulary:
    """A small byte-level BPE, which may end a text with </s> as T5's does."""
    trained = Vocabulary(vocabulary_models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<s>", "<unk>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator([*(source for source, _ in PAIRS), TEXT], trainer)
    if adds_end:
        trained.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return trained


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(family, tmp_path_factory.mktemp(family))


def write_family(family: str, folder: Path, **changes: Any) -> Path:
    """A random model of the family with a tokenizer, as transformers saves them."""
    tokenizer = vocabulary(adds_end=family != "gpt2")
    tokens = {"vocab_size": tokenizer.get_vocab_size() + 3, "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(family, **{**tokens, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM if family == "gpt2" else transformers.AutoModelForSeq2SeqLM
    model = kind.from_config(config)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    if family == "bart":
        model.generation_config.forced_bos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def task(family: str, folder: Path) -> list[str]:
    """The arguments for data that the family can learn, one batch an epoch."""
    if family == "gpt2":
        (folder / "text.txt").write_text(TEXT)
        return ["data.task=text", f"data.file={folder / 'text.txt'}", "data.context=16", "training.batch_size=100"]
    (folder / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    return ["data.task=pairs", f"data.file={folder / 'pairs.tsv'}", "data.num_val_samples=1"]


def fine_tune(family: str, model: Path, place: Path, *arguments: str) -> Path:
    place.mkdir(exist_ok=True)
    return launch(place, f"model.init_from={model}", *STEPS, *task(family, place), *arguments)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


@torch.no_grad()
def their_loss(family: str, folder: Path, run: Path) -> float:
    """transformers' loss for the batch that the run's first step saw."""
    config = parse(task(family, run.parent))
    if family == "gpt2":
        examples, _ = load_data(config.data, 0, 64, models.load(folder)[1]).epoch(0, 0, 100, None)
        ids = torch.tensor([list(example.target) for example in examples])
        return float(transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, labels=ids).loss)
    sources, targets = texts(load_pairs(config.data, 0).train)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(sources, padding=True, return_tensors="pt")
    first = [2] if family == "bart" else []  # what BART is forced to begin with comes first in training, too
    labels = [first + tokenizer(target).input_ids for target in targets]
    width = max(map(len, labels))
    padded = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return float(theirs(**batch, labels=padded).loss)


def test_a_family_is_fine_tuned(family: str, folder: Path, tmp_path: Path) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    run = fine_tune(family, folder, tmp_path / "whole", *NO_DROPOUT)
    found = losses(run)
    assert found[0] == pytest.approx(their_loss(family, folder, run), abs=2e-5)
    assert found[-1] < 0.8 * found[0]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == before

    loaded, tokenizer = models.load(run / "checkpoints" / "last")
    original, original_tokenizer = models.load(folder)
    assert tokenizer is not None and original_tokenizer is not None
    assert loaded.generation == original.generation
    assert loaded.config.dropout == loaded.config.attention_dropout == 0
    assert loaded.config.float32_residual == original.config.float32_residual == (family == "t5")
    assert tokenizer.encode("to be</s>") == original_tokenizer.encode("to be</s>")
    output = LLM(run / "checkpoints" / "last", device="cpu").generate(
        "tandem", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
    )
    assert output[0].finished


def test_fine_tuning_resumes_bit_for_bit(family: str, folder: Path, tmp_path: Path) -> None:
    # By epochs that a constant rate makes one run of; dropout as the checkpoint has it.
    constant = ["training.schedule=constant", "training.eval_interval=2"]
    whole = fine_tune(family, folder, tmp_path / "whole", *constant, "training.num_epochs=4")
    fine_tune(family, folder, tmp_path / "parts", *constant, "training.num_epochs=2")
    parts = fine_tune(family, folder, tmp_path / "parts", *constant, "training.num_epochs=4")
    assert models.load(parts / "checkpoints" / "last")[0].config.dropout == 0.1
    expected, actual = weights_of(whole), weights_of(parts)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_recomputing_activations_changes_nothing(family: str, folder: Path, tmp_path: Path) -> None:
    plain, recomputed = (
        fine_tune(family, folder, tmp_path / name, *NO_DROPOUT, f"training.activation_checkpointing={name}")
        for name in ("false", "true")
    )
    assert losses(plain) == pytest.approx(losses(recomputed), abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiling_changes_the_loss_by_rounding_only(family: str, folder: Path, tmp_path: Path) -> None:
    plain, compiled = (
        fine_tune(family, folder, tmp_path / mode, *NO_DROPOUT, f"training.compile={mode}")
        for mode in ("none", "block")
    )
    assert losses(plain) == pytest.approx(losses(compiled), abs=1e-2)


def test_relative_tables_learn(tmp_path: Path) -> None:
    folder = write_family("t5", tmp_path / "t5")
    run = fine_tune("t5", folder, tmp_path / "run", *NO_DROPOUT)
    before, after = models.load(folder)[0].state_dict(), models.load(run / "checkpoints" / "last")[0].state_dict()
    for side in ("encoder", "decoder"):
        assert not torch.equal(before[f"{side}.relative_bias.table"], after[f"{side}.relative_bias.table"])


def test_what_was_trained_here_is_fine_tuned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "first").mkdir()
    small = ["model.dim=28", "model.depth=1", "model.heads=2", "model.max_seqlen=40", "model.positions=learned"]
    first = launch(tmp_path / "first", *small, "data.target_tokenizer=char", *STEPS, *task("t5", tmp_path / "first"))
    best = first / "checkpoints" / "best"
    second = fine_tune("t5", best, tmp_path / "second", "model.dropout=0.3", "model.max_seqlen=20")
    assert f"from {best}" in capsys.readouterr().out
    model, tokenizer = models.load(second / "checkpoints" / "last")
    assert (model.config.dropout, model.config.max_seqlen, model.config.dim) == (0.3, 20, 28)
    assert tokenizer is not None and tokenizer.target is not tokenizer.source
    assert losses(second)[0] < losses(first)[0]


def test_dropout_beside_init_from_is_trained_with(tmp_path: Path) -> None:
    folder = write_family("gpt2", tmp_path / "gpt2")
    without, with_it = (
        fine_tune("gpt2", folder, tmp_path / rate, f"model.dropout={rate}", "model.attention_dropout=0")
        for rate in ("0", "0.5")
    )
    assert abs(losses(without)[0] - losses(with_it)[0]) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.dim=28"], "model.dim beside model.init_from"),
        (["model.positions=rotary"], "model.positions beside model.init_from"),
        (["model.architecture=encoder_decoder"], "model.architecture beside model.init_from"),
        (["model.max_seqlen=65"], "model.max_seqlen 65 is longer than 64"),
        (["model.dropout=1"], "dropout is 1"),
        (["data.tokenizer=char"], "data.tokenizer beside model.init_from"),
        (["data.target_tokenizer=char"], "data.target_tokenizer beside model.init_from"),
        (["data.vocab_size=8000"], "data.vocab_size beside model.init_from"),
        (["data.task=text"], "is encoder_decoder, data.task text needs decoder_only"),
        (["model.init_from=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_contradicts_the_checkpoint_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_family("bart", tmp_path / "bart")
    capsys.readouterr()  # transformers' progress
    run = [f"model.init_from={folder}", *task("bart", tmp_path), f"training.output_dir={tmp_path / 'runs'}"]
    assert message in refused(capsys, *run, *arguments)
    assert not list(tmp_path.glob("runs/*/checkpoints"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: set_tokens(folder, decoder_start_token_id=None, bos_token_id=None), "decoder_start_token_id"),
        (lambda folder: set_tokens(folder, eos_token_id=None), "eos_token_id"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "truncated or corrupt"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_one_line(
    break_it: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_family("bart", tmp_path / "bart")
    break_it(folder)
    capsys.readouterr()
    run = [f"model.init_from={folder}", *task("bart", tmp_path), f"training.output_dir={tmp_path / 'runs'}"]
    assert message in refused(capsys, *run)


def set_tokens(folder: Path, **tokens: None) -> None:
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | tokens))


def test_the_runs_own_config_file_starts_it_again(tmp_path: Path) -> None:
    folder = write_family("t5", tmp_path / "t5")
    run = fine_tune("t5", folder, tmp_path / "run")
    before = weights_of(run)
    main(["--config", str(run / "config.yaml")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(run).items())
