"""A grammar compiled by the library ``xgrammar``: for as long as that takes, and in as much memory."""

from __future__ import annotations

from typing import Any

from engine.grammar_state import CompiledGrammar
from engine.grammar_vocabulary import GrammarVocabulary
from engine.structured_outputs import GrammarSource

CACHE_BYTES = 64 << 20
# A character of a JSON string whose length is limited, as the library writes it, and as JSON wants it.
LOOSE, STRICT = r"[^\"\\\r\n]", r"[^\0-\x1f\"\\]"


def convert(source: GrammarSource) -> Any:
    """``xgrammar.Grammar`` of a source. What it leaves out, the library says on standard error."""
    from xgrammar import Grammar

    readers: dict[str, Any] = {
        "json": Grammar.from_json_schema,
        "regex": Grammar.from_regex,
        "grammar": Grammar.from_ebnf,
    }
    grammar = readers[source.kind](source.text)
    if source.kind == "json" and LOOSE in (rules := str(grammar)):
        return Grammar.from_ebnf(rules.replace(LOOSE, STRICT))
    return grammar


class GrammarBuilder:
    """Compiles grammars for one vocabulary, in the calling thread. Threads may share it."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.vocabulary = vocabulary
        self._compiler = _compiler(vocabulary.info())

    def build(self, grammar: Any) -> CompiledGrammar:
        if self.vocabulary.drops_space:
            grammar = _with_dropped_space(grammar)
        return CompiledGrammar(self._compiler.compile_grammar(grammar), self.vocabulary)


def _with_dropped_space(grammar: Any) -> Any:
    """The grammar behind a space that decoding drops; one that may start with a space itself needs it there."""
    from xgrammar import Grammar, GrammarMatcher, TokenizerInfo

    compiled = _compiler(TokenizerInfo([b" ", b""], stop_token_ids=[1])).compile_grammar(grammar)
    needed = GrammarMatcher(compiled).accept_string(" ")
    return Grammar.concat(Grammar.from_ebnf(f'root ::= " "{"" if needed else "?"}'), grammar)


def _compiler(info: Any) -> Any:
    # It keeps the rules of grammars too, as many have the same: a string of limited length is the slowest of them.
    from xgrammar import GrammarCompiler

    return GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
