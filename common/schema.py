"""The schema of a run: frozen pydantic dataclasses, and what a dotted path means in them.

Limits stand in the type (``steps: PositiveInt``), checks that compare fields in
``__post_init__``. Nothing here imports torch: a typo must show in under two seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from common.files import read_json

# pydantic's limits, which schemas take from here
__all__ = [
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
]

T = TypeVar("T")
Where = tuple[str, ...]

# Limits that several schemas share.
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmptyText = Annotated[str, Field(min_length=1)]

_NO_UNKNOWN_KEYS = ConfigDict(extra="forbid")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Make a class a section of a config: a frozen pydantic dataclass without unknown keys.

    Constructing it raises pydantic's ValidationError, a ValueError, with every mistake.
    """
    return dataclass(cls, frozen=True, config=_NO_UNKNOWN_KEYS)


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(field,)
)
def run_config(cls: type[T]) -> type[T]:
    """Make a class the schema of a run: as `config`, with keyword arguments only."""
    return dataclass(cls, frozen=True, kw_only=True, config=_NO_UNKNOWN_KEYS)


def read_section(section: type[T], path: str | Path) -> T:
    """Read a section that was saved as JSON. ValueError, naming the file, if it is not valid."""
    try:
        return section(**read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Return the annotation of every field of a section, without its limits."""
    return typing.get_type_hints(section)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def section_of(annotation: Any) -> type | None:
    """Return the section that an annotation allows (``Sampler | None``), or None."""
    for member in members(annotation):
        if dataclasses.is_dataclass(member):
            return member
    return None


def _mapping_of(annotation: Any) -> Any:
    """Return the type of a mapping's values, or None for what is no mapping."""
    for member in members(annotation):
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
    return None


def entry_of(annotation: Any) -> type | None:
    """Return the section that a mapping holds (``dict[str, Reward]``), or None."""
    return section_of(_mapping_of(annotation))


def is_text(annotation: Any) -> bool:
    """Say whether every value but None is a text: str, Literal["a", "b"], str | None."""
    kinds = [member for member in members(annotation) if member is not type(None)]
    for kind in kinds:
        is_choice_of_texts = typing.get_origin(kind) is Literal and all(
            isinstance(choice, str) for choice in typing.get_args(kind)
        )
        if kind is not str and not is_choice_of_texts:
            return False
    return bool(kinds)


def annotation_at(schema: type, where: Where) -> Any:
    """Return the annotation at a path of keys, None where the path leads nowhere."""
    annotation: Any = schema
    for key in where:
        section = section_of(annotation)
        if section is not None and key in field_types(section):
            annotation = field_types(section)[key]
        else:
            annotation = _mapping_of(annotation)
        if annotation is None:
            return None
    return annotation


def dotted_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every key of a schema as a dotted path; a mapping's names are <name>."""
    for name, annotation in field_types(schema).items():
        yield prefix + name
        if section := section_of(annotation):
            yield from dotted_paths(section, f"{prefix}{name}.")
        if entry := entry_of(annotation):
            yield from dotted_paths(entry, f"{prefix}{name}.<name>.")
