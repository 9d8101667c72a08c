"""Chat templates: where a folder keeps its own, and how messages become the prompt it describes."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ConfigError

WORKER = Path(__file__).with_name("worker.py")


def read_chat_template(folder: Path, values: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a folder, or several by name: a file of its own goes before tokenizer_config.json's entry.

    Raises ConfigError for one that is no template.
    """
    jinja, older = folder / "chat_template.jinja", folder / "chat_template.json"
    try:
        if jinja.exists():
            return jinja.read_text(encoding="utf-8")
        template = json.loads(older.read_text(encoding="utf-8")) if older.exists() else values
        template = template.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"cannot read the chat template of {folder}: {error}") from None
    texts = template.values() if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"the chat template of {folder} is no text")
    return template


def render_chat(template: str | dict[str, str] | None, messages: object, variables: dict[str, object]) -> str:
    """The prompt for the messages. Raises ConfigError for the template's faults, ValueError for the messages'."""
    check_messages(messages)
    # As transformers has it, a template finds no tools and documents rather than undefined ones.
    known = {"tools": None, "documents": None, **variables, "messages": messages}
    try:
        request = json.dumps({"template": _choose(template, variables), "variables": known})
    except (TypeError, RecursionError) as error:
        raise ValueError(f"messages and a chat template's variables are JSON values: {error}") from None
    return _renderer.render(request)


def check_messages(messages: object) -> None:
    """Raises ValueError unless these are the messages of a chat: at least one, each with a role and a content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages are a list of at least one, each with a role and a content")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is no dictionary: each has a role and a content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"message {index} has no {key}: each is a dictionary with a role and a content, texts")


def _choose(template: str | dict[str, str] | None, variables: Mapping[str, object]) -> str:
    if template is None:
        raise ConfigError("this model has no chat template: give it a prompt instead of messages")
    if isinstance(template, str):
        return template
    name = "tool_use" if variables.get("tools") is not None and "tool_use" in template else "default"
    if name not in template:
        raise ConfigError(f"this model has no chat template called default, only {', '.join(template)}")
    return template[name]


class _Renderer:
    """Hands templates to a process that renders them, started with the first and anew after one that had to end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def render(self, request: str) -> str:
        """The text for a line of JSON. Raises ConfigError, in one sentence, where there is none."""
        with self._lock:
            answer = self._ask(request)
            if not answer:
                self.close()
        if not answer:
            raise ConfigError("the chat template takes longer than a second, or ends the process that renders it")
        found = json.loads(answer)
        if "error" in found:
            raise ConfigError(f"the chat template {found['error']}")
        return str(found["text"])

    def _ask(self, request: str) -> str:
        """The worker's answer; empty where it ended instead."""
        worker = self._running()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
            return worker.stdout.readline()
        except BrokenPipeError:
            return ""
        except BaseException:  # an interrupt: the answer to come would be taken for the next request's
            self.close()
            raise

    def _running(self) -> subprocess.Popen[str]:
        if self._worker is not None and self._worker.poll() is not None:
            self.close()
        if self._worker is None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)], env=environment, text=True, encoding="utf-8",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        return self._worker

    def close(self) -> None:
        """Ends the worker, if there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            _close_pipes(worker)

    def forget(self) -> None:
        """Leaves the worker to the process that started it: one forked from it must not share the pipes."""
        worker, self._worker, self._lock = self._worker, None, threading.Lock()
        if worker is not None:
            worker.returncode = 0  # of no concern here
            _close_pipes(worker)


def _close_pipes(worker: subprocess.Popen[str]) -> None:
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # what the worker did not read any more
                pipe.close()


_renderer = _Renderer()
atexit.register(_renderer.close)
os.register_at_fork(after_in_child=_renderer.forget)
