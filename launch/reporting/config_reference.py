"""docs/configs.md from the schemas: `python launch/reporting/config_reference.py`. A test holds the page against them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Any

from common.run_record import plain
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

Made by `python launch/reporting/config_reference.py` from the dataclasses that read the files; what each key means is their own
text. A program's keys stand first, the sections they hold behind them. `generator.sampler.num_steps=4` on the command
line sets a key of a section of a section; a mapping such as `rewards` takes any names. Required is what has no default.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    """The whole text."""
    sections: dict[type, list[str]] = {}
    for program, schema in PROGRAMS.items():
        sections.setdefault(schema, []).append(program)
        for inner in _inside(schema):
            sections.setdefault(inner, [])
    programs = [one for one in sections if sections[one]]
    rest = sorted((one for one in sections if not sections[one]), key=_title)
    index = [
        f"- `{program}`: [{_title(schema)}](#{_anchor(schema)})"
        for program, schema in PROGRAMS.items()
    ]
    return (
        "\n".join(
            [
                HEAD,
                *index,
                *(line for one in [*programs, *rest] for line in section(one)),
            ]
        )
        + "\n"
    )


def section(schema: type) -> list[str]:
    """A heading, the dataclass's text, and its keys."""
    lines = [
        "",
        f"## {_title(schema)}",
        "",
        "```text",
        *inspect.cleandoc(schema.__doc__ or "").splitlines(),
        "```",
        "",
    ]
    lines += ["| key | type | default |", "|---|---|---|"]
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        lines.append(
            f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} |"
        )
    return lines


def _inside(schema: type) -> list[type]:
    """Dataclasses that its keys hold, and theirs."""
    found: list[type] = []
    for hint in typing.get_type_hints(schema).values():
        for inner in _dataclasses_in(hint):
            found += [inner, *_inside(inner)]
    return found


def _dataclasses_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [
        one for argument in typing.get_args(hint) for one in _dataclasses_in(argument)
    ]


def _type(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return f"[{_title(hint)}](#{_anchor(hint)})"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (dict, list, tuple):
        inner = [_type(one) for one in arguments if one is not Ellipsis]
        return (
            f"mapping of names to {inner[1]}"
            if origin is dict
            else f"list of {', '.join(dict.fromkeys(inner))}"
        )
    if arguments:
        return " or ".join(_type(one) for one in arguments)
    return {type(None): "null", Any: "anything"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its own, " + _changed(value) if _changed(value) else "its own"
    return f"`{json.dumps(plain(value))}`"


def _changed(value: Any) -> str:
    """Where a section's default is not that of its class."""
    own = {f.name: f for f in dataclasses.fields(value)}
    changes = {
        name: getattr(value, name)
        for name, f in own.items()
        if f.default is not dataclasses.MISSING and f.default != getattr(value, name)
    }
    return ", ".join(
        f"`{name}={json.dumps(plain(found))}`" for name, found in changes.items()
    )


def _title(schema: type) -> str:
    """Two sections have one name, the adapters of the generator and of the judge."""
    package = schema.__module__.partition(".")[0]
    return (
        f"{schema.__name__} of {package}"
        if schema.__name__ == "LoraConfig"
        else schema.__name__
    )


def _anchor(schema: type) -> str:
    return _title(schema).lower().replace(" ", "-")


if __name__ == "__main__":
    main()
