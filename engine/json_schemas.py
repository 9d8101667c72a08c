"""Which JSON schemas a grammar can hold a text to.

The grammar's library leaves out without a word what it cannot express, and a text that breaks the schema then passes.
Such a schema is refused instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

UNSUPPORTED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "additionalItems", "$anchor", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy",
)  # fmt: skip
# A schema has one of these and nothing else to say about the text, but for a type beside const and enum.
ALONE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
LENGTHS = ("minLength", "maxLength")
# From these the library concludes the type.
TELLING = ("properties", "additionalProperties", "items", "prefixItems")
ASSERTIONS = (
    *TELLING, *LENGTHS, "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "required", "minProperties", "maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties",
    "minItems", "maxItems", "unevaluatedItems", "uniqueItems",
)  # fmt: skip
SCHEMA = ("additionalProperties", "unevaluatedProperties", "items", "unevaluatedItems")
SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "object": (dict,), "array": (list,),
}  # fmt: skip
CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]", re.DOTALL)
# Characters that a JSON string only has escaped: the library writes them as they are.
UNSAFE = re.compile(r'"|[\0-\x1f]|\\["\\nrtfvb0xuc]')


def check_schema(schema: dict[str, Any]) -> list[str]:
    """Every regular expression in a schema. Raises ValueError for a schema that a grammar cannot hold a text to."""
    patterns = []
    for part in _parts(schema):
        _check_keywords(part)
        _check_object(part)
        _check_reference(part, schema)
        patterns += _patterns(part)
    for pattern in patterns:
        if UNSAFE.search(CLASS.sub("", pattern)):
            raise ValueError(f"json has the pattern {pattern!r:.80}: quotes, backslashes and escapes are not supported")
    return patterns


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and those in it."""
    yield schema
    inner: list[Any] = [schema.get(key) for key in SCHEMA]
    inner += [item for key in SCHEMAS if isinstance(items := schema.get(key), list | tuple) for item in items]
    inner += [item for key in NAMED_SCHEMAS if isinstance(named := schema.get(key), dict) for item in named.values()]
    if isinstance(names := schema.get("propertyNames"), dict):
        inner.append({"type": "string", **names})
    for part in inner:
        if isinstance(part, dict):
            yield from _parts(part)


def _check_keywords(schema: dict[str, Any]) -> None:
    for key in UNSUPPORTED:
        if key in schema:
            raise ValueError(f"json has the keyword {key}, which is not supported")
    if schema.get("uniqueItems"):
        raise ValueError("json has the keyword uniqueItems, which is not supported")
    alone = [key for key in ALONE if key in schema]
    others = [key for key in ASSERTIONS if key in schema]
    if alone and (alone[1:] or others):
        raise ValueError(f"json has {alone[0]} and {[*alone[1:], *others][0]} in one schema, which is not supported")
    if alone and "type" in schema:
        _check_type_beside(alone[0], schema)
    if others and "type" not in schema and not any(key in schema for key in TELLING):
        raise ValueError(f"json has {others[0]} without a type beside it, which is not supported")
    texts = [key for key in ("pattern", "format", *LENGTHS) if key in schema]
    if len(texts) > 1 and set(texts) != set(LENGTHS):
        raise ValueError(f"json has {texts[0]} and {texts[1]} in one schema, which is not supported")


def _check_type_beside(key: str, schema: dict[str, Any]) -> None:
    """Beside const and enum a type is right where it says nothing new."""
    values = [schema["const"]] if key == "const" else schema["enum"] if key == "enum" else None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not isinstance(values, list) or not all(any(_is(value, name) for name in types) for value in values):
        raise ValueError(f"json has {key} and another type in one schema, which is not supported")


def _is(value: object, name: object) -> bool:
    return isinstance(value, TYPES.get(str(name), ())) and (name == "boolean" or not isinstance(value, bool))


def _check_object(schema: dict[str, Any]) -> None:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if isinstance(required, list) and isinstance(properties, dict):
        if not all(isinstance(name, str) for name in required):
            raise ValueError(f"json requires names that are strings, got {json.dumps(required)[:80]}")
        unknown = [name for name in required if name not in properties]
        if unknown:
            raise ValueError(f"json requires {json.dumps(unknown[0])[:80]}, which is not among the properties")
    naming = [key for key in ("properties", "patternProperties", "propertyNames") if key in schema]
    if len(naming) > 1:
        raise ValueError(f"json has {naming[0]} and {naming[1]} in one schema, which is not supported")


def _check_reference(schema: dict[str, Any], root: dict[str, Any]) -> None:
    """That no way along references comes back to where it was, which describes no text."""
    seen: list[dict[str, Any]] = []
    while "$ref" in schema:
        if any(schema is other for other in seen):
            raise ValueError(f"json has the reference {schema['$ref']!r:.80}, which leads back to itself")
        seen.append(schema)
        schema = _target(schema["$ref"], root)


def _target(reference: object, root: dict[str, Any]) -> dict[str, Any]:
    """What a reference such as "#/$defs/item" names; nothing where the library will say what is wrong with it."""
    target: Any = root
    for key in str(reference).removeprefix("#").split("/")[1:]:
        target = target.get(key) if isinstance(target, dict) else None
    return target if isinstance(target, dict) else {}


def _patterns(schema: dict[str, Any]) -> list[str]:
    named = schema.get("patternProperties")
    found = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    return [pattern for pattern in found if isinstance(pattern, str)]
