"""A process that tries grammars out before this one compiles them.

Some short expressions take hours to compile, or all memory, and nothing can stop the library at it. In a process of its
own it ends when it takes too long, and the next grammar gets another one.
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
from typing import IO

import numpy as np

from engine.grammar_build import GrammarBuilder, convert
from engine.grammar_state import AmbiguousGrammarError, CompiledGrammar, GrammarError
from engine.grammar_vocabulary import GrammarVocabulary
from engine.structured_outputs import GrammarSource

SECONDS = 10  # of processor time, for one grammar
MAX_BYTES = 2 << 30  # of memory, beyond what the process starts with
MAX_COMPILED_BYTES = 64 << 20  # of one grammar
TRIED_TOKENS = 64
CODE = "import sys; from engine.grammar_worker import serve; serve(int(sys.argv[1]))"
# What the library puts before a message, such as "[07:24:53] /project/cpp/regex_converter.cc:83: ".
PREFIX = re.compile(r"\[[\d:]+\] \S+:\d+: (?:Warning: )?")


class GrammarWorker:
    """The process as others see it: started at the first grammar, shared by all compilers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._known: str | None = None  # the vocabulary that it has

    def check(self, vocabulary: GrammarVocabulary, source: GrammarSource) -> None:
        """Raises ValueError, in one sentence, for a grammar that is bad or too costly."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.stop()
            connection = self._connection or self._start()
            try:
                connection.send((vocabulary if vocabulary.key != self._known else None, source))
                self._known = vocabulary.key
                fault = connection.recv()
            except (EOFError, OSError):
                self.stop()
                raise ValueError(f"{source.field} is too large or too ambiguous to compile") from None
            except BaseException:  # an answer may still come, which is not the next grammar's
                self.stop()
                raise
        if fault:
            raise ValueError(f"{source.field} cannot be used: {fault}")

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
            raise RuntimeError("the process that tries grammars out did not start") from error
        return ours


def serve(descriptor: int) -> None:
    """What the process does, until the other end of its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection = Connection(descriptor)
    import xgrammar  # noqa: F401  # before memory is limited

    _limit_memory()
    connection.send("ready")
    with contextlib.suppress(EOFError, OSError), _messages() as messages:
        while True:
            vocabulary, source = connection.recv()
            if vocabulary is not None:
                builder = GrammarBuilder(vocabulary)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # and then the process ends
            fault = _fault(builder, source, messages)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(fault)


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


def _fault(builder: GrammarBuilder, source: GrammarSource, messages: IO[bytes]) -> str | None:
    """What is wrong with a grammar."""
    messages.seek(0)
    messages.truncate()
    try:
        grammar = convert(source)
        messages.seek(0)
        if warning := messages.read().decode(errors="replace"):
            return _sentence(warning)
        _try(builder.build(grammar))
    except Exception as error:  # the library raises several
        return "it takes too much memory" if "bad_alloc" in str(error) else _sentence(str(error) or repr(error))
    return None


def _sentence(message: str) -> str:
    return " ".join(PREFIX.sub("", message).split())[:200].rstrip(".")


def _try(grammar: CompiledGrammar) -> None:
    """Goes a random way through the grammar.

    Raises GrammarError for one that is large, takes long to match or has no first token.
    """
    if grammar.num_bytes > MAX_COMPILED_BYTES:
        raise GrammarError(f"it takes {grammar.num_bytes} bytes when compiled, at most {MAX_COMPILED_BYTES}")
    state, generator, ends = grammar.state(), random.Random(0), grammar.vocabulary.ends
    mask = np.empty_like(ends)
    for _ in range(TRIED_TOKENS):
        try:
            state.fill_mask(mask)
        except GrammarError as error:
            if state.token_ids and not isinstance(error, AmbiguousGrammarError):
                return  # a dead end that a model may keep clear of
            raise
        allowed = np.flatnonzero(np.unpackbits((mask & ~ends).view(np.uint8), bitorder="little"))
        if not len(allowed):
            return
        state.accept(int(generator.choice(allowed)))
