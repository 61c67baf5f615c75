"""A run is one yaml, its schema is nested frozen dataclasses, and a typo is an error with a suggestion.

OmegaConf merges defaults <- yaml, one or several <- ``a.b=c``; what comes out is plain frozen dataclasses and
OmegaConf is gone.
Everything that is wrong is reported at once: unknown keys, wrong types, bad choices, malformed overrides, and the
ValueErrors of every section's ``__post_init__``. Nothing here imports torch, so that an error shows in well under 2 s.

A schema may use int, float, bool, str, Any, ``X | None`` and other unions, Literal, tuple[X, ...], tuple[X, Y],
dict[str, X] and further dataclasses. Lists in yaml become tuples.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import safe_yaml, schema_types
from common.run_record import dump

__all__ = [
    "CommandLine",
    "ConfigError",
    "WandbConfig",
    "dump",
    "load",
    "parse_command_line",
]

C = TypeVar("C")
Where = tuple[str, ...]


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases beside metrics.jsonl. ``offline`` writes into the run folder and needs no network."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "video-alignment"
    name: str | None = None


class ConfigError(ValueError):
    """Everything that is wrong with a config; ``errors`` holds one line per mistake."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True)
class CommandLine(Generic[C]):
    """What `parse_command_line` found: the config, ``resume`` (auto, none or a path), the arguments as typed, and what
    ``--dry-run`` asks for, None without it.
    """

    cfg: C
    resume: str
    config_paths: tuple[Path, ...]
    overrides: tuple[str, ...]
    args: argparse.Namespace
    dry_run: str | None = None


def load(
    schema: type[C],
    yaml: str | Path | Sequence[str | Path] | None,
    overrides: Sequence[str] = (),
) -> C:
    """Read a config: defaults <- the yaml, or several in order (None for none) <- overrides ``a.b=c`` in order.

    The value of an override is read as yaml, or taken as it stands where the schema wants text; empty is the empty
    text. A section in a mapping of sections (``rewards.NAME``) that is null is taken out of it. Raises ConfigError with
    every mistake found, and TypeError for a schema this loader cannot read.
    """
    reader = _Reader(schema)
    files = [] if yaml is None else [yaml] if isinstance(yaml, str | Path) else yaml
    layers = [reader.read_yaml(Path(file)) for file in files] or [{}]
    layers += (
        layer for text in overrides if (layer := reader.read_override(text)) is not None
    )
    cfg = reader.build(schema, reader.check(schema, reader.merge(layers), ()))
    if reader.mistakes:
        raise ConfigError([mistake.text for mistake in reader.mistakes])
    return cfg


def parse_command_line(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """The command line every entry point has: ``--config x.yaml [--resume auto|none|PATH] [--dry-run] [a.b=c ...]``.

    ``extend`` may add options of its own; they come back in ``args``. On a mistake every one is written to stderr (by
    rank 0) and the process exits with code 2. ``--local_rank``, which launchers append, is accepted and ignored.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that override the yaml"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="yaml file; several: later ones win",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="checkpoint to go on from",
    )
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="1xh100",
        metavar="GPUSxDEVICE",
        help="what the run needs: 8xh100, 1xa100",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS
    )
    if extend is not None:
        extend(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        cfg = load(schema, args.config, args.overrides)
    except ConfigError as error:
        head = f"{parser.prog}: {len(error.errors)} mistake{'s' * (len(error.errors) > 1)} in the configuration\n"
        lines = "".join(f"  {line}\n" for line in error.errors)
        parser.exit(2, head + lines if os.environ.get("RANK", "0") == "0" else None)
    return CommandLine(
        cfg, args.resume, tuple(args.config), tuple(args.overrides), args, args.dry_run
    )


@dataclass(frozen=True)
class _Mistake:
    where: Where
    text: str


class _Reader:
    """One reading of one config: collects mistakes on the way, so that all of them can be shown together."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.mistakes: list[_Mistake] = []
        self.removed: list[Where] = []  # entries of mappings that were set to null
        self.given: set[Where] = set()  # sections of any layer
        self.origin: dict[Where, str] = {}  # " (file.yaml:3)" or " (override)" by path

    def report(self, where: Where, message: str, *, first: str = "") -> None:
        """``first``: the key below ``where`` whose origin is told, when it has one."""
        places = ([(*where, first)] if first else []) + [
            where[:n] for n in range(len(where), 0, -1)
        ]
        origin = next(
            (self.origin[place] for place in places if place in self.origin), ""
        )
        self.mistakes.append(
            _Mistake(where, f"{'.'.join(where) or 'config'}: {message}{origin}")
        )

    def read_yaml(self, path: Path) -> dict[str, Any]:
        try:
            document = safe_yaml.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a UTF-8 text"
            self.mistakes.append(_Mistake((), f"{path}: cannot be read: {reason}"))
            return {}
        except safe_yaml.YamlError as error:
            self.mistakes.append(_Mistake((), f"{path}: {error}"))
            return {}
        self.origin.update(
            {where: f" ({path}:{line})" for where, line in document.lines.items()}
        )
        if document.value is not None and not isinstance(document.value, dict):
            self.mistakes.append(
                _Mistake(
                    (),
                    f"{path}: must hold `key: value` lines, got {_show(document.value)}",
                )
            )
            return {}
        return document.value or {}

    def read_override(self, text: str) -> dict[str, Any] | None:
        """``a.b=c`` -> {"a": {"b": c}}, or None after reporting what is wrong with it."""
        dotted, equals, value = text.partition("=")
        where = tuple(dotted.split("."))
        if not equals or not all(part and part == part.strip() for part in where):
            self.mistakes.append(
                _Mistake((), f"{text!r}: an override has the form a.b=value")
            )
            return None
        annotation = schema_types.at(self.schema, where)
        try:
            parsed = _override_value(annotation, value)
        except safe_yaml.YamlError as error:
            self.mistakes.append(
                _Mistake(where, f"{dotted}: the value {value!r} is not yaml: {error}")
            )
            return None
        if parsed == {} and schema_types.entry_of(annotation) is not None:
            self.mistakes.append(
                _Mistake(
                    where,
                    f"{dotted}: {{}} changes nothing; {dotted}.NAME=null takes one out",
                )
            )
            return None
        for stale in [known for known in self.origin if known[: len(where)] == where]:
            del self.origin[stale]
        self.origin[where] = " (command line)"
        for part in reversed(where):
            parsed = {part: parsed}
        return parsed

    def merge(self, layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for layer in layers:
            self.given |= _sections(layer, ())
        try:
            return OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)
        except OmegaConfBaseException as error:  # a malformed ${...}
            self.report_omegaconf(error)
            return {}

    def report_omegaconf(self, error: OmegaConfBaseException) -> None:
        where = tuple(str(error.full_key).split(".")) if error.full_key else ()
        self.report(where, str(error.msg or error).split("\n")[0])

    def check(self, annotation: Any, value: Any, where: Where) -> Any:
        """Report every unknown key and wrong type below ``where``; return the value without them."""
        if isinstance(value, str) and "${" in value:
            return value  # an interpolation: known only after the merge, `build` looks at it again
        section = schema_types.section_of(annotation)
        if isinstance(value, dict) and section is not None:
            return self._check_keys(value, section, where)
        try:
            return schema_types.convert(
                annotation,
                value,
                self._check_item(where, named=isinstance(value, dict)),
            )
        except schema_types.Unfit as error:
            self.report(
                where, f"expected {error.expected}, got {_show(value)}{error.hint}"
            )
            return _DROP

    def _check_item(self, where: Where, *, named: bool) -> schema_types.Recurse:
        check = self._entry if named else self.check
        return lambda annotation, value, key: check(annotation, value, (*where, key))

    def _entry(self, annotation: Any, value: Any, where: Where) -> Any:
        """As `check`; a section that is null is taken out of its mapping."""
        if value is None and dataclasses.is_dataclass(annotation):
            self.removed.append(where)
            return _DROP
        return self.check(annotation, value, where)

    def _check_keys(
        self, value: dict[str, Any], section: type, where: Where
    ) -> dict[str, Any]:
        known = schema_types.fields(section)
        clean = {}
        for key, item in value.items():
            if key not in known:
                self._unknown((*where, key), item, known)
            elif (checked := self.check(known[key], item, (*where, key))) is not _DROP:
                clean[key] = checked
        return clean

    def _unknown(self, where: Where, value: Any, siblings: Iterable[str]) -> None:
        close = difflib.get_close_matches(where[-1], list(siblings), n=1, cutoff=0.6)
        if not close and isinstance(value, dict) and value:
            for (
                key,
                item,
            ) in (
                value.items()
            ):  # a section in the wrong place: name the keys the user meant
                self._unknown((*where, key), item, ())
            return
        nearest = (
            ".".join((*where[:-1], *close))
            if close
            else _nearest_anywhere(self.schema, where)
        )
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        self.report(where, f"unknown key (value {_show(value)}){hint}")

    def build(self, schema: type[C], clean: dict[str, Any]) -> C | None:
        """Merge over the defaults, resolve, make the dataclasses; what their checks raise is reported by section."""
        try:
            tree = OmegaConf.to_container(
                OmegaConf.merge(OmegaConf.structured(schema), clean), resolve=True
            )
        except OmegaConfBaseException as error:
            self.report_omegaconf(error)
            return None
        for where in self.removed:
            mapping = functools.reduce(
                lambda section, key: section.get(key, {}), where[:-1], tree
            )
            if (
                mapping.pop(where[-1], None) is None and where not in self.given
            ):  # the schema's own, or a layer's
                close = difflib.get_close_matches(where[-1], list(mapping), n=1)
                hint = (
                    f"; did you mean {'.'.join((*where[:-1], *close))!r}?"
                    if close
                    else ""
                )
                self.report(where, f"there is none to take out{hint}")
        return self._make(schema, tree, ())

    def _make(self, annotation: Any, value: Any, where: Where) -> Any:
        section = schema_types.section_of(annotation)
        if value == "???":
            if not self._touched(where) and all(
                mistake.where for mistake in self.mistakes
            ):
                # not with an unreadable yaml or override at hand: it may well have held the value
                self.report(where, "is required and not given")
            return _DROP
        if not isinstance(value, dict) or section is None:
            try:
                return schema_types.convert(annotation, value, self._make_item(where))
            except schema_types.Unfit as error:
                self.report(
                    where, f"expected {error.expected}, got {_show(value)}{error.hint}"
                )
                return _DROP
        values = {
            key: self._make(known, value[key], (*where, key))
            for key, known in schema_types.fields(section).items()
        }
        if self._touched(where):
            return _DROP  # the checks of a section with a mistake would only repeat it
        try:
            return section(**values)
        except ValueError as error:
            self.report(where, str(error), first=_field_named(str(error), section))
            return _DROP

    def _make_item(self, where: Where) -> schema_types.Recurse:
        return lambda annotation, value, key: self._make(
            annotation, value, (*where, key)
        )

    def _touched(self, where: Where) -> bool:
        return any(mistake.where[: len(where)] == where for mistake in self.mistakes)


_DROP = schema_types.DROP


def _sections(layer: dict[str, Any], where: Where) -> set[Where]:
    inside = [(key, value) for key, value in layer.items() if isinstance(value, dict)]
    return {(*where, key) for key, _ in inside}.union(
        *(_sections(value, (*where, key)) for key, value in inside)
    )


def _field_named(message: str, section: type) -> str:
    """The first of the section's fields that the message names; "" if it names none."""
    return next(
        (
            word
            for word in re.findall(r"\w+", message)
            if word in schema_types.fields(section)
        ),
        "",
    )


def _override_value(annotation: Any, text: str) -> Any:
    """Text stays text where the schema wants text (``name=007``, ``prompt=a: b``); a quoted text loses its quotes."""
    wants_text = annotation is not None and schema_types.is_text(annotation)
    if text == "":
        return ""
    if wants_text and text[0] not in "\"'" and text != "null":
        return text
    return safe_yaml.parse(text).value


def _nearest_anywhere(schema: type, where: Where) -> str | None:
    """A key of another section: first by its full dotted path, then by its last word."""
    paths = schema_types.dotted_paths(schema)
    close = difflib.get_close_matches(".".join(where), paths, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_word = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(where[-1], list(by_word), n=1, cutoff=0.75)
    return by_word[close[0]] if close else None


def _show(value: Any) -> str:
    text = repr(value)
    kind = "a section" if isinstance(value, dict) else type(value).__name__
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


def check(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))


def not_negative(run: Any, *names: str) -> list[str]:
    return [
        f"{n} must be at least 0, got {getattr(run, n)}"
        for n in names
        if not getattr(run, n) >= 0
    ]
