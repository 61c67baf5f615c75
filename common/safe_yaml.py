"""Read YAML as plain dicts, lists and scalars, with the line of every key.

Scalars follow the YAML 1.2 core schema: ``1e-5`` is a float, ``off`` and ``no`` are words
and ``1:30`` is not a number (PyYAML's own rules are those of YAML 1.1). Tags, Python
objects and keys that are given twice are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000

KeyPath = tuple[str, ...]


class YamlError(ValueError):
    """A text that is not YAML, or not plain. The message starts with the line."""


@dataclass(frozen=True)
class Document:
    """The value of a YAML text, and the line of every mapping key, counted from 1."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the implicit types of YAML 1.2 core and no others."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_INT = r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Type -> pattern and the characters that a match can start with. The order matters.
_CORE_TYPES = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+0123456789.")),
}
for _name, (_pattern, _first) in _CORE_TYPES.items():
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def parse(text: str) -> Document:
    """Read one YAML document.

    Raises YamlError for a syntax error, a tag, a repeated key, and more than `MAX_BYTES`
    bytes or `MAX_VALUES` values.
    """
    if len(text.encode()) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES} bytes")
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        if node is None:
            return Document(None)
        reader = _NodeReader()
        return Document(reader.read(node, ()), reader.lines)
    except RecursionError as error:
        raise YamlError("nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YamlError(f"line {line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise YamlError(str(error).replace("\n", " ")) from error


class _NodeReader:
    """Turns composed nodes into values and remembers the line of every key."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.values_read = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1

        # An alias is read again wherever it stands, so this also stops alias bombs.
        self.values_read += 1
        if self.values_read > MAX_VALUES:
            raise YamlError(f"line {line}: more than {MAX_VALUES} values")

        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            children = enumerate(node.value)
            return [self.read(child, (*path, str(index))) for index, child in children]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return _SCALARS[kind](node.value)
        raise YamlError(f"line {line}: the tag {node.tag!r} is not allowed")

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
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


def _read_int(text: str) -> int:
    return int(text, 16) if text.startswith("0x") else int(text.replace("_", ""))


def _read_float(text: str) -> float:
    # Python writes .inf and .nan without the dot.
    return float(re.sub(r"\.(?=[inIN])", "", text.replace("_", "")))


# Explicit tags such as !!int on a text end in the same functions and may not fit.
_SCALARS = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _read_int,
    "float": _read_float,
    "str": str,
}
