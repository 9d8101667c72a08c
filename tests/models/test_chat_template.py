from __future__ import annotations

import json
import os
import re
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from models import ConfigError
from models.chat.template import _renderer, read_chat_template, render_chat
from models.tokenizer import Tokenizer
from tests.models.tokenizer_folders import gpt2_json

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "안녕 <b>\"you\"</b> & 'me'\n"},
    {"role": "assistant", "content": "  Hello 😀 "},
    {"role": "user", "content": "bye"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama": "{{ eos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0].content %}{% else %}{% set loop_messages = messages %}{% endif %}\n"
    "{% for m in loop_messages %}\n    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}\n"
    "{{ raise_exception('roles must alternate') }}\n    {% endif %}\n  [INST] {{ m.content | trim }} [/INST]\n"
    "{% endfor %}",
    "json": "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ messages | map(attribute='role') | join(',') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }} {{ '%05d' % ns.n }} {{ pad_token is defined }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "methods": "{{ messages[0].content.split(' ')[0].upper() }}{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}"
    "{{ dict(a=1).items() | list }}{{ range(3) | list }}{{ 'a' * 3 }}{{ enable_thinking | default('unset') }}",
}


def tokenizer_with(template: object, folder: Path) -> Tokenizer:
    gpt2_json(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_as_transformers_does(name: str, tmp_path: Path) -> None:
    ours = tokenizer_with(TEMPLATES[name], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tmp_path)
    for add in (True, False):
        for variables in ({}, {"enable_thinking": False, "tools": [{"type": "function", "name": "f"}]}):
            options: dict[str, Any] = {"add_generation_prompt": add, **variables}
            assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(
                CHAT, tokenize=False, **options
            )


def test_templates_are_found_where_folders_keep_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_with([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == "d"
    assert tokenizer.apply_chat_template(CHAT, tools=[]) == "t"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert read_chat_template(tmp_path, {"chat_template": "config"}) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja 안녕")
    assert read_chat_template(tmp_path, {"chat_template": "config"}) == "jinja 안녕"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        read_chat_template(tmp_path, {})


HOSTILE = {
    "a long loop": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a long string": "{{ ('a' * 10**9) | length }}",
    "much output": "{{ 'a' * 10**7 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "center": "{{ 'a' | center(10**9) | length }}",
    "ljust": "{{ 'a'.ljust(10**10) | length }}",
    "format": "{{ '{:>1000000000}'.format(1) | length }}",
    "percent": "{{ ('%1000000000d' % 1) | length }}",
    "a long list": "{{ ([0] * 10**9) | length }}",
    "batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "indent": "{{ ('a\\n' * 10**5) | indent(10**6) | length }}",
    "a large number": "{{ (10 ** (10 ** 9)) | length }}",
    "powers": "{{ (2 ** 100000000) ** 3 }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') | length }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'a' * 10**6) | length }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format attributes": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a function's globals": "{{ raise_exception.__globals__.keys() }}",
    "changing messages": "{{ messages.append(1) }}",
    "text generator": "{{ lipsum(10**6) }}",
    "other files": "{% include '/etc/passwd' %}",
    "a syntax error": "{% for %}",
    "deep nesting": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "surrogates": "{{ '\\ud800' }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_soon_in_one_sentence(name: str) -> None:
    threads = threading.active_count()
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="the chat template") as caught:
        render_chat(HOSTILE[name], CHAT, {})
    assert time.perf_counter() - start < 8  # of a second of processor time, on a busy machine
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert threading.active_count() == threads
    assert render_chat("{{ messages | length }}", CHAT, {}) == "4"


def test_what_the_template_says_is_wrong_is_the_error() -> None:
    with pytest.raises(ConfigError, match="the chat template fails: roles must alternate"):
        render_chat("{{ raise_exception('roles\nmust alternate') }}", CHAT, {})


def test_the_date_is_todays() -> None:
    assert re.fullmatch(r"\d{2} \w{3} \d{4}", render_chat("{{ strftime_now('%d %b %Y') }}", CHAT, {}))


def test_a_renderer_that_died_is_replaced() -> None:
    render_chat("a", CHAT, {})
    worker = _renderer._worker
    assert worker is not None
    worker.kill()
    worker.wait()
    assert render_chat("b", CHAT, {}) == "b"


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    render_chat("a", CHAT, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if render_chat("b", CHAT, {}) == "b" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_chat("c", CHAT, {}) == "c"


def test_chats_of_several_threads_do_not_mix() -> None:
    found: dict[int, str] = {}

    def work(index: int) -> None:
        for _ in range(20):
            found[index] = render_chat("{{ n }}" + "x" * 1000, CHAT, {"n": index})[:1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == {index: str(index) for index in range(5)}


@pytest.mark.parametrize(("messages", "sentence"), [
    ([], "at least one"), ("hello", "messages are a list"), (["hello"], "message 0 is no dictionary"),
    ([{"role": "user"}], "message 0 has no content"), ([{"content": "a"}], "message 0 has no role"),
    ([*CHAT, {"role": "user", "content": 3}], "message 4 has no content"),
])  # fmt: skip
def test_what_are_no_messages_is_a_sentence(messages: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        render_chat("a", messages, {})


def test_variables_are_json() -> None:
    with pytest.raises(ValueError, match="JSON values"):
        render_chat("a", CHAT, {"f": print})


def test_a_tokenizer_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer_with(None, tmp_path).apply_chat_template(CHAT)
    with pytest.raises(ConfigError, match="called default, only other"):
        tokenizer_with([{"name": "other", "template": ""}], tmp_path).apply_chat_template(CHAT)


class InterruptedPipe:
    """A pipe on which someone presses Ctrl-C while its answer is awaited."""

    def readline(self) -> str:
        raise KeyboardInterrupt

    def close(self) -> None:
        pass


def test_an_interrupt_does_not_leave_an_answer_to_the_next_conversation() -> None:
    plain = "{{ messages[0]['content'] }}"
    assert render_chat(plain, [{"role": "user", "content": "first"}], {}) == "first"
    assert _renderer._worker is not None
    pipe, _renderer._worker.stdout = _renderer._worker.stdout, InterruptedPipe()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        render_chat(plain, [{"role": "user", "content": "second"}], {})
    assert pipe is not None
    pipe.close()
    assert render_chat(plain, [{"role": "user", "content": "third"}], {}) == "third"
