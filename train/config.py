"""A training run's options: defaults, then a YAML file, then ``section.key=value`` arguments."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jsonargparse
import yaml

from models.config import Architecture, ConfigError, TransformerConfig
from train.data.corpora import DEFAULT_TOKENIZER, DEFAULT_VOCABULARY, DataSection
from train.optimizer import Schedule

Precision = Literal["auto", "bf16", "fp16", "fp32"]
CompileMode = Literal["none", "block", "model"]

# The model section is TransformerConfig's fields, less what the data decides. None is for what was not given, which
# ``RunConfig`` fills in, unless init_from leaves it to a checkpoint.
ModelSection = dataclasses.make_dataclass(
    "ModelSection",
    [
        ("init_from", str | None, None),
        *(
            (name, hint | None, None)
            for name, hint in get_type_hints(TransformerConfig).items()
            if name not in ("vocab_size", "target_vocab_size")
        ),
    ],
)
ModelSection.__module__ = __name__
ModelSection.__doc__ = """The model's shape: the fields of models.config.TransformerConfig, whose defaults they have.

Attributes:
    init_from: a checkpoint folder, a GGUF file or a name on the Hub to fine-tune: it brings its tokenizer and says all
        about the model but dropout, attention_dropout and max_seqlen, which may be lowered.
"""
BESIDE_INIT_FROM = ("init_from", "dropout", "attention_dropout", "max_seqlen")


@dataclass
class TrainingSection:
    """How to train.

    Attributes:
        name: the run's folder under output_dir; the YAML file's stem unless given.
        output_dir: where runs are kept.
        batch_size: examples a device in one forward pass. accumulation: passes an update.
        num_epochs: passes over the data. max_steps: stop after so many updates instead.
        learning_rate, schedule, warmup_steps: peak rate, and its course: warm-up, then the schedule.
        weight_decay, beta1, beta2: AdamW's. max_grad_norm: clip above it, 0 = never.
        label_smoothing: mass spread over the vocabulary in the training loss. z_loss: weight in it of the squared
            log-sum-exp of a token's logits (1e-4 in PaLM), 0 = none.
        precision: auto is bf16 on CUDA and fp32 on CPU. compile: what torch.compile gets.
        activation_checkpointing: recompute blocks in the backward pass to save memory.
        eval_interval: updates between evaluations, 0 = at the end of each epoch.
        eval_samples: validation examples decoded for exact match, 0 = none. best_metric: what ``best`` is chosen by.
        log_interval: updates between lines of metrics.jsonl.
        resume: auto (continue this run if it exists), never (refuse if it exists), or a checkpoint's path.
        device: auto, cpu or cuda. seed: of weights, data order and dropout.
    """

    name: str | None = None
    output_dir: str = "runs"
    batch_size: int = 64
    accumulation: int = 1
    num_epochs: int = 10
    max_steps: int | None = None
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    precision: Precision = "auto"
    compile: CompileMode = "none"
    activation_checkpointing: bool = False
    eval_interval: int = 0
    eval_samples: int = 1000
    best_metric: Literal["val_loss", "exact_match"] = "val_loss"
    log_interval: int = 20
    resume: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


@dataclass
class RunConfig:
    """One training run: ``model``, ``training`` and ``data``."""

    model: Any = field(default_factory=ModelSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    data: DataSection = field(default_factory=DataSection)

    def __post_init__(self) -> None:
        if self.model.init_from is None:
            self._fill_in()
        else:
            self._check_init_from()
        is_text = self.data.task == "text"
        if self.training.best_metric == "exact_match" and (is_text or not self.training.eval_samples):
            raise ConfigError("training.best_metric exact_match needs pairs of source and target, and eval_samples")
        _check_training(self.training)

    @property
    def architecture(self) -> Architecture:
        """The one that the task needs."""
        return "decoder_only" if self.data.task == "text" else "encoder_decoder"

    def _fill_in(self) -> None:
        """Gives every option that was not given its default, so that the run's config.yaml says all."""
        model, data = self.model, self.data
        model.architecture = model.architecture or self.architecture
        if model.architecture != self.architecture:
            raise ConfigError(f"data.task {data.task} needs model.architecture {self.architecture}")
        model.positions = model.positions or ("rotary" if data.task == "text" else "sinusoidal")
        for field_ in dataclasses.fields(model):
            if getattr(model, field_.name) is None:
                setattr(model, field_.name, getattr(TransformerConfig, field_.name, None))
        data.tokenizer, data.vocab_size = data.tokenizer or DEFAULT_TOKENIZER, data.vocab_size or DEFAULT_VOCABULARY

    def _check_init_from(self) -> None:
        for name, value in vars(self.model).items():
            if value is not None and name not in BESIDE_INIT_FROM:
                raise ConfigError(f"model.{name} beside model.init_from: the checkpoint says what the model is")
        for name in ("tokenizer", "target_tokenizer", "vocab_size"):
            if getattr(self.data, name) is not None:
                raise ConfigError(f"data.{name} beside model.init_from: the checkpoint brings its tokenizer")

    @property
    def run_folder(self) -> Path:
        assert self.training.name is not None
        return Path(self.training.output_dir) / self.training.name

    def transformer(self, vocab_size: int, target_vocab_size: int | None) -> TransformerConfig:
        """The model's config, given the vocabularies that the data led to; None: the target shares the source's."""
        values = {name: value for name, value in dataclasses.asdict(self.model).items() if name != "init_from"}
        return TransformerConfig(**values, vocab_size=vocab_size, target_vocab_size=target_vocab_size)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _check_training(training: TrainingSection) -> None:
    if training.name is not None and (
        not training.name or Path(training.name).is_absolute() or ".." in Path(training.name).parts
    ):
        raise ConfigError(f"training.name is {training.name!r}: expected the name of a folder within output_dir")
    for name in ("batch_size", "accumulation", "num_epochs", "log_interval"):
        if getattr(training, name) < 1:
            raise ConfigError(f"training.{name} is {getattr(training, name)}: expected at least 1")
    for name in ("warmup_steps", "eval_interval", "eval_samples", "max_grad_norm", "weight_decay", "z_loss", "seed"):
        if not 0 <= getattr(training, name) < math.inf:
            raise ConfigError(f"training.{name} is {getattr(training, name)}: expected 0 or more")
    for name, most in (("accumulation", 10_000), ("seed", 2**63 - 1), ("num_epochs", 10**9)):
        if getattr(training, name) > most:
            raise ConfigError(f"training.{name} is {getattr(training, name)}: expected at most {most}")
    if training.max_steps is not None and training.max_steps < 1:
        raise ConfigError(f"training.max_steps is {training.max_steps}: expected at least 1")
    if not training.learning_rate > 0:
        raise ConfigError(f"training.learning_rate is {training.learning_rate}: expected a positive number")
    for name in ("label_smoothing", "beta1", "beta2"):
        if not 0 <= getattr(training, name) < 1:
            raise ConfigError(f"training.{name} is {getattr(training, name)}: expected a number in [0, 1)")


def parse(arguments: list[str]) -> RunConfig:
    """The config of ``--config FILE section.key=value ...``. Raises ConfigError, in one sentence, for a wrong one."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m train.launch",
        description="Trains a model from one YAML file; options may also be given as section.key=value.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="the run's YAML file")
    for name, section in {"model": ModelSection, "training": TrainingSection, "data": DataSection}.items():
        parser.add_class_arguments(section, name)
    files, rest = _split_config(arguments)
    for file in files:
        _check_sections(file)
    overrides = [re.sub(r"^(--)?(?=(model|training|data)\.\w+=)", "--", argument) for argument in rest]
    try:
        # --config first: jsonargparse lets a file undo an override that stands before it.
        parsed = parser.parse_args([*(f"--config={file}" for file in files), *overrides])
        sections = parser.instantiate(parsed)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_one_line(error)) from None
    config = RunConfig(sections.model, sections.training, sections.data)
    if config.training.name is None:
        config.training.name = Path(files[-1]).stem if files else config.data.task
    return config


def _split_config(arguments: list[str]) -> tuple[list[str], list[str]]:
    files, rest, pending = [], [], iter(arguments)
    for argument in pending:
        if argument == "--config":
            files.append(next(pending, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"no config file at {file or '(nothing given)'}")
    return files, rest


def _check_sections(file: str) -> None:
    """Raises ConfigError unless the file is a mapping of sections, each a mapping."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} is not YAML in UTF-8: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is empty or no mapping: expected the sections model, training and data")
    for name, section in content.items():
        if not isinstance(section, dict | None):
            raise ConfigError(f"{file}: section {name} is {section!r:.40}, expected keys and values")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def fail(error: Exception) -> None:
    """Ends the program as every command does after a user's mistake: one line, exit code 2."""
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)
