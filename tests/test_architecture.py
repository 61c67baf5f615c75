"""The rules of the house, checked on the syntax tree: who imports whom, sizes, and what no file may contain."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "common": {"common"},
    "rm": {"rm", "common"},
    "generator": {"generator", "common"},
    "alignment": {"alignment", "common"},
    "launch": {"launch", "alignment", "generator", "rm", "common"},
}
EXCEPTIONS = {
    ("alignment/rewards/descore.py", "rm.scorer"),
    ("alignment/rewards/videoreward.py", "rm.baselines.qwen2_vl"),
    ("alignment/rewards/hpsv3.py", "rm.baselines.qwen2_vl"),
    ("alignment/rewards/generative.py", "rm.baselines.generative"),
}
HEAVY = {
    "torch",
    "transformers",
    "diffusers",
    "deepspeed",
    "peft",
    "decord",
    "matplotlib",
}
PICKLE_READER = "rm/convert/weights.py"  # the one file that reads a .pth, in one call, tensors only, if the user says so
CATCHES_ALL = "alignment/rewards/errors.py"  # the one file that catches everything a stranger's code raises, to raise it again
MAX_LINES, MAX_FUNCTION_LINES = 400, 80

SOURCES = sorted(
    path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")
)
EVERYTHING = sorted(
    [
        *SOURCES,
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "bench").rglob("*.py"),
        ROOT / "setup.py",
    ]
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST) -> list[str]:
    """Dotted names that one statement may import: `from rm import scorer` means rm and rm.scorer."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__")
    ):
        return [
            arg.value
            for arg in node.args
            if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
    return []


def violations(source: str, path: str) -> list[str]:
    """Imports in a file that its place forbids; function-level imports and import_module("...") count."""
    package = path.split("/")[0]
    bad = []
    for node in ast.walk(ast.parse(source)):
        names = imported(node)
        if any((path, dotted) in EXCEPTIONS for dotted in names):
            continue
        for dotted in names:
            top = dotted.split(".")[0]
            if top == "" or (
                (top in MAY_IMPORT or top in ("tests", "bench"))
                and top not in MAY_IMPORT[package]
            ):
                bad.append(f"{path}:{node.lineno} imports {dotted}")
    return bad


def test_imports_go_one_way():
    assert [
        v
        for path in SOURCES
        for v in violations(path.read_text(encoding="utf-8"), name(path))
    ] == []


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        (
            "alignment/grpo.py",
            "def f():\n    from generator.flow import interpolate",
            2,
        ),
        ("alignment/grpo.py", "import rm.scorer", 1),
        ("alignment/rewards/descore.py", "from rm.scorer import DeScoreScorer", 0),
        ("alignment/rewards/descore.py", "def f():\n    from rm import scorer", 0),
        ("alignment/rewards/descore.py", "from rm.model import DeScore", 2),
        ("toy/oracle.py", "from rm.scorer import DeScoreScorer", 2),
        ("rm/model.py", "import generator", 1),
        ("generator/wan.py", "importlib.import_module('rm.model')", 1),
        ("common/log.py", "from alignment import grpo", 2),
        ("rm/model.py", "from .losses import x", 2),
        ("rm/model.py", "from tests.tiny import x", 2),
        ("launch/grpo.py", "import rm, generator, alignment, common, torch", 0),
    ],
)
def test_the_import_rule_catches(path, source, count):
    assert len(violations(source, path)) == count


def test_no_file_and_no_function_is_too_long():
    bad = []
    for path in EVERYTHING:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            bad.append(f"{name(path)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    bad.append(
                        f"{name(path)}:{node.lineno} {node.name} has {length} lines"
                    )
    assert bad == []


def test_no_drawer_files():
    drawers = {"utils.py", "util.py", "helpers.py", "base.py", "misc.py"}
    assert [name(path) for path in EVERYTHING if path.name in drawers] == []


RUNS_CODE = {
    "torch.load", "torch.serialization.load", "torch.serialization.add_safe_globals",
    "torch.serialization.safe_globals", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system",
}  # fmt: skip


def _reads_tensors_only(call: ast.Call) -> bool:
    """`weights_only=True`, spelled out: not a variable, not a default, not in a **dict."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    value = given.get("weights_only")
    return None not in given and isinstance(value, ast.Constant) and value.value is True


def forbidden(source: str, path: str) -> Iterator[str]:
    """What must not stand in any source file, and why."""
    may_print = path.startswith("launch/") or path == "common/log.py"
    may_load, may_catch = path == PICKLE_READER, path == CATCHES_ALL
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if (
                may_catch
                and caught == "Exception"
                and isinstance(node.body[-1], ast.Raise)
            ):
                may_catch = False
            elif not caught or {"Exception", "BaseException"} & set(
                caught.strip("()").replace(",", " ").split()
            ):
                yield f"{where} swallows everything: except {caught}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if {dotted.split(".")[0] for dotted in imported(node)} & {
                "pickle",
                "dill",
                "marshal",
                "shelve",
                "cloudpickle",
            }:
                yield f"{where} imports a format that runs code when read"
            elif {"torch.load", "torch.serialization.load"} & set(imported(node)):
                yield f"{where} imports torch.load, which hides its call"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "print" and not may_print:
                yield f"{where} prints; use common.log.say"
            if called == "torch.load" and may_load and _reads_tensors_only(node):
                may_load = False
            elif called in RUNS_CODE:
                yield f"{where} calls {called}"
            for keyword in node.keywords:
                switched_on = (
                    isinstance(keyword.value, ast.Constant)
                    and keyword.value.value is True
                )
                if (
                    keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                    and switched_on
                ):
                    yield f"{where} passes {keyword.arg}=True"


def test_nothing_swallows_errors_prints_or_runs_foreign_code():
    files = [*SOURCES, *(ROOT / "bench").rglob("*.py")]
    assert [
        f
        for path in files
        for f in forbidden(path.read_text(encoding="utf-8"), name(path))
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    x()\nexcept:\n    pass",
        "try:\n    x()\nexcept (OSError, Exception):\n    pass",
        "try:\n    x()\nexcept BaseException as error:\n    raise",
        "print(1)",
        "import pickle",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=L)",
        "eval('1')",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "from torch import load",
        "from torch.serialization import load as read",
        "torch.serialization.add_safe_globals([f])",
    ],
)
def test_the_ban_catches(source):
    assert len(list(forbidden(source, "rm/model.py"))) == 1


LOAD = "torch.load(path, map_location='cpu', weights_only=True)"


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("rm/convert/weights.py", LOAD, 0),
        ("rm/convert/weights.py", f"{LOAD}\n{LOAD}", 1),
        ("rm/convert/weights.py", "torch.load(path)", 1),
        ("rm/convert/weights.py", "torch.load(path, weights_only=False)", 1),
        ("rm/convert/weights.py", "torch.load(path, weights_only=trusted)", 1),
        ("rm/convert/weights.py", "torch.load(path, weights_only=True, **options)", 1),
        (
            "rm/convert/weights.py",
            "torch.serialization.load(path, weights_only=True)",
            1,
        ),
        ("rm/convert/weights.py", "import pickle", 1),
        ("launch/convert_descore.py", LOAD, 1),
        ("common/official.py", LOAD, 1),
        ("rm/weights/head.py", LOAD, 1),
    ],
)
def test_one_file_reads_a_pickle_once_and_tensors_only(path, source, count):
    assert len(list(forbidden(source, path))) == count


def test_the_exception_is_in_use():
    source = (ROOT / PICKLE_READER).read_text(encoding="utf-8")
    assert (
        sum(
            ast.unparse(n.func) == "torch.load"
            for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.Call)
        )
        == 1
    )


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        (
            CATCHES_ALL,
            "try:\n    x()\nexcept Exception as error:\n    raise E() from error",
            0,
        ),
        (CATCHES_ALL, "try:\n    x()\nexcept Exception:\n    pass", 1),
        (CATCHES_ALL, "try:\n    x()\nexcept BaseException:\n    raise", 1),
        (CATCHES_ALL, "try:\n    x()\nexcept Exception:\n    raise\n" * 2, 1),
        (
            "alignment/rewards/plugin.py",
            "try:\n    x()\nexcept Exception as error:\n    raise E() from error",
            1,
        ),
    ],
)
def test_one_file_catches_everything_once_and_raises_it_again(path, source, count):
    assert len(list(forbidden(source, path))) == count
    assert "except Exception" in (ROOT / CATCHES_ALL).read_text(encoding="utf-8")


def test_the_ban_lets_ordinary_code_pass():
    source = "try:\n    model.eval()\nexcept (OSError, ValueError):\n    raise\nyaml.safe_load(text)\nf(shell=False)"
    assert list(forbidden(source, "rm/model.py")) == []
    assert list(forbidden("print(1)", "launch/grpo.py")) == []


def top_level_imports(path: Path) -> set[str]:
    """What importing a file imports at once: not inside functions, not under TYPE_CHECKING."""
    found: set[str] = set()
    todo: list[ast.AST] = [tree(path)]
    while todo:
        node = todo.pop()
        found.update(imported(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith(
            "TYPE_CHECKING"
        ):
            todo += node.orelse
        elif not (
            isinstance(node, ast.If)
            and ast.unparse(node.test) == "__name__ == '__main__'"
        ):
            todo += ast.iter_child_nodes(node)
    return found


def heavy_at_import(path: Path, seen: set[Path] | None = None) -> dict[str, str]:
    """heavy library -> first-party file, for everything that importing ``path`` drags in."""
    seen = set() if seen is None else seen
    if path in seen:
        return {}
    seen.add(path)
    result = {}
    for dotted in sorted(top_level_imports(path)):
        parts = dotted.split(".")
        if parts[0] in HEAVY:
            result[parts[0]] = name(path)
        for n in range(
            1, len(parts) + 1
        ):  # importing a.b.c runs a/__init__.py and a/b/__init__.py too
            stem = ROOT.joinpath(*parts[:n])
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                if parts[0] in MAY_IMPORT and file.is_file():
                    result |= heavy_at_import(file, seen)
    return result


# a wrong key must be reported in under two seconds, and importing torch alone takes about that
@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "config.py"], ids=name
)
def test_configs_load_nothing_heavy(path):
    assert heavy_at_import(path) == {}


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in SOURCES
        if p.parent.name == "launch" and "parse_command_line" in p.read_text()
    ],
    ids=name,
)
def test_entry_points_read_the_command_line_before_anything_heavy(path):
    assert heavy_at_import(path) == {}


def test_the_static_answer_agrees_with_python():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in SOURCES
        if p.name == "config.py"
    ]
    program = f"import sys, {', '.join(modules)}; sys.stdout.write(' '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert heavy_at_import(ROOT / "common" / "gaussian.py") == {
        "torch": "common/gaussian.py"
    }


def test_no_file_knows_this_machine():
    marks = [f"/{folder}/" for folder in ("work", "root", "home")] + [
        "../" + "shared",
        "index" + "-url",
        "pypi" + ".org",
    ]
    kinds = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".html", ""}
    places = [
        ROOT,
        *(
            ROOT / top
            for top in (*MAY_IMPORT, "tests", "bench", "configs", "assets", ".ci")
        ),
    ]
    files = [
        p
        for place in places
        for p in (place.iterdir() if place == ROOT else place.rglob("*"))
        if p.is_file()
    ]
    bad = []
    for path in files:
        if path.suffix in kinds:
            text = path.read_text(encoding="utf-8", errors="replace")
            bad += [f"{name(path)} contains {mark}" for mark in marks if mark in text]
    assert bad == []
