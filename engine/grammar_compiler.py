"""From what a request asks of its text to a grammar for one model's tokens."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from engine.grammar_build import GrammarBuilder, convert
from engine.grammar_state import CompiledGrammar
from engine.grammar_vocabulary import GrammarVocabulary
from engine.grammar_worker import GrammarWorker
from engine.structured_outputs import GrammarSource, StructuredOutputsParams
from models.tokenizer import Tokenizer

# What is kept: those used last.
MAX_GRAMMARS = 64
MAX_BYTES = 256 << 20

WORKER = GrammarWorker()


class GrammarCompiler:
    """Compiles grammars for one model and keeps the last ones. Threads may share it.

    Args:
        tokenizer: whose decoded text the grammars hold. vocab_size: the width of the model's logits.
        eos_ids: the tokens that end a text.

    Raises ValueError where the library ``xgrammar`` is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        try:
            import xgrammar  # noqa: F401
        except ImportError:
            message = "structured outputs need xgrammar: pip install 'tandem-transformer[structured]'"
            raise ValueError(message) from None
        self.vocabulary = GrammarVocabulary.of(tokenizer, vocab_size, eos_ids)
        self._builder = GrammarBuilder(self.vocabulary)
        self._cache: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """The grammar of ``params``. A new one takes milliseconds, seldom seconds, and the first two more.

        Raises ValueError, in one sentence, for one that is invalid, that the vocabulary cannot spell or that takes
        more than ten seconds to compile.
        """
        source = params.source()
        with self._lock:
            if source in self._cache:
                self._cache.move_to_end(source)
                return self._cache[source]
        WORKER.check(self.vocabulary, source)
        grammar = self._builder.build(convert(source))
        with self._lock:
            self._cache[source] = grammar
            self._drop_oldest()
        return grammar

    def _drop_oldest(self) -> None:
        size = sum(grammar.num_bytes for grammar in self._cache.values())
        while len(self._cache) > 1 and (len(self._cache) > MAX_GRAMMARS or size > MAX_BYTES):
            size -= self._cache.popitem(last=False)[1].num_bytes
