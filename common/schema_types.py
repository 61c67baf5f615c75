"""What a config schema's annotations mean: which keys a section has, and which plain value fits which type."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

Recurse = Callable[
    [Any, Any, str], Any
]  # (annotation, value, key) -> converted, for what is inside a container
DROP: Any = object()  # stands for a value whose mistake has been reported


class Unfit(Exception):  # noqa: N818  not an error of the program, always turned into a line for the user
    """A value does not fit: ``expected`` says what would, ``hint`` may say how to write it."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.expected, self.hint = expected, hint


@functools.cache
def fields(section: type) -> dict[str, Any]:
    """name -> resolved annotation of every init field of a dataclass."""
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section) if f.init}


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def section_of(annotation: Any) -> type | None:
    """The dataclass an annotation allows (``Sampler`` or ``Sampler | None``), or None."""
    return next((m for m in members(annotation) if dataclasses.is_dataclass(m)), None)


def entry_of(annotation: Any) -> type | None:
    """The dataclass of a mapping's entries (``dict[str, Reward]``), or None."""
    entries = [
        typing.get_args(m)[1]
        for m in members(annotation)
        if typing.get_origin(m) is dict
    ]
    return next((entry for entry in entries if dataclasses.is_dataclass(entry)), None)


def is_text(annotation: Any) -> bool:
    """True where every value but None is a text: str, Literal["a", "b"], str | None."""
    kinds = [m for m in members(annotation) if m is not type(None)]
    return bool(kinds) and all(
        m is str or (_choices(m) and all(isinstance(c, str) for c in _choices(m)))
        for m in kinds
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    )


def at(schema: type, where: tuple[str, ...]) -> Any:
    """The annotation a dotted path leads to, None when it leads nowhere."""
    annotation: Any = schema
    for part in where:
        section = section_of(annotation)
        mapping = next(
            (m for m in members(annotation) if typing.get_origin(m) is dict), None
        )
        if section is not None and part in fields(section):
            annotation = fields(section)[part]
        elif mapping is not None:
            annotation = typing.get_args(mapping)[1]
        else:
            return None
    return annotation


def dotted_paths(schema: type, prefix: str = "") -> list[str]:
    """Every key of a schema as a dotted path; the free names of a mapping are written <name>."""
    paths = []
    for name, annotation in fields(schema).items():
        path = prefix + name
        paths.append(path)
        for member in members(annotation):
            args = typing.get_args(member)
            if dataclasses.is_dataclass(member):
                paths += dotted_paths(member, path + ".")
            elif typing.get_origin(member) is dict and dataclasses.is_dataclass(
                args[1]
            ):
                paths += dotted_paths(args[1], f"{path}.<name>.")
    return paths


def describe(annotation: Any) -> str:
    """An annotation in words for people who do not write Python."""
    if len(members(annotation)) > 1:
        return " or ".join(describe(m) for m in members(annotation))
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        inside = args[:-1] if args[-1] is Ellipsis else args
        return (
            f"a list of {'' if args[-1] is Ellipsis else f'{len(args)}: '}"
            + ", ".join(describe(a) for a in inside)
        )
    if origin is dict or annotation is dict:
        return "a mapping"
    if dataclasses.is_dataclass(annotation):
        return f"a section with the keys {', '.join(fields(annotation))}"
    return {type(None): "null", bool: "true or false", Any: "anything"}.get(
        annotation, getattr(annotation, "__name__", "")
    )


def convert(annotation: Any, value: Any, recurse: Recurse) -> Any:
    """The value as the annotation wants it (lists become tuples, an int becomes a float).

    Raises Unfit when it does not fit, TypeError when the annotation is none that a schema may use.
    """
    for member in members(annotation):
        try:
            return _convert_one(member, value, recurse)
        except Unfit as error:
            if len(members(annotation)) == 1:
                raise
            unfit = error
    raise Unfit(describe(annotation), unfit.hint)


def _convert_one(annotation: Any, value: Any, recurse: Recurse) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if annotation in (int, float, bool, str, type(None)):
        return _scalar(annotation, value)
    if origin is Literal:
        # True == 1 in Python, so compare the types too
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        close = [c for c in args if str(c).lower() == str(value).lower()]
        raise Unfit(
            describe(annotation), f"; write it as {close[0]!r}" if close else ""
        )
    if origin is tuple:
        return _tuple(annotation, args, value, recurse)
    if origin is dict and args[0] is str:
        if not isinstance(value, dict):
            raise Unfit(describe(annotation))
        items = {
            str(key): recurse(args[1], item, str(key)) for key, item in value.items()
        }
        return {key: item for key, item in items.items() if item is not DROP}
    if dataclasses.is_dataclass(annotation):
        raise Unfit(describe(annotation))
    raise TypeError(f"a config schema cannot use the annotation {annotation!r}")


def _scalar(kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind and not (kind is float and math.isnan(value)):
        return value
    hint = "; quote it" if kind is str and isinstance(value, int | float) else ""
    raise Unfit(describe(kind), hint)


def _tuple(
    annotation: Any, args: tuple[Any, ...], value: Any, recurse: Recurse
) -> tuple[Any, ...]:
    open_ended = args[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (
        open_ended or len(value) == len(args)
    ):
        raise Unfit(describe(annotation))
    kinds = [args[0]] * len(value) if open_ended else args
    items = [
        recurse(kind, item, str(i))
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]
    return DROP if any(item is DROP for item in items) else tuple(items)
