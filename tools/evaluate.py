"""``python -m tools.evaluate``: how good a model is on a file, in floats and quantised side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from engine import LLM
from models.checkpoint import open_model
from models.config import TransformerConfig
from models.quantized import DeviceQuantization
from tools.quality import BATCH, METRICS, OF_OUTPUTS, Examples, measure, read_examples

CONTEXT = 1024
NONE = "none"
Result = dict[str, Any]


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    try:
        results = evaluate(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    Console(soft_wrap=True, highlight=False).print(table(results, options.metrics))
    print(json.dumps({"model": options.model, "data": options.data, "results": results}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate", description="Measures a model on text or on pairs, whole or quantised.",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder, a .gguf file or a Hub id")
    parser.add_argument(
        "--data", required=True, metavar="FILE",
        help="pairs: .tsv, or .jsonl with source and target; documents: .jsonl with text, or any other file",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=listed(METRICS), default=["perplexity"], metavar="NAME,...",
        help=f"of {', '.join(METRICS)} (perplexity); wer counts tokens between spaces: of phones, the phone error rate",
    )  # fmt: skip
    kinds = (NONE, *get_args(DeviceQuantization))
    parser.add_argument(
        "--quantization", type=listed(kinds), default=[NONE], metavar="KIND,...",
        help=f"one or more of {', '.join(kinds)} (none)",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N pairs, or tokens of documents")
    parser.add_argument("--context", type=positive, metavar="N", help=f"tokens a document is cut to ({CONTEXT})")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="most tokens of an output (half again the longest target)"
    )
    parser.add_argument("--backend", default="auto", help="of the engine: auto, native or torch (auto)")
    parser.add_argument("--num-threads", type=positive, metavar="N", help="CPU threads")
    return parser


def listed(known: tuple[str, ...]) -> Any:
    """A type for argparse: one or more of the known names, between commas."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return number


def evaluate(options: argparse.Namespace) -> list[Result]:
    """The metrics of every quantization asked for. Raises ValueError or OSError for a user's mistake."""
    model, tokenizer, _ = open_model(options.model)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer: there is no text to measure it on")
    config = model.config
    context = min(options.context or CONTEXT, config.max_seqlen)
    if context < 2:
        raise ValueError(f"--context {context} leaves no token to predict: expected 2 or more")
    examples = read_examples(Path(options.data), tokenizer, context, options.limit)
    check(examples, config, options)
    # Half again the longest target: room to be wrong in.
    max_tokens = options.max_tokens or examples.longest_target * 3 // 2 + 2
    results: list[Result] = []
    for kind in options.quantization:
        llm = LLM(
            options.model, quantization=None if kind == NONE else kind, backend=options.backend, max_num_seqs=BATCH,
            max_model_len=room(examples, config, max_tokens), num_threads=options.num_threads,
        )  # fmt: skip
        results.append({"quantization": kind, **measure(llm, examples, options.metrics, max_tokens)})
    return results


def check(examples: Examples, config: TransformerConfig, options: argparse.Namespace) -> None:
    """Raises ValueError for documents where pairs are needed."""
    if examples.pairs:
        return
    if config.is_encoder_decoder:
        raise ValueError(f"an encoder-decoder model is measured on pairs: {options.data} holds documents")
    if outputs := [name for name in options.metrics if name in OF_OUTPUTS]:
        raise ValueError(f"{outputs[0]} is measured on pairs: {options.data} holds documents")


def room(examples: Examples, config: TransformerConfig, max_tokens: int) -> int:
    """The longest sequence there will be: a source, or a prompt and what follows it, with special tokens around."""
    if not examples.pairs:
        return examples.longest_target
    return min(examples.longest_prompt + max(examples.longest_target, max_tokens) + 4, config.max_seqlen)


def table(results: list[Result], metrics: list[str]) -> Table:
    """A row for each quantization, with what it differs by from the first."""
    shown = Table("weights", *metrics)
    first = results[0]
    for result in results:
        shown.add_row(result["quantization"], *(_figure(name, result[name], first[name]) for name in metrics))
    return shown


def _figure(name: str, value: float, first: float) -> str:
    if name in OF_OUTPUTS:
        return f"{value:.2%}" if value == first else f"{value:.2%} ({100 * (value - first):+.2f})"
    return f"{value:#.4g}" if value == first else f"{value:#.4g} ({value / first - 1:+.1%})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
