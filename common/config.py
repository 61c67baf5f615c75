"""Read a run's config: one yaml or several, overrides, and a message for every mistake.

Defaults <- yaml files <- ``a.b=c`` are merged, OmegaConf resolves ``${...}``, and pydantic
validates the result against the schema (`common.schema.config`). All mistakes are
reported together, each with its file and line and, for an unknown key, the nearest key.
Nothing here imports torch, so that an error shows in well under two seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from common import safe_yaml, schema
from common.cli import command_parser, exit_with_error
from common.files import check_text
from common.renamed_keys import NEW_NAME
from common.run_record import dump as dump
from common.schema import Where, config
from common.shipped import resolve_assets, shipped

C = TypeVar("C")
# In a text of a config: the text that the configs before it have at the same key.
BELOW = "${below}"


@config
class WandbConfig:
    """Weights & Biases beside metrics.jsonl.

    mode     "offline" writes into the run folder and needs no network.
    project  name of the project on the server.
    name     name of the run; null lets the server choose.
    """

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "video-alignment"
    name: str | None = None


class ConfigError(ValueError):
    """A config with mistakes; ``errors`` holds one line for each."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True)
class CommandLine(Generic[C]):
    """The parsed command line of an entry point.

    resume   auto, none or a path.
    dry_run  the devices to plan for, None for a real run.
    rehearse the devices to rehearse on, None for a real run.
    rehearse_out  the file for the result of a rehearsal, None for the usual place.
    measured a file of measured rates, see `launch.planning.roofline.read_measured`.
    args     all arguments as argparse read them.
    """

    cfg: C
    resume: str
    dry_run: str | None
    args: argparse.Namespace
    rehearse: str | None = None
    rehearse_out: Path | None = None
    measured: Path | None = None


def load(
    schema: type[C],
    yaml: str | Path | Sequence[str | Path] | None,
    overrides: Sequence[str] = (),
) -> C:
    """Read a config: defaults <- yaml files in order <- overrides ``a.b=c`` in order.

    An override's value is read as yaml, or taken as it stands, without blanks around it,
    where the schema wants text. An entry of a mapping of sections (``rewards.NAME``) is
    removed by null. ``${below}`` in a text stands for the text that the layers before
    have at its key. Raises ConfigError with every mistake.
    """
    files = [yaml] if isinstance(yaml, str | Path) else yaml or ()
    reader = _ConfigReader(schema)
    layers = [reader.read_yaml(shipped(file)) for file in files]
    layers += [reader.read_override(text) for text in overrides]
    cfg = reader.build(layers)
    if reader.mistakes:
        raise ConfigError(reader.mistakes)
    return cfg


def parse_command_line(
    schema: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    extend: Callable[[argparse.ArgumentParser], object] | None = None,
) -> CommandLine[C]:
    """Parse ``--config x.yaml [--resume auto|none|PATH] [--dry-run] [--rehearse] [a.b=c ...]``.

    ``description`` is for `common.cli.command_parser`. ``extend`` may add options; they come
    back in ``args``, and none of them is required with ``--dry-run`` or ``--rehearse``. With
    mistakes, rank 0 writes each of them to stderr and the process exits with code 2;
    without ``--config`` it names the recipes of the command. ``--local_rank``, which launchers
    append, is ignored.
    """
    parser = command_parser(description)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that override the yaml"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="yaml file; of several, later files win",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="checkpoint to resume from",
    )
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="1xh100",
        metavar="GPUSxDEVICE",
        help="print what the run needs on these devices: 8xh100, 1xa100",
    )
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="1xh100",
        metavar="GPUSxDEVICE",
        help="run one step on a simulated device, without weights: 8xh100, 1xa100",
    )
    parser.add_argument(
        "--rehearse-out", type=Path, metavar="FILE", help="the rehearsal's JSON"
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="JSON of measured rates of the device, for --dry-run and --rehearse",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS
    )
    if extend is not None:
        extend(parser)
    words = sys.argv[1:] if argv is None else argv
    if all(word.startswith("--local") for word in words):
        # The recipe comes before the options that argparse requires.
        exit_with_error(_how_to_start(parser, schema))
    # A plan and a rehearsal need no videos and no output file.
    if any(word.startswith(("--dry-run", "--rehearse")) for word in words):
        for action in parser._actions:
            action.required = False
    args = parser.parse_intermixed_args(words)
    cfg = _load_or_exit(schema, args.config, args.overrides)
    return CommandLine(
        cfg,
        args.resume,
        args.dry_run,
        args,
        rehearse=args.rehearse,
        rehearse_out=args.rehearse_out,
        measured=args.measured,
    )


def _load_or_exit(
    schema: type[C], files: Sequence[Path], overrides: Sequence[str]
) -> C:
    """Load a config. With mistakes exit with code 2, and name recipes if none was given."""
    try:
        return load(schema, files, overrides)
    except ConfigError as error:
        plural = "s" if len(error.errors) > 1 else ""
        lines = [f"{len(error.errors)} mistake{plural} in the configuration"]
        lines += error.errors
    if not files:
        lines.insert(0, _advice(recipes_of(schema)))
    exit_with_error("\n  ".join(lines))


def _advice(recipes: Sequence[str]) -> str:
    names = ", ".join(recipes) or "FILE.yaml"
    return f"give a recipe with --config: {names}; --help shows examples"


def _how_to_start(parser: argparse.ArgumentParser, schema: type) -> str:
    """Name the recipes, an example, and how to see what a run would need."""
    recipes = recipes_of(schema)
    lines = [_advice(recipes)]
    # Without its heading, the epilog holds the examples of the help.
    examples = (parser.epilog or "").split("\n")[1:]
    if examples:
        lines += ["start it:", *examples]
    # The program as the example calls it.
    program = re.search(r"(\S+\.py(?: [a-z]+)?) ", "\n".join(examples))
    if program and recipes:
        lines.append("see what it needs first, without weights and without a GPU:")
        lines.append(f"    python {program[1]} --config {recipes[-1]} --dry-run 8xh100")
    return "\n".join(lines)


def recipes_of(schema: type) -> list[str]:
    """List the shipped yaml files that are a whole config of the schema."""
    folder = shipped("configs")
    known = {field.name for field in dataclasses.fields(schema)}
    names = []
    for file in sorted(folder.rglob("*.yaml")):
        # Most recipes of other commands have other sections; to find that out is quick.
        if not known.issuperset(_ConfigReader(schema).read_yaml(file)):
            continue
        try:
            load(schema, file)
        except ConfigError:
            # a part that goes on top of a recipe
            continue
        names.append(f"configs/{file.relative_to(folder).as_posix()}")
    return names


class _ConfigReader:
    """Collects the mistakes of one config, so that all can be shown together."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.mistakes: list[str] = []
        self.unreadable = False  # a layer is lost: keys that seem missing may be in it
        self.given: set[Where] = set()  # sections that some layer names
        self.origin: dict[Where, str] = {}  # " (file.yaml:3)" or " (command line)"

    def report(self, where: Where, message: str, *, field: str = "") -> None:
        """Add a mistake with the place where the key, or the section around it, was set."""
        places = [where[:length] for length in range(len(where), 0, -1)]
        if field:
            places.insert(0, (*where, field))
        # A message may begin with the whole name of the key that it is about.
        named = tuple(re.match(r"[\w.]*", message)[0].split("."))
        places.insert(0, named)
        origins = [self.origin[place] for place in places if place in self.origin]
        origin = origins[0] if origins else ""
        self.mistakes.append(f"{'.'.join(where) or 'config'}: {message}{origin}")

    # Reading the layers.

    def read_yaml(self, path: Path) -> dict[str, Any]:
        try:
            document = safe_yaml.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a UTF-8 text"
            return self._unreadable(f"{path}: cannot be read: {reason}")
        except safe_yaml.YamlError as error:
            return self._unreadable(f"{path}: {error}")
        if document.value is None:
            return {}
        if not isinstance(document.value, dict):
            shown = _show(document.value)
            return self._unreadable(
                f"{path}: must hold `key: value` lines, got {shown}"
            )
        for where, line in document.lines.items():
            self.origin[where] = f" ({path}:{line})"
        return resolve_assets(document.value)

    def read_override(self, text: str) -> dict[str, Any]:
        """Turn ``a.b=c`` into {"a": {"b": c}}; {} after a mistake."""
        try:
            check_text(text)
        except ValueError as error:
            return self._unreadable(f"{text!r}: {error}")
        dotted, equals, value = text.partition("=")
        where = tuple(dotted.split("."))
        well_formed = all(part and part == part.strip() for part in where)
        if not equals or not well_formed:
            return self._unreadable(f"{text!r}: an override has the form a.b=value")
        annotation = schema.annotation_at(self.schema, where)
        try:
            parsed = _override_value(annotation, value)
        except safe_yaml.YamlError as error:
            message = f"{dotted}: the value {value!r} is not yaml: {error}"
            return self._unreadable(message)
        if parsed == {} and schema.entry_of(annotation) is not None:
            message = (
                f"{dotted}: {{}} changes nothing; {dotted}.NAME=null removes an entry"
            )
            return self._unreadable(message)

        # Lines of a yaml that this override replaces are no longer the origin.
        for known in list(self.origin):
            if known[: len(where)] == where:
                del self.origin[known]
        self.origin[where] = " (command line)"
        for part in reversed(where):
            parsed = {part: parsed}
        return parsed

    def _unreadable(self, message: str) -> dict[str, Any]:
        self.mistakes.append(message)
        self.unreadable = True
        return {}

    # Merging and validating.

    def build(self, layers: Sequence[dict[str, Any]]) -> Any:
        """Merge the layers over the defaults and validate; None after a mistake."""
        for layer in layers:
            self.given |= set(_sections(layer, ()))
        tree: Any = _defaults(self.schema)
        for layer in layers:
            tree = _merge(tree, self._fill_below(tree, layer, ()))
        try:
            tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        except OmegaConfBaseException as error:  # a malformed ${...}
            where = tuple(str(error.full_key).split(".")) if error.full_key else ()
            self.report(where, str(error.msg or error).split("\n")[0])
            tree = {}
            self.unreadable = True
        self._remove_null_entries(self.schema, tree, ())
        self._report_values(tree, ())
        adapter = TypeAdapter(self.schema)
        try:
            # JSON mode takes a list for a tuple and is strict about everything else.
            return adapter.validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            self._report_all(error, tree)
        return None

    def _fill_below(self, below: Any, layer: Any, where: Where) -> Any:
        """Replace `BELOW` in a layer's texts by the text that the layers under it have there."""
        if isinstance(layer, dict):
            under = below if isinstance(below, dict) else {}
            return {
                key: self._fill_below(under.get(key), value, (*where, key))
                for key, value in layer.items()
            }
        if not isinstance(layer, str) or BELOW not in layer:
            return layer
        if not isinstance(below, str):
            self.report(where, f"{BELOW} needs a text under it; give a recipe first")
            self.unreadable = True
            return layer.replace(BELOW, "")
        return layer.replace(BELOW, below)

    def _remove_null_entries(self, annotation: Any, tree: Any, where: Where) -> None:
        """Remove the entries of mappings of sections that are null."""
        if not isinstance(tree, dict):
            return
        section = schema.section_of(annotation)
        entry = schema.entry_of(annotation)
        for key, value in list(tree.items()):
            path = (*where, key)
            if entry is not None and value is None:
                del tree[key]
                self._check_removed(path, tree)
            elif entry is not None:
                self._remove_null_entries(entry, value, path)
            elif section is not None and key in schema.field_types(section):
                self._remove_null_entries(schema.field_types(section)[key], value, path)

    def _check_removed(self, where: Where, others: Iterable[str]) -> None:
        """Report a null for an entry that neither the defaults nor a layer has."""
        defaults = _defaults(self.schema)
        parent = functools.reduce(
            lambda tree, key: tree.get(key) or {}, where[:-1], defaults
        )
        if where[-1] in parent or where in self.given:
            return
        close = difflib.get_close_matches(where[-1], list(others), n=1)
        hint = f"; did you mean {'.'.join((*where[:-1], *close))!r}?" if close else ""
        self.report(where, f"there is no such entry to remove{hint}")

    def _report_values(self, tree: Any, where: Where) -> None:
        """Report numbers that are nan, and texts that no file can hold, which it mends."""
        if isinstance(tree, float) and math.isnan(tree):
            self.report(where, "must be a number, got nan")
        items = []
        if isinstance(tree, dict):
            items = list(tree.items())
        elif isinstance(tree, list):
            items = list(enumerate(tree))
        for key, value in items:
            path = (*where, str(key))
            self._report_values(value, path)
            if isinstance(value, str):
                try:
                    check_text(value)
                except ValueError as error:
                    self.report(path, str(error))
                    tree[key] = value.encode(errors="replace").decode()

    def _report_all(self, error: ValidationError, tree: dict[str, Any]) -> None:
        """Report pydantic's findings in this project's words, one line a key."""
        seen = set()
        for finding in error.errors(include_url=False):
            where, value = _locate(finding["loc"], tree)
            if where in seen:  # the members of a union, each with its own finding
                continue
            seen.add(where)
            kind, message = finding["type"], finding["msg"]
            section = schema.section_of(schema.annotation_at(self.schema, where))
            if kind == "missing" and isinstance(value, list):
                self.report(where, f"the list is too short, got {_show(value)}")
            elif kind == "missing":
                seen.discard(where)  # a section can lack several keys
                if not self.unreadable:
                    missing = (*where, str(finding["loc"][-1]))
                    self.report(missing, "is required and not given")
            elif kind == "unexpected_keyword_argument":
                # Odd characters may have changed on the way through JSON.
                self._report_unknown(where or (str(finding["loc"][-1]),), value)
            elif kind == "value_error":
                text = message.removeprefix("Value error, ")
                field = _field_named(text, section) if section is not None else ""
                self.report(where, text, field=field)
            elif kind == "too_short" and not value:
                self.report(where, "has no entry, and needs one")
            else:
                text = message[0].lower() + message[1:]
                if kind == "dataclass_type":
                    keys = ", ".join(schema.field_types(section))
                    text = f"expected a section with the keys {keys}"
                self.report(where, f"{text}, got {_show(value)}")

    def _report_unknown(self, where: Where, value: Any) -> None:
        """Report an unknown key with the nearest key that exists."""
        section = schema.section_of(schema.annotation_at(self.schema, where[:-1]))
        siblings = [] if section is None else list(schema.field_types(section))
        new_name = NEW_NAME.get(where[-1])
        close = difflib.get_close_matches(where[-1], siblings, n=1)
        if new_name in siblings:
            close = [new_name]
        if not close and isinstance(value, dict) and value:
            # A section in the wrong place: name the keys that were meant.
            for key, inner in value.items():
                self._report_unknown((*where, key), inner)
            return
        if close:
            nearest = ".".join((*where[:-1], *close))
        else:
            nearest = _nearest_anywhere(self.schema, where)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        self.report(where, f"unknown key (value {_show(value)}){hint}")


def _defaults(section: type) -> dict[str, Any]:
    """Return the defaults of a schema as plain data, without the keys that are required."""
    tree = {}
    for field in dataclasses.fields(section):
        if field.default is not dataclasses.MISSING:
            tree[field.name] = to_jsonable_python(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = to_jsonable_python(field.default_factory())
    return tree


def _merge(old: Any, new: Any) -> Any:
    """Put ``new`` over ``old``: sections key by key, anything else as a whole."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    merged = dict(old)
    for key, value in new.items():
        merged[key] = _merge(old.get(key), value)
    return merged


def _sections(layer: dict[str, Any], where: Where) -> Iterable[Where]:
    for key, value in layer.items():
        if isinstance(value, dict):
            yield (*where, key)
            yield from _sections(value, (*where, key))


def _locate(loc: tuple[int | str, ...], tree: Any) -> tuple[Where, Any]:
    """Return the part of pydantic's location that leads through the config, and the value.

    The location also names members of unions, which are no keys.
    """
    where: list[str] = []
    for part in loc:
        in_mapping = isinstance(tree, dict) and part in tree
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if in_mapping or in_list:
            tree = tree[part]
        else:
            break
        where.append(str(part))
    return tuple(where), tree


def _field_named(message: str, section: type) -> str:
    """Return the first field that a section's error message names, "" for none."""
    for word in re.findall(r"\w+", message):
        if word in schema.field_types(section):
            return word
    return ""


def _override_value(annotation: Any, text: str) -> Any:
    """Read an override's value; text stays text where the schema wants text.

    ``name=007`` and ``prompt=a: b`` are texts; a quoted text loses its quotes. Blanks around a
    text are typos, as in yaml.
    """
    text = text.strip()
    wants_text = annotation is not None and schema.is_text(annotation)
    if text == "":
        return ""
    if wants_text and text[0] not in "\"'" and text != "null":
        return text
    return safe_yaml.parse(text).value


def _nearest_anywhere(section: type, where: Where) -> str | None:
    """Find a key of another section, by its dotted path and then by its last word."""
    paths = list(schema.dotted_paths(section))
    close = difflib.get_close_matches(".".join(where), paths, n=1)
    if close:
        return close[0]
    by_word = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(where[-1], list(by_word), n=1, cutoff=0.75)
    return by_word[close[0]] if close else None


def _show(value: Any) -> str:
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    kind = "a section" if isinstance(value, dict) else type(value).__name__
    return f"{text} ({kind})"
