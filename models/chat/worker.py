"""Renders chat templates in a process of its own: JSON lines in, JSON lines out.

A template comes with a model and may hold any program; Jinja's sandbox keeps it from reaching out, the limits here
from never ending or taking all memory. A process is the one thing that can be stopped wherever it is. It is run as a
file, not as a module, so that it imports nothing but Jinja.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0  # of processor time for one rendering
MEMORY = 512 << 20  # bytes of address space
LONGEST = 4_000_000  # characters of a rendered chat


class Generation(Extension):
    """{% generation %} marks what an assistant wrote, for training; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def to_json(
    value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """As transformers compiles chat templates, without Jinja's text generator."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    del environment.globals["lipsum"]
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any]) -> dict[str, str]:
    """The text, or in one sentence why there is none."""
    try:
        text = compiled(source).render(variables)
        text.encode()
    except MemoryError:
        return {"error": "needs too much memory"}
    except RecursionError:
        return {"error": "calls itself too deep"}
    except UnicodeEncodeError:
        return {"error": "gives half a character"}
    except Exception as error:  # of any kind: the template is a program
        return {"error": f"fails: {' '.join(str(error).split())[:500] or type(error).__name__}"}
    if len(text) > LONGEST:
        return {"error": f"gives more than {LONGEST} characters"}
    return {"text": text}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Left to its default, the signal ends the process wherever it is, inside one long C call too.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = json.dumps(render(request["template"], request["variables"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
