"""Write docs/configs.md from the schemas: `python launch/reporting/config_reference.py`.

A test compares the page with the schemas.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Annotated, Any

from common.run_record import plain
from common.schema import field_types
from launch.schemas.evaluation import GeneratorEvaluation, RewardEvaluation, ScoreRun
from launch.schemas.pairs import DpoRun, PairsRun
from launch.schemas.server import ServeRun
from launch.schemas.training import ColdStartRun, DualRlRun, GrpoRun, SampleRun
from launch.schemas.vbench import VbenchEvaluation, VbenchSampleRun

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configs.md"
PROGRAMS: dict[str, type] = {
    "launch/cold_start.py": ColdStartRun,
    "launch/dual_rl.py": DualRlRun,
    "launch/grpo.py": GrpoRun,
    "launch/pairs.py": PairsRun,
    "launch/dpo.py": DpoRun,
    "launch/sample.py": SampleRun,
    "launch/sample.py vbench": VbenchSampleRun,
    "launch/score.py": ScoreRun,
    "launch/serve.py": ServeRun,
    "launch/evaluate.py generator": GeneratorEvaluation,
    "launch/evaluate.py rm": RewardEvaluation,
    "launch/evaluate.py vbench": VbenchEvaluation,
}
HEAD = """# Every key of every config

Made by `python launch/reporting/config_reference.py` from the schemas that read the files. The
keys of the commands come first, then those of their sections. `generator.sampler.num_steps=4`
on the command line sets a key of a section inside a section; a mapping such as `rewards` takes
any names. A key without a default is required.
"""

# What people change first, with the schema that has the key and what to know.
FIRST: tuple[tuple[str, type, str], ...] = (
    ("run_dir", GrpoRun, "folder of the run; started again, it resumes from there"),
    ("generator.path", GrpoRun, "folder or hub name of the Wan pipeline"),
    ("prompts", GrpoRun, "a text file, one prompt on each line"),
    ("rewards.NAME.weight", GrpoRun, "0 scores and logs without training on it"),
    ("steps", GrpoRun, "optimizer steps"),
    (
        "prompts_per_step",
        GrpoRun,
        "groups of an update over all ranks; noise falls with it",
    ),
    ("grpo.group_size", GrpoRun, "videos of a prompt that are compared"),
    ("optimizer.lr", GrpoRun, "too small: no rise; too large: the KL runs away"),
    ("grpo.kl_weight", GrpoRun, "holds the policy near the base model"),
    ("generator.num_frames", GrpoRun, "with height and width what a step costs"),
)

# How limits of annotated_types read behind a type.
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    """Return the text of docs/configs.md."""
    commands = list(dict.fromkeys(PROGRAMS.values()))
    others = set().union(*map(_sections_inside, commands)).difference(commands)
    sections = sorted(others, key=lambda section: section.__name__)

    lines = [HEAD, *_first_keys()]
    for program, schema in PROGRAMS.items():
        lines.append(f"- `{program}`: {_link(schema)}")
    for schema in [*commands, *sections]:
        lines += _chapter(schema)
    return "\n".join(lines) + "\n"


def _first_keys() -> list[str]:
    """Return the table of the keys that people change first, with their types and defaults."""
    lines = ["## The ten keys that people change first", ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for key, schema, remark in FIRST:
        *sections, name = key.split(".")
        # Down the sections; NAME stands for any entry of a mapping.
        for section in sections:
            if section != "NAME":
                annotation = typing.get_type_hints(schema, include_extras=True)[section]
                (schema,) = _outermost(annotation)
        types = typing.get_type_hints(schema, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(schema)}
        row = (f"`{key}`", _type(types[name]), _default(fields[name]), remark)
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "They are of `launch/grpo.py`; the other commands share most of them.",
    ]
    return [*lines, "", "## The commands", ""]


def _outermost(annotation: Any) -> set[type]:
    """Return the section that a type is or holds, without those inside of it."""
    # validators of a type are dataclasses too, but no types
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return {annotation}
    return set().union(*map(_outermost, typing.get_args(annotation)))


def _chapter(schema: type) -> list[str]:
    """Return a heading, the schema's own text, and a row for each of its keys."""
    file = schema.__module__.replace(".", "/") + ".py"
    lines = ["", f"## {schema.__name__}", "", f"Defined in `{file}`.", "", "```text"]
    # The text of a schema, then those of the schemas whose keys it inherits.
    bases = filter(dataclasses.is_dataclass, schema.__mro__)
    texts = [inspect.cleandoc(base.__doc__ or "") for base in bases]
    lines += "\n\n".join(texts).splitlines()
    lines += ["```", "", "| key | type | default |", "|---|---|---|"]
    types = typing.get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        kind = _type(types[field.name])
        lines.append(f"| `{field.name}` | {kind} | {_default(field)} |")
    return lines


def _sections_inside(annotation: Any) -> set[type]:
    """Return the sections that a type holds, and theirs."""
    if not dataclasses.is_dataclass(annotation):
        inner = typing.get_args(annotation)
        return set().union(*map(_sections_inside, inner))
    # A section, and what its keys hold.
    inside = map(_sections_inside, field_types(annotation).values())
    return {annotation}.union(*inside)


def _type(annotation: Any) -> str:
    """Describe a type with its limits."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _link(annotation)
    if origin is Annotated:
        return _type(arguments[0]) + _limits(arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if origin in (list, tuple):
        kinds = [_type(kind) for kind in arguments if kind is not Ellipsis]
        return f"list of {', '.join(dict.fromkeys(kinds))}"
    if arguments:
        return " or ".join(_type(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "anything"
    return annotation.__name__


def _limits(metadata: tuple[Any, ...]) -> str:
    """Describe the bounds in an Annotated type's metadata."""
    text = ""
    for item in metadata:
        for bound in getattr(item, "metadata", [item]):
            for attribute, words in LIMITS.items():
                value = getattr(bound, attribute, None)
                if value is not None:
                    text += f", {words} {value:g}"
    return text


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if not dataclasses.is_dataclass(value):
        return f"`{json.dumps(plain(value))}`"
    changes = _changed(value)
    return "its own, " + changes if changes else "its own"


def _changed(section: Any) -> str:
    """List where a section used as a default differs from the defaults of its class."""
    changes = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.default not in (dataclasses.MISSING, value):
            changes.append(f"`{field.name}={json.dumps(plain(value))}`")
    return ", ".join(changes)


def _link(schema: type) -> str:
    return f"[{schema.__name__}](#{schema.__name__.lower()})"


if __name__ == "__main__":
    main()
