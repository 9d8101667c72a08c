"""``python -m train.launch`` as a user meets it: runs, resumes, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import LLM, SamplingParams
from models import load
from train.launch import main

ROOT = Path(__file__).parent.parent.parent
SMALL = ["model.dim=32", "model.depth=1", "model.heads=2", "data.num_workers=0", "training.batch_size=16",
         "training.log_interval=2"]  # fmt: skip
TOY = [*SMALL, "data.num_train_samples=64", "data.num_val_samples=20", "training.num_epochs=2"]


def launch(folder: Path, *arguments: str) -> Path:
    main([*arguments, f"training.output_dir={folder}", "training.name=run"])
    return folder / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_a_run_leaves_what_the_contract_says(tmp_path: Path) -> None:
    run = launch(tmp_path, *TOY)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/last/config.json", "checkpoints/best/model.safetensors",
                 "checkpoints/last/tokenizer.json", "checkpoints/last/trainer/optimizer.safetensors"):  # fmt: skip
        assert (run / name).exists(), name
    assert list(run.glob("events.out.tfevents*"))
    assert (run / "checkpoints" / "last").resolve().name == "step-8"
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [2, 4, 6, 8]
    assert [e["step"] for e in entries if "exact_match" in e] == [4, 8]
    assert all(e["tokens_per_second"] > 0 for e in entries if "loss" in e)
    assert LLM(run / "checkpoints" / "last").generate("abc", SamplingParams(), use_tqdm=False)[0].finished


@pytest.mark.parametrize(
    "options",
    [
        ["training.precision=bf16"],
        ["training.precision=fp16"],
        ["training.accumulation=3", "training.label_smoothing=0.1", "training.activation_checkpointing=true"],
        [
            "training.z_loss=1e-3",
            "data.max_tokens=200",
            "training.schedule=inverse_sqrt",
            "model.dropout=0.1",
            "data.num_workers=2",
        ],
        ["data.task=addition", "data.tokenizer=bpe", "data.vocab_size=270", "model.norm=rmsnorm"],
        [
            "data.task=copy",
            "data.target_tokenizer=char",
            "training.max_steps=3",
            "training.best_metric=exact_match",
        ],
    ],
    ids=" ".join,
)
def test_every_way_to_train_learns_something(options: list[str], tmp_path: Path) -> None:
    run = launch(
        tmp_path,
        *TOY,
        "training.num_epochs=6",
        "training.learning_rate=3e-3",
        "training.warmup_steps=2",
        *options,
    )
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert all(loss == loss for loss in losses)
    assert "training.max_steps=3" in options or losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "model"])
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiling_changes_the_loss_by_rounding_only(mode: str, tmp_path: Path) -> None:
    plain = launch(tmp_path / "plain", *TOY)
    compiled = launch(tmp_path / "compiled", *TOY, f"training.compile={mode}")
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (plain, compiled)]
    figures = [[json.loads(line)["loss"] for line in each if '"loss"' in line] for each in lines]
    assert figures[0] == pytest.approx(figures[1], abs=1e-2)


def test_text_trains_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, 그것이 문제로다. " * 40)
    run = launch(tmp_path, *SMALL, "data.task=text", f"data.file={tmp_path / 'text.txt'}", "data.context=16",
                 "training.num_epochs=20", "training.learning_rate=1e-2", "training.warmup_steps=5")  # fmt: skip
    llm = LLM(run / "checkpoints" / "last", device="cpu")
    pieces = [delta.text for delta in llm.stream("to be or", SamplingParams(temperature=0, max_tokens=30))]
    assert "".join(pieces).startswith(" not to be, 그것이")


def test_korean_pairs_train_and_stream(tmp_path: Path) -> None:
    words = ["안녕", "세계", "하늘", "바다", "나무", "사람"]
    pairs = "".join(f"{a}{b}\t{b}{a}\n" for a in words for b in words)
    (tmp_path / "pairs.tsv").write_text(pairs)
    run = launch(tmp_path, *SMALL, "data.task=pairs", f"data.file={tmp_path / 'pairs.tsv'}", "training.num_epochs=60",
                 "training.learning_rate=1e-2", "training.warmup_steps=10", "training.eval_interval=60")  # fmt: skip
    llm = LLM(run / "checkpoints" / "last", device="cpu")
    output = "".join(delta.text for delta in llm.stream("안녕세계", SamplingParams(temperature=0, max_tokens=10)))
    assert set(output) <= set("".join(words))
    assert len(output) >= 2


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train.launch", *TOY, "training.num_epochs=15", "training.eval_interval=5",
               "model.dropout=0.1", f"training.output_dir={folder}", f"training.name={name}", *arguments]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(run: Path, step: int) -> None:
    last = run / "checkpoints" / "last"
    deadline = time.monotonic() + 60
    while not (last.exists() and int(last.resolve().name.removeprefix("step-")) >= step):
        assert time.monotonic() < deadline, "the run did not get this far"
        time.sleep(0.005)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    last = run / "checkpoints" / "last"
    assert last.resolve().name == "step-60"
    return load_file(last / "model.safetensors") | load_file(last / "trainer" / "optimizer.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_a_killed_run_continues_bit_for_bit(number: signal.Signals, code: int, tmp_path: Path) -> None:
    output, _ = (whole := start(tmp_path, "whole")).communicate(timeout=120)
    assert whole.returncode == 0, output
    broken = start(tmp_path, "broken")
    wait_for_step(tmp_path / "broken", 10)
    broken.send_signal(number)
    output, _ = broken.communicate(timeout=60)
    assert broken.returncode == code, output
    stopped_at = int((tmp_path / "broken" / "checkpoints" / "last").resolve().name.removeprefix("step-"))
    assert 10 <= stopped_at < 60
    resumed = start(tmp_path, "broken")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert f"resumed at step {stopped_at}" in output
    expected, actual = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "broken")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = launch(tmp_path, *TOY)
    before = (run / "checkpoints" / "last" / "model.safetensors").read_bytes()
    launch(tmp_path, *TOY)
    assert (run / "checkpoints" / "last" / "model.safetensors").read_bytes() == before


def test_another_run_of_the_same_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(tmp_path, *TOY)
    place = [f"training.output_dir={tmp_path}", "training.name=run"]
    assert "model.dim=32, not 16" in refused(capsys, *TOY, "model.dim=16", *place)
    assert "holds a run already" in refused(capsys, *TOY, "training.resume=never", *place)


def test_a_run_from_before_an_option_existed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = launch(tmp_path, *TOY)
    config = (run / "config.yaml").read_text()
    assert "  z_loss: 0.0\n" in config
    (run / "config.yaml").write_text(config.replace("  z_loss: 0.0\n", ""))
    launch(tmp_path, *TOY, "training.num_epochs=3")
    assert "resumed at step 8" in capsys.readouterr().out


def test_the_training_loss_has_its_z_loss(tmp_path: Path) -> None:
    first = []
    for weight in (0, 1):
        run = launch(tmp_path / str(weight), *TOY, "training.max_steps=1", "training.log_interval=1",
                     f"training.z_loss={weight}")  # fmt: skip
        first.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    plain, with_z_loss = (next(line["loss"] for line in lines if "loss" in line) for lines in first)
    assert with_z_loss > plain + 1  # a new model's log-sum-exp is at least the log of its vocabulary
    plain, with_z_loss = (next(line["val_loss"] for line in lines if "val_loss" in line) for lines in first)
    assert with_z_loss < plain + 1


@pytest.mark.parametrize("part", ["model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json"])
def test_a_corrupt_checkpoint_is_not_resumed(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = launch(tmp_path, *TOY)
    path = run / "checkpoints" / "last" / part
    path.write_bytes(path.read_bytes()[:40])
    error = refused(capsys, *TOY, f"training.output_dir={tmp_path}", "training.name=run", "training.num_epochs=3")
    assert Path(part).name in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.dmi=64"], "model.dmi"),
        (["training.lr=1"], "training.lr"),
        (["optimizer=adam"], "optimizer"),
        (["model.dim=wide"], "model.dim"),
        (["training.batch_size=0"], "training.batch_size"),
        (["training.schedule=step"], "training.schedule"),
        (["data.task=chess"], "data.task"),
        (["data.task=pairs", "data.file=nowhere.tsv"], "nowhere.tsv"),
        (["data.task=text", "data.file=nowhere.txt", "model.architecture=encoder_decoder"], "decoder_only"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "no config file"),
        (["training.resume=nowhere"], "no checkpoint at nowhere"),
        (["training.device=cuda"], "no CUDA device"),
        (["model.heads=7"], "heads"),
        (["training.beta1=2"], "training.beta1"),
        (["training.seed=-1"], "training.seed"),
        (["training.z_loss=-1e-4"], "training.z_loss"),
        (["training.z_loss=.nan"], "training.z_loss"),
        (["training.max_grad_norm=.inf"], "training.max_grad_norm"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "training.device=cuda" in arguments:
        pytest.skip("this machine has a CUDA device")
    assert message in refused(capsys, *arguments, f"training.output_dir={tmp_path}")
    assert not list(tmp_path.glob("*/checkpoints"))


def test_a_file_with_an_unknown_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  dim: 32\n  wings: 2\n")
    assert "wings" in refused(capsys, "--config", str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("model: [\n")
    refused(capsys, "--config", str(tmp_path / "bad.yaml"))


def test_an_argument_beats_the_file_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {dim: 64, heads: 2}\ntraining: {learning_rate: 1e-3}\n")
    main([*TOY, "--config", str(tmp_path / "run.yaml"), f"training.output_dir={tmp_path}"])
    model, _ = load(tmp_path / "run" / "checkpoints" / "last")
    assert model.config.dim == 32


@pytest.mark.parametrize(
    "module", ["train.launch", "engine.generate", "tools.profile", "tools.convert", "examples.pronounce"]
)
def test_every_command_has_help(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_torchrun_trains_on_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m",
               "train.launch", *TOY, f"training.output_dir={tmp_path}", "training.name=two"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert (tmp_path / "two" / "checkpoints" / "last" / "trainer" / "rank-1.safetensors").exists()


def test_an_output_folder_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *TOY, f"training.output_dir={tmp_path / 'file'}", "training.name=run")


def test_examples_too_long_for_the_model_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a" * n, "b") for n in range(1, 60)] + [(f"c{n}", "d") for n in range(20)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in rows))
    launch(tmp_path, *SMALL, "data.task=pairs", f"data.file={tmp_path / 'pairs.tsv'}", "model.max_seqlen=32",
           "training.num_epochs=1", "data.num_val_samples=40", "training.compile=none")  # fmt: skip
    assert "27 examples are longer than model.max_seqlen" in capsys.readouterr().out


def test_a_run_that_diverges_keeps_no_checkpoint_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TOY, "training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0",
                 "training.log_interval=100"]  # fmt: skip
    assert "lower training.learning_rate" in refused(capsys, *arguments, f"training.output_dir={tmp_path}")
    assert not list(tmp_path.glob("*/checkpoints/last"))


def test_starting_from_another_runs_checkpoint_happens_once(tmp_path: Path) -> None:
    first = launch(tmp_path / "first", *TOY)
    start_from = f"training.resume={first / 'checkpoints' / 'step-8'}"
    second = launch(tmp_path / "second", *TOY, "training.num_epochs=4", start_from)
    weights = (second / "checkpoints" / "last" / "model.safetensors").read_bytes()
    lines = (second / "metrics.jsonl").read_text()
    assert '"step": 10' in lines
    launch(tmp_path / "second", *TOY, "training.num_epochs=4", start_from)
    assert (second / "checkpoints" / "last" / "model.safetensors").read_bytes() == weights
    assert (second / "metrics.jsonl").read_text() == lines


def test_a_run_is_not_resumed_by_another_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(tmp_path, *TOY)
    state = run / "checkpoints" / "last" / "trainer" / "state.json"
    state.write_text(state.read_text().replace('"world_size": 1', '"world_size": 2'))
    error = refused(capsys, *TOY, "training.num_epochs=3", f"training.output_dir={tmp_path}", "training.name=run")
    assert "saved by 2 processes" in error


def test_two_vocabularies_of_one_size_share_no_embedding(tmp_path: Path) -> None:
    run = launch(tmp_path, *TOY, "data.task=copy", "data.target_tokenizer=char", "training.max_steps=2")
    model, tokenizer = load(run / "checkpoints" / "last")
    assert tokenizer is not None
    assert tokenizer.vocab_size == tokenizer.target_vocab_size
    assert model.config.share_embeddings is False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_evaluating_does_not_use_up_a_compiled_blocks_graphs(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    launch(tmp_path, *TOY, "training.compile=block", "training.eval_interval=2", "model.max_seqlen=12")
    assert not [reason for reason in counters["graph_break"] if "recompile" in str(reason).lower()]
    assert counters["stats"]["unique_graphs"] <= 8


def test_a_mistake_does_not_use_up_the_runs_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"training.output_dir={tmp_path}", "training.name=run"]
    refused(capsys, *TOY, "model.heads=3", *place)
    refused(capsys, *TOY, "training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0", *place)
    assert (launch(tmp_path, *TOY) / "checkpoints" / "last").exists()


def test_a_run_whose_links_were_lost_goes_on_from_its_newest_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(tmp_path, *TOY)
    (run / "checkpoints" / "last").unlink()
    launch(tmp_path, *TOY, "training.num_epochs=3")
    assert "resumed at step 8" in capsys.readouterr().out
    (run / "config.yaml").unlink()
    place = [f"training.output_dir={tmp_path}", "training.name=run"]
    assert "not a run's config" in refused(capsys, *TOY, "training.num_epochs=4", *place)


@pytest.mark.parametrize("text", ["training: 5\n", "model: [1]\n", "", "- 1\n", "model: {dim: 32\n"])
def test_a_file_that_is_no_mapping_of_sections_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert "bad.yaml" in refused(capsys, "--config", str(tmp_path / "bad.yaml"), "model.dim=32")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\nmodel: {dim: 32}\n")
    assert "latin.yaml" in refused(capsys, "--config", str(tmp_path / "latin.yaml"))
