"""Chat templates: where a folder keeps its own, and how messages become the prompt it describes."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ConfigError

WORKER = Path(__file__).with_name("chat_worker.py")


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
    try:
        json.dumps(variables)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a chat template's variables are JSON values: {error}") from None
    # As transformers has it, a template finds no tools and documents rather than undefined ones.
    known = {"tools": None, "documents": None, **variables, "messages": messages}
    return _renderer.render(_choose(template, variables), known)


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
        self._owner = 0  # the process that started the worker: a fork of it must not share the pipes

    def render(self, template: str, variables: dict[str, object]) -> str:
        request = json.dumps({"template": template, "variables": variables})
        with self._lock:
            answer = self._ask(request)
        if not answer:
            self.close()
            raise ConfigError("the chat template takes longer than a second or ends its process")
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

    def _running(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None or self._owner != os.getpid():
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._worker, self._owner = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)], env=environment, text=True, encoding="utf-8",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ), os.getpid()  # fmt: skip
        return self._worker

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None or self._owner != os.getpid():
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()


_renderer = _Renderer()
atexit.register(_renderer.close)
