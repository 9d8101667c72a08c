"""A process that compiles grammars.

Some short expressions take hours to compile or all memory, and nothing can stop the library at it. So it works in a
process of its own, which ends when it takes too long, and the next grammar gets another one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

import numpy as np

from engine.grammar_state import CompiledGrammar, GrammarError
from engine.grammar_vocabulary import GrammarVocabulary
from engine.structured_outputs import GrammarSource

SECONDS = 5  # of processor time, for one grammar
MAX_BYTES = 2 << 30  # of memory, beyond what the process starts with
MAX_COMPILED_BYTES = 64 << 20  # of one grammar, written out
TRIED_TOKENS = 64
CODE = "import sys; from engine.grammar_worker import serve; serve(int(sys.argv[1]))"
# A character of a JSON string whose length is limited, as the library writes it, and as JSON wants it.
LOOSE, STRICT = r"[^\"\\\r\n]", r"[^\0-\x1f\"\\]"
# What the library puts before a message, such as "[07:24:53] /project/cpp/regex_converter.cc:83: ".
PREFIX = re.compile(r"\[[\d:]+\] \S+:\d+: (?:Warning: )?")


class GrammarWorker:
    """The process as others see it: started at the first grammar, shared by all compilers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._known: str | None = None  # the vocabulary that it has

    def compile(self, vocabulary: GrammarVocabulary, source: GrammarSource) -> str:
        """A compiled grammar, written out. Raises ValueError, in one sentence, for one that is bad or too costly."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.stop()
            connection = self._connection or self._start()
            try:
                connection.send((vocabulary if vocabulary.key != self._known else None, source))
                self._known = vocabulary.key
                compiled, answer = connection.recv()
            except (EOFError, OSError):
                self.stop()
                raise ValueError(f"{source.field} is too large or too ambiguous to compile") from None
            except BaseException:  # an answer may still come, which is not the next grammar's
                self.stop()
                raise
        if not compiled:
            raise ValueError(f"{source.field} cannot be used: {answer}")
        return str(answer)

    def stop(self) -> None:
        """Ends the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = self._known = None
        atexit.unregister(self.stop)

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        # It needs no GPU and no second thread.
        environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CODE, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self._connection = ours
        atexit.register(self.stop)
        try:
            ours.recv()
        except BaseException as error:
            self.stop()
            raise RuntimeError("the process that compiles grammars did not start") from error
        return ours


def serve(descriptor: int) -> None:
    """What the process does, until the other end of its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection, vocabulary = Connection(descriptor), None
    import xgrammar  # noqa: F401  # before memory is limited

    _limit_memory()
    connection.send("ready")
    with contextlib.suppress(EOFError, OSError), _messages() as messages:
        while True:
            received, source = connection.recv()
            vocabulary = received or vocabulary
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # and then the process ends
            answer = _answer(vocabulary, source, messages)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(answer)


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # not every system tells or limits it
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))


@contextlib.contextmanager
def _messages() -> Iterator[IO[bytes]]:
    """A file that takes what the library writes to standard error: what it leaves out of a grammar, it tells there."""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        yield file


def _answer(vocabulary: Any, source: GrammarSource, messages: IO[bytes]) -> tuple[bool, str]:
    messages.seek(0)
    messages.truncate()
    try:
        grammar = _converted(source)
        messages.seek(0)
        if warning := messages.read().decode(errors="replace"):
            return False, _sentence(warning)
        return True, _compiled(grammar, vocabulary)
    except Exception as error:  # the library raises several
        return False, _sentence(str(error) or type(error).__name__)


def _sentence(message: str) -> str:
    return " ".join(PREFIX.sub("", message).split())[:200].rstrip(".")


def _converted(source: GrammarSource) -> Any:
    from xgrammar import Grammar

    convert = {"json": Grammar.from_json_schema, "regex": Grammar.from_regex, "grammar": Grammar.from_ebnf}
    grammar = convert[source.kind](source.text)
    if source.kind == "json" and LOOSE in (rules := str(grammar)):
        return Grammar.from_ebnf(rules.replace(LOOSE, STRICT))
    return grammar


def _compiled(grammar: Any, vocabulary: GrammarVocabulary) -> str:
    import xgrammar

    if vocabulary.drops_space:
        grammar = _with_dropped_space(grammar)
    compiler = xgrammar.GrammarCompiler(vocabulary.info(), max_threads=1, cache_enabled=False)
    compiled = compiler.compile_grammar(grammar)
    _try(CompiledGrammar(compiled, vocabulary))
    text = compiled.serialize_json()
    if len(text) > MAX_COMPILED_BYTES:
        raise GrammarError(f"it is too large: {len(text)} bytes when compiled, at most {MAX_COMPILED_BYTES}")
    return text


def _with_dropped_space(grammar: Any) -> Any:
    """The grammar behind a space that decoding drops; one that may start with a space itself needs it there."""
    import xgrammar

    spaces = xgrammar.TokenizerInfo([b" ", b""], stop_token_ids=[1])
    compiled = xgrammar.GrammarCompiler(spaces, max_threads=1, cache_enabled=False).compile_grammar(grammar)
    needed = xgrammar.GrammarMatcher(compiled).accept_string(" ")
    return xgrammar.Grammar.concat(xgrammar.Grammar.from_ebnf(f'root ::= " "{"" if needed else "?"}'), grammar)


def _try(grammar: CompiledGrammar) -> None:
    """Goes a random way through the grammar. Raises GrammarError if that takes long or there is no first token."""
    state, generator = grammar.state(), random.Random(0)
    mask = np.empty_like(grammar.vocabulary.anywhere)
    for count in range(TRIED_TOKENS):
        try:
            state.fill_mask(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            allowed = np.setdiff1d(allowed, grammar.vocabulary.eos_ids)
        except GrammarError as error:
            if count == 0 or "ambiguous" in str(error):
                raise
            return
        if not len(allowed):
            return
        state.accept(int(generator.choice(allowed)))
