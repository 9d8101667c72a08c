"""Grammars hold the decoded text to what was asked, whatever tokens are chosen among those they allow."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models

from engine import grammar_build, grammar_compiler, grammar_worker
from engine.grammar_compiler import GrammarCompiler
from engine.grammar_state import AmbiguousGrammarError, CompiledGrammar, GrammarError, GrammarState
from engine.structured_outputs import MAX_BYTES, MAX_CHOICES, StructuredOutputsParams
from models.tokenizer import SpecialTokens, Tokenizer, train_vocabulary
from tests.models.tokenizer_folders import FAMILIES, LINES

TEXTS = [*LINES, *map(json.dumps, ({"name": "café", "n": [-1.5e3, True, None]}, {"a": [{}], "b": 'c"d\\'}))]
KINDS = ("char", "bpe", *FAMILIES)
# These spell any text; the others lack some characters.
SPELL_ALL = ("bpe", "llama", "llama_legacy", "gpt2", "gpt2_json", "bart", "byt5", "mt5")
SPACE = 32  # more than the tokenizer has, as models pad their logits


def make_tokenizer(kind: str, folder: Path) -> Tokenizer:
    if kind in ("char", "word", "bpe"):
        return Tokenizer(train_vocabulary(kind, TEXTS, 400))  # type: ignore[arg-type]
    FAMILIES[kind](folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def make_compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    assert tokenizer.eos_id is not None
    return GrammarCompiler(tokenizer, tokenizer.target_vocab_size + SPACE, [tokenizer.eos_id])


@pytest.fixture(scope="module", params=KINDS)
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    tokenizer = make_tokenizer(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, tokenizer, make_compiler(tokenizer)


@pytest.fixture(scope="module")
def byte_level() -> tuple[Tokenizer, GrammarCompiler]:
    tokenizer = Tokenizer(train_vocabulary("bpe", TEXTS, 400))
    return tokenizer, make_compiler(tokenizer)


def allowed(state: GrammarState) -> list[int]:
    mask = np.full_like(state.grammar.vocabulary.anywhere, 0x55555555)
    state.fill_mask(mask)
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert ids.max() < state.grammar.vocabulary.size
    return [int(i) for i in ids]


def walk(grammar: CompiledGrammar, generator: random.Random, most: int = 150) -> list[int] | None:
    """Random allowed tokens until the end token; None for a walk that does not end."""
    state, ends = grammar.state(), set(grammar.vocabulary.eos_ids)
    for _ in range(most):
        ids = allowed(state)
        choice = generator.choice(ids)
        if ends & set(ids) and len(state.token_ids) > most // 4:
            choice = min(ends & set(ids))
        assert not state.finished or ends.issuperset(ids)
        state.accept(choice)
        if choice in ends:
            assert state.finished
            return state.token_ids
    return None


def texts_of(
    tokenizer: Tokenizer, compiler: GrammarCompiler, count: int = 12, seed: int = 0, **params: Any
) -> list[str]:
    grammar, generator = compiler.compile(StructuredOutputsParams(**params)), random.Random(seed)
    walks = [walk(grammar, generator) for _ in range(count)]
    return [tokenizer.decode_as_is(ids) for ids in walks if ids is not None]


@pytest.mark.parametrize(
    "regex",
    [
        r"The [a-z]{2,5} is (one|two)\.",
        r"[a-z]+( [a-z]+){0,3}",
        r" ?[a-h]{1,4}",
        r" [a-d]x?",
        r"(a+)+b",
        r"[^a-y]{1,6}z",
    ],
)
def test_the_text_matches_the_expression(compiler: tuple[Any, ...], regex: str) -> None:
    _, tokenizer, grammars = compiler
    texts = texts_of(tokenizer, grammars, regex=regex)
    assert len(texts) > 5
    trims = type(tokenizer.target).__name__ == "SpmVocabulary"
    for text in texts:
        assert re.fullmatch(regex, text, re.DOTALL) or (trims and re.fullmatch(f"\\s*({regex})\\s*", f" {text}"))


def test_the_text_is_one_of_the_choices(compiler: tuple[Any, ...]) -> None:
    _, tokenizer, grammars = compiler
    choices = ["a", "a b", "house", "the house is", "1 2"]
    texts = texts_of(tokenizer, grammars, 40, choice=choices)
    assert set(texts) <= set(choices) and len(set(texts)) > 2


def test_what_encoding_gives_is_allowed(compiler: tuple[Any, ...]) -> None:
    """The tokens a model has learned for a text, not only odd ones that spell it too."""
    _, tokenizer, grammars = compiler
    text = "the house is wonderful."
    state = grammars.compile(StructuredOutputsParams(choice=[text, "other"])).state()
    for token_id in tokenizer.encode_target(text):
        assert token_id in allowed(state)
        state.accept(token_id)
    assert state.finished and allowed(state) == [tokenizer.eos_id]


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "é", 'q"\\']}, "maxItems": 3},
            "size": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/size"}]},
        },
        "required": ["name", "size"], "additionalProperties": False,
        "$defs": {"size": {"type": "string", "enum": ["s", "m"], "description": "how large"}},
    },
    {"type": "array", "prefixItems": [{"const": "x"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"}, {"type": ["integer", "null"], "exclusiveMinimum": 7},
    {"type": "string", "pattern": "^[^a]{1,4}$"}, {"type": "integer", "multipleOf": 7},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "number"}}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": {"enum": [0]}, "maxProperties": 2},
]  # fmt: skip


@pytest.mark.parametrize("kind", SPELL_ALL)
def test_json_fits_its_schema(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, tmp_path)
    grammars = make_compiler(tokenizer)
    for schema in SCHEMAS:
        texts = texts_of(tokenizer, grammars, 6, json=schema) + texts_of(
            tokenizer, grammars, 6, 1, json=json.dumps(schema)
        )
        assert texts
        for text in texts:
            jsonschema.validate(json.loads(text), schema)
    for text in texts_of(tokenizer, grammars, json={"type": "string", "format": "date"}):
        assert re.fullmatch(r'"\d{4}-\d\d-\d\d"', text)  # the 31st of November too
    for text in texts_of(tokenizer, grammars, 10, json_object=True):
        assert isinstance(json.loads(text), dict)


def test_a_grammar_derives_the_text(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    grammar = 'root ::= sum\nsum ::= term | term " + " sum\nterm ::= [0-9] | "(" sum ")"'
    texts = texts_of(*byte_level, grammar=grammar)
    assert texts and all(isinstance(eval(text), int) for text in texts)


def test_text_is_unicode(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    for regex in (".{1,3}", "[^a]{4}", "[가-힣]{2,3}", "[😀-😂\ud7ff-\ue000]+", "[\u0080-\U0010ffff]{3}"):
        for text in texts_of(*byte_level, 40, regex=regex):
            assert re.fullmatch(regex, text, re.DOTALL) and "\ufffd" not in text
    assert set(texts_of(*byte_level, 40, choice=["안녕", "안", 'q"\\\n\x01😀'])) == {"안녕", "안", 'q"\\\n\x01😀'}


def test_a_first_space_may_be_left_out_or_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama", tmp_path)
    grammars, ids = make_compiler(tokenizer), tokenizer.target.token_to_id
    state = grammars.compile(StructuredOutputsParams(regex="[ab]c")).state()
    assert {ids("▁"), ids("▁a"), ids("a"), ids("<0x61>"), ids("<0x20>")} <= set(allowed(state))
    state.accept(ids("▁"))
    assert ids("a") in allowed(state) and ids("▁a") not in allowed(state)
    needed = grammars.compile(StructuredOutputsParams(regex=" [ab]c")).state()
    assert ids("▁a") not in allowed(needed) and ids("▁") in allowed(needed)


def test_a_first_token_that_loses_more_than_a_space_is_not_allowed() -> None:
    vocabulary = Vocabulary(models.WordLevel({"</s>": 0, "▁a▁b": 1, "▁a": 2, "▁▁": 3, "▁b": 4}, unk_token="</s>"))
    vocabulary.decoder = decoders.Metaspace("▁", "always")
    vocabulary.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(vocabulary, special=SpecialTokens(eos="</s>"))
    grammars = make_compiler(tokenizer)
    assert tokenizer.decode([1]) == "ab"
    state = grammars.compile(StructuredOutputsParams(regex="a b( +a b)?")).state()
    assert allowed(state) == [2]
    for token_id in (2, 4, 3, 2, 4):
        state.accept(token_id)
    assert tokenizer.decode(state.token_ids) == "a b   a b"


def test_words_are_joined_by_spaces() -> None:
    tokenizer = make_tokenizer("word", Path())
    texts = texts_of(tokenizer, make_compiler(tokenizer), regex="(One|Two|two|three)( (three|two)){1,2}")
    assert texts and all(re.fullmatch("(One|Two|two|three)( (three|two)){1,2}", text) for text in texts)


def test_the_end_token_is_allowed_where_the_text_may_end(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, _ = byte_level
    ends = [tokenizer.eos_id, tokenizer.target_vocab_size + 3]
    grammars = GrammarCompiler(tokenizer, tokenizer.target_vocab_size + 5, [*ends, 10**6])  # type: ignore[list-item]
    grammar = grammars.compile(StructuredOutputsParams(regex="ab*"))
    for end in ends:
        state = grammar.state()
        assert not set(ends) & set(allowed(state)) and not state.finished
        state.accept(tokenizer.encode_target("a")[0])
        assert set(ends) < set(allowed(state)) and not state.finished
        state.accept(end)  # type: ignore[arg-type]
        assert state.finished
        with pytest.raises(GrammarError, match="end token"):
            allowed(state)
        with pytest.raises(GrammarError, match="does not allow"):
            state.accept(end)  # type: ignore[arg-type]


def test_a_model_without_an_end_token_is_told_that_it_has_finished(
    byte_level: tuple[Tokenizer, GrammarCompiler],
) -> None:
    tokenizer, _ = byte_level
    state = GrammarCompiler(tokenizer, 400, []).compile(StructuredOutputsParams(regex="ab?")).state()
    for letter in "ab":
        assert not state.finished
        state.accept(tokenizer.encode_target(letter)[0])
    assert state.finished
    with pytest.raises(GrammarError, match="no token"):
        allowed(state)


def test_a_token_that_is_not_allowed_changes_nothing(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, grammars = byte_level
    state = grammars.compile(StructuredOutputsParams(regex="[ab]+")).state()
    before = allowed(state)
    for token_id in (tokenizer.encode_target("c")[0], tokenizer.bos_id, tokenizer.eos_id, -1, 410, 10**9):
        with pytest.raises(GrammarError, match=f"does not allow token {token_id}"):
            state.accept(token_id)  # type: ignore[arg-type]
    assert allowed(state) == before and state.token_ids == []
    with pytest.raises(ValueError, match="int32"):
        state.fill_mask(np.zeros(3, np.int32))


def test_what_the_vocabulary_cannot_spell_is_an_error() -> None:
    tokenizer = Tokenizer(train_vocabulary("char", ["abc"], 0))
    grammars = make_compiler(tokenizer)
    with pytest.raises(ValueError, match="no token that the grammar allows"):
        grammars.compile(StructuredOutputsParams(json_object=True))
    state = grammars.compile(StructuredOutputsParams(regex="ab(c{0}d)")).state()
    state.accept(tokenizer.encode("a")[0])
    state.accept(tokenizer.encode("b")[0])
    with pytest.raises(GrammarError, match="no token that the grammar allows"):
        allowed(state)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json": {}, "regex": "a"}, "got json, regex"),
        ({"regex": 3}, "regex must be a string"), ({"regex": ""}, "regex must be"),
        ({"grammar": b"a"}, "grammar must be"),
        ({"regex": "a" * (MAX_BYTES + 1)}, f"regex must be at most {MAX_BYTES} bytes"),
        ({"grammar": "안" * 22_000}, "grammar must be at most"), ({"regex": "\ud800"}, "regex must be valid Unicode"),
        ({"grammar": 'root ::= "\0"'}, "grammar must be valid"),
        ({"regex": "a{1,100000000}"}, "regex must count at most"),
        ({"regex": "a{" + "9" * 9000 + "}"}, "regex must count"),
        ({"regex": "(a{1000}){1000,}b{ 0, 900 }"}, "in all, got"),
        ({"choice": []}, "choice must be a list"), ({"choice": "ab"}, "choice must be"),
        ({"choice": ["a", 3]}, "choice must"),
        ({"choice": ["a", ""]}, "choice must be strings that"), ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice must"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "choice must be at most"),
        ({"choice": ["\udc00"]}, "choice must be valid"),
        ({"json": "{"}, "json must be a JSON schema"), ({"json": "[]"}, "which is an object"),
        ({"json": 3}, "json must be"),
        ({"json": {"const": float("nan")}}, "json must be"), ({"json": {"const": {1}}}, "json must be"),
        ({"json": "[" * 60_000}, "json must be a JSON schema"), ({"json": deep(100)}, "at most 64 levels"),
        ({"json": deep(100_000)}, "json must be"), ({"json": {"enum": ["x" * 70_000]}}, "json must be at most"),
        ({"json": '{"const": "\\ud800"}'}, "json must be valid Unicode"),
        ({"json_object": False}, "json_object must be True"),
        ({"json_object": 1}, "json_object must be True"),
        ({"json": {"properties": {"a": {"pattern": "a{1,9999}", "type": "string"}}}}, "json must count at most"),
    ],
)  # fmt: skip
def test_a_bad_value_is_a_sentence_that_names_it(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        StructuredOutputsParams(**params)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"), ({"type": "array", "items": {"if": {}}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"minLength": 3}, "minLength without a type"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '"b", which is not among'),
        ({"anyOf": [{}], "type": "object"}, "anyOf and another type"),
        ({"$ref": "#/$defs/a", "minimum": 3}, "$ref and minimum"),
        ({"enum": ["a", 1], "type": "string"}, "enum and another type"),
        ({"const": True, "type": "integer"}, "const and"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern and maxLength"),
        ({"type": "string", "pattern": 'a"'}, "pattern"), ({"type": "string", "pattern": "\\\\"}, "pattern"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}, "properties and pattern"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
        ({"$ref": "#"}, "leads back"),
    ],
)  # fmt: skip
def test_a_schema_that_no_grammar_can_hold_is_refused(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"^json .*{re.escape(word)}"):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "a(?=b)"}, "regex cannot be used: .*Lookahead"),
        ({"regex": "a^b"}, "regex cannot be used: .*ignored"),
        ({"regex": "("}, "regex"), ({"regex": "[b-a]"}, "regex"), ({"regex": r"\Z"}, "regex .*not recognized"),
        ({"regex": "(" * 30_000 + "a" + ")" * 30_000}, "regex cannot be used: .*limit"),
        ({"grammar": "%%"}, "grammar cannot be used"), ({"grammar": 'a ::= "b"'}, "grammar cannot be used: .*root"),
        ({"grammar": "root ::= b"}, "grammar cannot be used: .*not defined"),
        ({"json": {"type": "foo"}}, "json cannot be used: .*foo"),
        ({"json": {"$ref": "#/$defs/x"}}, "json cannot be used"),
        ({"json": {"$ref": "http://x"}}, "json cannot be used"),
        ({"json": {"type": "integer", "minimum": 1e40}}, "json cannot"),
        ({"json": {"allOf": [{"type": "integer"}, {"type": "string"}]}}, "json cannot be used: .*allOf"),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "json cannot be used: .*oneOf"),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_a_sentence(
    byte_level: tuple[Tokenizer, GrammarCompiler], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        byte_level[1].compile(StructuredOutputsParams(**params))
    assert "\n" not in str(caught.value) and "/project" not in str(caught.value) and len(str(caught.value)) < 250


def test_what_takes_too_long_to_compile_ends(
    byte_level: tuple[Tokenizer, GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, grammars = byte_level
    worker = grammar_worker.GrammarWorker()
    hasty = "import engine.grammar_worker as w, sys; w.SECONDS = 0.5; w.serve(int(sys.argv[1]))"
    monkeypatch.setattr(grammar_worker, "CODE", hasty)
    monkeypatch.setattr(grammar_compiler, "WORKER", worker)
    with pytest.raises(ValueError, match="regex is too large or too ambiguous to compile"):
        grammars.compile(StructuredOutputsParams(regex="a*" * 2000))
    assert worker._process is None
    assert texts_of(tokenizer, grammars, 1, regex="after") == ["after"]  # in a new process
    worker.stop()


def test_a_process_that_is_gone_is_started_again(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, grammars = byte_level
    process = grammar_compiler.WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert texts_of(tokenizer, grammars, 1, regex="again") == ["again"]


def test_an_ambiguous_grammar_ends_before_it_holds_up_others(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, grammars = byte_level
    regex = "((x?y?){0,500}){0,500}"
    start = time.process_time()
    with pytest.raises(ValueError, match="too ambiguous"):
        grammars.compile(StructuredOutputsParams(regex=regex))
    # Where trying it out did not find that way, the sequence that does ends.
    state = grammars.compile(StructuredOutputsParams(regex="[a-w]{70}|" + regex)).state()
    mask, token_id = np.empty_like(grammars.vocabulary.anywhere), tokenizer.encode_target("x")[0]
    with pytest.raises(AmbiguousGrammarError, match="too ambiguous"):  # noqa: PT012
        while True:
            state.fill_mask(mask)
            state.accept(token_id)
    assert time.process_time() - start < 10


def test_compiled_grammars_are_kept_up_to_a_bound(
    byte_level: tuple[Tokenizer, GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = make_compiler(byte_level[0])
    monkeypatch.setattr(grammar_compiler, "MAX_GRAMMARS", 3)
    first = grammars.compile(StructuredOutputsParams(regex="0"))
    for index in range(1, 6):
        assert grammars.compile(StructuredOutputsParams(regex="0")) is first  # used last, so it stays
        grammars.compile(StructuredOutputsParams(regex=str(index)))
        assert len(grammars._cache) <= 3
    monkeypatch.setattr(grammar_compiler, "MAX_BYTES", 1)
    last = grammars.compile(StructuredOutputsParams(regex="last"))
    assert list(grammars._cache.values()) == [last]
    assert allowed(first.state())


def test_a_stream_of_new_schemas_takes_no_more_memory(
    byte_level: tuple[Tokenizer, GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_build, "CACHE_BYTES", 200_000)
    grammars = make_compiler(byte_level[0])
    for index in range(40):
        grammars.compile(StructuredOutputsParams(json={"type": "string", "minLength": index, "maxLength": 2 * index}))
        grammars._cache.clear()
        assert grammars._builder._compiler.get_cache_size_bytes() < 400_000


def test_threads_may_share_a_compiler(byte_level: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, grammars = byte_level
    failed: list[str] = []

    def run(seed: int) -> None:
        for index in range(4):
            want = f"t{seed}{index % 2}"
            if texts_of(tokenizer, grammars, 2, seed=seed, regex=want) != [want] * 2:
                failed.append(want)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert not failed


def test_the_library_is_asked_for_where_it_lacks(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match=r"pip install 'tandem-transformer\[structured\]'"):
        make_compiler(tokenizer)
    StructuredOutputsParams(regex="a")  # needs no library
