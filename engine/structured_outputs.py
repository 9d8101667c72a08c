"""``StructuredOutputsParams``: what shape one request's text must have."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from engine.json_schemas import check_schema
from models.tokenizer import is_unicode

MAX_BYTES = 65_536  # of one text
MAX_CHOICES = 2_048
MAX_DEPTH = 64  # of JSON in JSON
MAX_REPEATS = 2_048  # counts such as {2,9} added up: two that follow one another cost time with their product

Kind = Literal["json", "regex", "grammar"]
# The largest count of {n}, {n,} and {n,m}; digits beyond the sixth change nothing.
COUNTED = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")
ESCAPES = {'"': '\\"', "\\": "\\\\", **{chr(code): f"\\u{code:04x}" for code in range(32)}}


class GrammarSource(NamedTuple):
    """A grammar as its library reads it, and the field that it comes from."""

    kind: Kind
    text: str
    field: str


@dataclass(frozen=True)
class StructuredOutputsParams:
    """vLLM's names. Exactly one must be given; a wrong value is a ValueError that names it.

    Attributes:
        json: the text is JSON that fits this JSON schema, given as an object or as JSON.
        regex: the text matches this expression as a whole, which is ECMAScript's without look-around, references and
            word boundaries; ``.`` takes newlines too, ``\\d``, ``\\w`` and ``\\s`` are those of ASCII.
        choice: the text is one of these.
        grammar: the text is what rule ``root`` of this grammar derives, in llama.cpp's EBNF (GBNF).
        json_object: True: the text is any JSON object.

    No text may have more than 64 KiB. Schemas are at most 64 levels deep, and one that a text cannot be held to, such
    as one with ``not``, is refused (``engine.json_schemas``). JSON has its properties in the schema's order, and no
    others unless the schema says which; of a ``format`` it has the shape, and any text for an unknown one.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ValueError(f"structured_outputs takes exactly one of {names}, got {', '.join(given) or 'none'}")
        self.source()

    def source(self) -> GrammarSource:
        """The grammar, checked as far as it can be without compiling it. Raises ValueError."""
        if self.json is not None:
            return GrammarSource("json", _schema_text(self.json), "json")
        if self.regex is not None:
            return GrammarSource("regex", _checked("regex", self.regex), "regex")
        if self.choice is not None:
            return GrammarSource("grammar", _choice_grammar(self.choice), "choice")
        if self.grammar is not None:
            return GrammarSource("grammar", _checked("grammar", self.grammar), "grammar")
        if self.json_object is not True:
            raise ValueError(f"json_object must be True where it is given, got {self.json_object!r}")
        return GrammarSource("json", '{"type": "object"}', "json_object")


def _checked(name: str, text: object) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name} must be a string that is not empty, got {text!r:.80}")
    check_size(name, text)
    check_repeats(name, text)
    return text


def check_size(name: str, text: str) -> None:
    """Raises ValueError for a text that is too long or holds what is no character."""
    if not is_unicode(text) or "\0" in text:
        raise ValueError(f"{name} must be valid Unicode without null characters")
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"{name} must be at most {MAX_BYTES} bytes, got {len(text.encode())}")


def check_repeats(name: str, text: str) -> None:
    """Raises ValueError for an expression or grammar whose counted repetitions are too many."""
    counts = [int((most or least)[:6]) for least, most in COUNTED.findall(text)]
    if sum(counts) > MAX_REPEATS:
        raise ValueError(f"{name} must count at most {MAX_REPEATS} repetitions in all, got {sum(counts)} or more")


def _schema_text(schema: object) -> str:
    """A schema as JSON, with every key once."""
    if isinstance(schema, str):
        check_size("json", schema)
    try:
        text = json.dumps(
            json.loads(schema) if isinstance(schema, str) else schema, ensure_ascii=False, allow_nan=False
        )
        schema = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json must be a JSON schema: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json must be a JSON schema, which is an object, got {text:.80}")
    check_size("json", text)
    if _depth(schema) > MAX_DEPTH:
        raise ValueError(f"json must be at most {MAX_DEPTH} levels deep")
    for pattern in check_schema(schema):
        check_repeats("json", pattern)
    return text


def _depth(value: object) -> int:
    """How many objects and arrays lie in one another, the outermost included; it stops counting beyond MAX_DEPTH."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [item for item in level if isinstance(item, dict | list | tuple)]
        depth += bool(inner)
        level = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
    return depth


def _choice_grammar(choices: object) -> str:
    if not isinstance(choices, list | tuple) or not 1 <= len(choices) <= MAX_CHOICES:
        raise ValueError(f"choice must be a list of 1 to {MAX_CHOICES} strings, got {choices!r:.80}")
    if any(not isinstance(text, str) or not text for text in choices):
        raise ValueError(f"choice must be strings that are not empty, got {choices!r:.80}")
    check_size("choice", "".join(choices))
    return "root ::= " + " | ".join(f'"{"".join(ESCAPES.get(c, c) for c in text)}"' for text in choices)
