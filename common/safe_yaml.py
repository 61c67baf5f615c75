"""YAML in, plain dicts, lists and scalars out: no tags, no Python objects, no alias bombs, no duplicate keys.

Scalars follow the YAML 1.2 core schema, so ``1e-5`` is a float, ``off`` and ``no`` are words and ``1:30`` is not a
number (PyYAML's own rules are those of YAML 1.1). `parse` keeps the line of every key for error messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 20_000

Path_ = tuple[str, ...]  # where a value stands: ("sampler", "num_steps")


class YamlError(ValueError):
    """A text that is not YAML, or not the plain subset read here. The message starts with the line where known."""


@dataclass(frozen=True)
class Document:
    """What a text says: ``value``, and for every mapping key the line it stands on (1 is the first)."""

    value: Any
    lines: dict[Path_, int] = field(default_factory=dict)


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2 core and nothing else (no timestamps, no merge key)."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  PyYAML's own class attribute, replaced and not shared


_CORE_TYPES = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
for _name, (_pattern, _first) in _CORE_TYPES.items():
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def parse(text: str) -> Document:
    """Read one YAML document. Raises YamlError on a syntax error or anything beyond the plain subset."""
    if len(text.encode()) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES} bytes")
    try:
        _check_depth(text)
        loader = _CoreLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YamlError(f"line {line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise YamlError(str(error).replace("\n", " ")) from error
    if node is None:
        return Document(None)
    reader = _Reader()
    return Document(reader.read(node, ()), reader.lines)


def _check_depth(text: str) -> None:
    """The composer recurses, the event stream does not: refuse deep nesting before composing."""
    depth = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise YamlError(
                f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels"
            )


class _Reader:
    """Turns composed nodes into values; every alias is walked again, so the node budget also stops alias bombs."""

    def __init__(self) -> None:
        self.lines: dict[Path_, int] = {}
        self.nodes = 0

    def read(self, node: yaml.Node, path: Path_) -> Any:
        line = node.start_mark.line + 1
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise YamlError(
                f"line {line}: too many or too deeply nested values (an alias that repeats itself?)"
            )
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [
                self.read(child, (*path, str(i))) for i, child in enumerate(node.value)
            ]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            try:
                return _SCALARS[kind](node.value)
            except ValueError as error:
                raise YamlError(
                    f"line {line}: {node.value!r} is not a valid {kind}"
                ) from error
        raise YamlError(
            f"line {line}: the tag {node.tag!r} is not allowed, only plain values are"
        )

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(f"line {line}: a key must be a word")
            key = key_node.value
            if key in result:
                raise YamlError(f"line {line}: the key {key!r} is given twice")
            self.lines[(*path, key)] = line
            result[key] = self.read(value_node, (*path, key))
        return result


def _number(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    bare = text.lstrip("+-").lower()
    return sign * float(bare[1:] if bare in (".inf", ".nan") else bare.replace("_", ""))


_SCALARS = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: (
        int(text, 16) if text.startswith("0x") else int(text.replace("_", ""))
    ),
    "float": _number,
    "str": str,
}
