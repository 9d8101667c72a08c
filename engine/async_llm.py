"""``AsyncLLM``: an engine for servers, whose steps run in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from engine.intake import AnyParams
from engine.llm import LLM
from engine.metrics import EngineMetrics
from engine.outputs import output_of
from engine.prompts import Prompt
from engine.request import Request, RequestOutput
from engine.sampling import check_priority


class EngineDeadError(RuntimeError):
    """The engine's thread has ended with an error, its cause, or was shut down."""


class _Mailbox:
    """The newest output of a request, from the engine's thread to one coroutine; what is not fetched is replaced."""

    def __init__(self) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()
        self._content: RequestOutput | Exception | None = None

    def put(self, content: RequestOutput | Exception) -> None:
        """May be called from any thread. Nothing replaces an error."""
        with self._lock:
            if isinstance(self._content, Exception):
                return
            self._content = content
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> RequestOutput:
        while (content := self._take()) is None:
            self._arrived.clear()  # what is put from now on sets it again, later in this loop
            await self._arrived.wait()
        if isinstance(content, Exception):
            raise content
        return content

    def _take(self) -> RequestOutput | Exception | None:
        with self._lock:
            content, self._content = self._content, None
            return content


class AsyncLLM:
    """Serves any number of coroutines with one engine, whose requests run together.

    What coroutines ask for lies in an inbox until the engine's thread has finished its step, so none of them ever waits
    for the engine's lock.

    Args:
        model: what ``LLM`` takes, or an ``LLM``, which goes on working beside it.
        options: those of ``LLM``.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._mailboxes: dict[str, _Mailbox] = {}
        self._inbox: deque[Callable[[], None]] = deque()  # what to do between two steps
        self._added: dict[Request, None] = {}  # those that may be running
        self._work = threading.Condition()
        self._stopped: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: AnyParams = None, request_id: str | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Yields the output so far, whenever there is more of it, until it is finished.

        ``params`` may ask for samples or for a beam search, which shows what is settled of it. Closing the iterator, or
        cancelling who waits for it, aborts the request. Raises ValueError for a bad prompt or parameter, and
        EngineDeadError when the engine has stopped.
        """
        self.check_health()
        request = await asyncio.to_thread(self._request, prompt, params, request_id, priority)
        mailbox = _Mailbox()
        request.on_change = partial(self._tell, mailbox)
        self._post(request, mailbox)
        finished = False
        try:
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield output
        finally:
            self._mailboxes.pop(request.request_id, None)
            if not finished:
                self._send(partial(self.llm.engine.abort, request))

    async def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds; who iterates over it gets what there is, as aborted."""
        self._send(partial(self.llm.abort, request_id))

    def get_metrics(self) -> EngineMetrics:
        """As ``LLM.get_metrics``; it does not wait for a step to end."""
        return self.llm.get_metrics()

    def check_health(self) -> None:
        """Raises EngineDeadError when no request can be served any more."""
        if self._stopped is not None:
            raise self._stopped

    def shutdown(self) -> None:
        """Ends the engine's thread after its step; whoever waits gets EngineDeadError."""
        self._stop(EngineDeadError("the engine was shut down"))
        self._thread.join()

    def _tell(self, mailbox: _Mailbox, request: Request) -> None:
        mailbox.put(output_of(request, self.llm.tokenizer))
        if request.finished:
            self._added.pop(request, None)

    def _request(self, prompt: Prompt, params: AnyParams, request_id: str | None, priority: int) -> Request:
        request = self.llm.intake.request(prompt, params, request_id=request_id)
        request.priority = check_priority(priority)
        self.llm.engine.scheduler.check(request)
        return request

    def _post(self, request: Request, mailbox: _Mailbox) -> None:
        if request.request_id in self._mailboxes:
            raise ValueError(f"a request {request.request_id!r} is in progress already")
        self._mailboxes[request.request_id] = mailbox
        self._send(partial(self._add, request))
        if self._stopped is not None:  # meanwhile
            mailbox.put(self._stopped)

    def _send(self, action: Callable[[], None]) -> None:
        with self._work:
            self._inbox.append(action)
            self._work.notify()

    def _serve(self) -> None:
        try:
            while self._stopped is None:
                with self._work:
                    self._work.wait_for(self._has_work)
                self._read_inbox()
                with self.llm.lock:
                    self.llm.engine.step()
        except BaseException as error:
            dead = EngineDeadError(f"the engine has stopped: {type(error).__name__}: {error}")
            dead.__cause__ = error
            self._stop(dead)
        finally:
            self._abort_all()

    def _has_work(self) -> bool:
        return bool(self._inbox) or self._stopped is not None or self.llm.engine.has_unfinished_requests()

    def _read_inbox(self) -> None:
        while self._inbox and self._stopped is None:
            action = self._inbox.popleft()
            with self.llm.lock:
                action()

    def _add(self, request: Request) -> None:
        mailbox = self._mailboxes.get(request.request_id)
        if mailbox is None:  # nobody waits for it any more
            return
        try:
            self.llm.engine.add_request(request)
        except ValueError as error:  # its id is in use by another caller of the same LLM
            mailbox.put(error)
        else:
            self._added[request] = None

    def _stop(self, error: EngineDeadError) -> None:
        """May be called from any thread; the engine's own sees to the requests when it has ended its step."""
        with self._work:
            self._stopped = self._stopped or error
            self._work.notify()
        for mailbox in list(self._mailboxes.values()):
            mailbox.put(self._stopped)

    def _abort_all(self) -> None:
        with self.llm.lock:
            for request in list(self._added):
                self.llm.engine.abort(request)
