"""How good a model is on a file of text or of pairs: perplexity, exact match, error rate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine import LLM, SamplingParams
from engine.prompts import Prompt
from models.tokenizer import Tokenizer, is_unicode
from train.data.corpora import DataSection, Pair, read_pairs
from train.metrics import exact_match, token_error_rate

OF_OUTPUTS = {"exact_match": exact_match, "wer": token_error_rate}
METRICS = ("perplexity", *OF_OUTPUTS)
BATCH = 16  # sequences at a time
PAIR_SUFFIXES = (".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class Examples:
    """What a model is measured on: documents to continue, or pairs of a source and the targets that are right for it.

    Attributes:
        scored: prompts and targets whose perplexity is measured.
        pairs: those whose outputs are compared with their references; none for documents.
        longest_prompt, longest_target: in tokens; of documents, a window counts as a target.
    """

    scored: list[tuple[Prompt, str | list[int]]]
    pairs: list[Pair]
    longest_prompt: int
    longest_target: int


def read_examples(path: Path, tokenizer: Tokenizer, context: int, limit: int | None) -> Examples:
    """A file's examples: pairs of .tsv, or .jsonl with source and target; documents of .jsonl with text, or any file.

    ``context``: tokens a document is cut to. ``limit``: how many pairs, or tokens of documents, are read. Raises
    ValueError for a file that is missing, malformed or empty.
    """
    documents = _documents(path)
    if documents is None:
        pairs = read_pairs(DataSection(task="pairs", file=str(path)))[:limit]
        if not pairs:
            raise ValueError(f"{path} holds no pairs")
        targets = [(pair.source, target) for pair in pairs for target in pair.references]
        prompt, target = (max(map(len, ids)) for ids in (
            tokenizer.encode_batch([source for source, _ in targets]),
            tokenizer.encode_target_batch([target for _, target in targets]),
        ))  # fmt: skip
        return Examples(list(targets), pairs, prompt, target)
    scored: list[tuple[Prompt, str | list[int]]] = []
    left = limit
    for document in documents:
        ids = tokenizer.encode(document)[:left]
        left = None if left is None else left - len(ids)
        scored += [({"prompt_token_ids": prompt}, target) for prompt, target in windows(ids, context)]
    if not scored:
        raise ValueError(f"{path} holds no text of two tokens or more")
    return Examples(scored, [], 0, context)


def _documents(path: Path) -> list[str] | None:
    """The texts of a file, None where it holds pairs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no data file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from None
    if path.suffix not in PAIR_SUFFIXES:
        return [text]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".tsv" or not lines or '"text"' not in lines[0][1]:
        return None
    return [_text(line, f"{path}, line {number}") for number, line in lines]


def _text(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str) or not is_unicode(text):
        raise ValueError(f"{place}: expected a JSON object whose text is a string of valid Unicode")
    return text


def windows(ids: list[int], context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and targets of ``context`` tokens together: every token but the first is a target once, and from the
    second window on has half a context before it."""
    half = context // 2
    if len(ids) > 1:
        yield ids[:1], ids[1:context]
    for start in range(context, len(ids), context - half):
        yield ids[start - half : start], ids[start : start + context - half]


def measure(llm: LLM, examples: Examples, metrics: list[str], max_tokens: int) -> dict[str, float]:
    """The metrics by name; outputs have at most ``max_tokens``. Raises ValueError where the model gives none."""
    figures = {}
    if "perplexity" in metrics:
        figures["perplexity"] = perplexity(llm, examples)
    if compared := [name for name in metrics if name in OF_OUTPUTS]:
        outputs = decode(llm, examples.pairs, max_tokens)
        references = [[reference.strip() for reference in pair.references] for pair in examples.pairs]
        figures |= {name: OF_OUTPUTS[name](outputs, references) for name in compared}
    return {name: figures[name] for name in metrics}


def perplexity(llm: LLM, examples: Examples) -> float:
    """exp of the mean negative log-probability of a target token; an encoder-decoder's end token is one of them."""
    total, tokens = 0.0, 0
    for start in range(0, len(examples.scored), BATCH):
        prompts, targets = zip(*examples.scored[start : start + BATCH], strict=True)
        for output in llm.score(list(prompts), list(targets)):
            total, tokens = total + output.total, tokens + len(output.token_ids)
    return math.exp(min(-total / tokens, 700))  # beyond which there is no float


def decode(llm: LLM, pairs: list[Pair], max_tokens: int) -> list[str]:
    """The greedy output for each pair's source, without space around it."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = [output.outputs[0] for output in llm.generate([pair.source for pair in pairs], params, use_tqdm=False)]
    for pair, output in zip(pairs, outputs, strict=True):
        if output.error is not None:
            raise ValueError(f"no output for the source {pair.source[:40]!r}: {output.error}")
    return [output.text.strip() for output in outputs]
