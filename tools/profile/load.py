"""`load`: from the call that opens a checkpoint folder to its first token, each time in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.profile.machine import Cell
from tools.profile.options import Options
from tools.profile.report import Report

WORKER = Path(__file__).with_name("load_worker.py")
PEERS = ("transformers", "ctranslate2")
OPTIONS = ("peer_python",)
ROUNDS = 7


@dataclass(frozen=True)
class Shape:
    """A model of transformers: its model_type and what its config differs in."""

    model_type: str
    config: dict[str, Any]
    seq2seq: bool = False


SHAPES = {
    "gpt2": Shape("gpt2", {}),
    "t5-base": Shape(
        "t5",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
        seq2seq=True,
    ),
}


def run(options: Options) -> Report:
    report = Report("load", ("shape", "who"), ("first token s", "low", "high"), path=options.json)
    report.start()
    for name in options.shapes or list(SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            seen = measure(SHAPES[name], Path(folder), options)
        firsts = {who: [sample["token"] for sample in samples] for who, samples in seen.items()}
        if len({token for tokens in firsts.values() for token in tokens}) > 1:
            report.failures.append(f"{name}: the first tokens differ: {firsts}")
        for who in seen:
            report.add(row(name, who, seen))
    return report


def measure(shape: Shape, folder: Path, options: Options) -> dict[str, list[dict[str, Any]]]:
    """Each contender's samples, taken in turns after one round to warm the file cache."""
    work(options, "tandem")  # a peer's Python that is not one should not wait for a model to be made
    peers = options.against or []
    for peer in peers:
        work(options, peer)
    make_checkpoint(shape, folder / "model")
    folders = {"tandem": folder / "model"} | dict.fromkeys(peers, folder / "model")
    if "ctranslate2" in folders:
        folders["ctranslate2"] = folder / "converted"
        work(options, "convert", folder / "model", folder / "converted")
    threads = str(torch.get_num_threads())
    seen: dict[str, list[dict[str, Any]]] = {who: [] for who in folders}
    for turn in range(ROUNDS + 1):
        for who, where in folders.items():
            sample = work(options, who, where, threads, "seq2seq" if shape.seq2seq else "causal")
            if turn:
                seen[who].append(sample)
    return seen


def work(options: Options, *arguments: object) -> dict[str, Any]:
    """What a fresh process reports. Peers run under ``--peer-python``; -P keeps our folder's names out of their way."""
    python = sys.executable if arguments[0] == "tandem" else options.peer_python
    command = [python, "-P", str(WORKER), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{arguments[0]} could not be measured under {python}: {last}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def make_checkpoint(shape: Shape, folder: Path) -> None:
    """A random model with a vocabulary of words, as transformers saves both."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.AutoConfig.for_model(shape.model_type, **shape.config)
    auto = transformers.AutoModelForSeq2SeqLM if shape.seq2seq else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    special = {0: "<pad>", 1: "</s>", 2: "<unk>"}
    words = {special.get(i, f"w{i}"): i for i in range(config.vocab_size)}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def row(shape: str, who: str, seen: dict[str, list[dict[str, Any]]]) -> dict[str, Cell]:
    ours = median(sample["seconds"] for sample in seen["tandem"])
    seconds = sorted(sample["seconds"] for sample in seen[who])
    weights = seen["tandem"][0]["bytes"]
    return {
        "shape": shape,
        "who": who,
        "first token s": median(seconds),
        "low": seconds[0],
        "high": seconds[-1],
        "over ours": median(seconds) / ours,
        "with imports s": median(sample["seconds"] + sample["imports"] for sample in seen[who]),
        "peak over weights": median(sample["peak"] for sample in seen[who]) / weights,
    }
