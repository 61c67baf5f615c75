"""The rules of the house that ruff and import-linter cannot state.

Import layers are contracts of import-linter in pyproject.toml; bans (pickle, yaml.load,
eval, shell, broad excepts, print) are rules of ruff.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "common",
    "rm",
    "generator",
    "engine",
    "alignment",
    "launch",
    "toy",
    "experiments",
)
HEAVY = {
    "torch",
    "transformers",
    "diffusers",
    "deepspeed",
    "peft",
    "decord",
    "matplotlib",
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


# Who imports whom.


def test_import_contracts_are_kept():
    program = "import sys; from importlinter.cli import lint_imports_command; "
    program += "sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files that import each other, also through others (Kosaraju's algorithm)."""
    finished: list[str] = []
    seen: set[str] = set()

    def visit(node: str, edges: dict[str, set[str]], done: list[str]) -> None:
        seen.add(node)
        for target in sorted(edges[node]):
            if target not in seen:
                visit(target, edges, done)
        done.append(node)

    for node in sorted(imports):
        if node not in seen:
            visit(node, imports, finished)
    importers: dict[str, set[str]] = {node: set() for node in imports}
    for node, targets in imports.items():
        for target in targets:
            importers[target].add(node)
    seen.clear()
    found = []
    for node in reversed(finished):
        if node not in seen:
            members: list[str] = []
            visit(node, importers, members)
            if len(members) > 1:
                found.append(set(members))
    return found


def test_no_file_imports_itself_through_others():
    graph = grimp.build_graph(*ROOMS)
    imports = {
        module: set(graph.find_modules_directly_imported_by(module))
        for module in graph.modules
    }
    assert circles(imports) == []


def test_a_circle_of_three_files_is_found():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(imports) == [{"a", "b", "c"}]


def test_no_drawer_files():
    drawers = {"utils.py", "util.py", "helpers.py", "base.py", "misc.py"}
    assert [name(path) for path in SOURCES if path.name in drawers] == []


# What is heavy is imported late: a wrong key must be reported in under two seconds, and
# importing torch alone takes about that.


def imported(node: ast.AST) -> list[str]:
    """Dotted names that a statement may import: `from rm import scorer` means both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []


def top_level_imports(path: Path) -> set[str]:
    """Imports outside functions and TYPE_CHECKING."""
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
        else:
            todo += ast.iter_child_nodes(node)
    return found


def heavy_at_import(path: Path, seen: set[Path] | None = None) -> dict[str, str]:
    """heavy library -> our file that imports it, for all that importing ``path`` runs."""
    seen = set() if seen is None else seen
    if path in seen:
        return {}
    seen.add(path)
    result = {}
    for dotted in sorted(top_level_imports(path)):
        parts = dotted.split(".")
        if parts[0] in HEAVY:
            result[parts[0]] = name(path)
        # Importing a.b.c runs a/__init__.py and a/b/__init__.py too.
        for depth in range(1, len(parts) + 1):
            stem = ROOT.joinpath(*parts[:depth])
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                if parts[0] in ROOMS and file.is_file():
                    result |= heavy_at_import(file, seen)
    return result


SCHEMAS = [p for p in SOURCES if p.name == "config.py" or p.parent.name == "schemas"]
ENTRY_POINTS = [
    path
    for path in SOURCES
    if path.parent.name == "launch"
    and re.search(r"(read|run|train)_command\(", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path", SCHEMAS, ids=name)
def test_schema_imports_nothing_heavy(path):
    assert heavy_at_import(path) == {}


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=name)
def test_entry_point_reads_the_command_line_before_heavy_imports(path):
    assert heavy_at_import(path) == {}


def test_entry_point_guard_covers_the_commands():
    names = {path.name for path in ENTRY_POINTS}
    assert {
        "grpo.py",
        "dpo.py",
        "cold_start.py",
        "dual_rl.py",
        "score.py",
        "serve.py",
    } < names
    assert len(names) >= 10


def test_heavy_imports_found_statically_are_those_of_python():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SCHEMAS]
    program = f"import sys, {', '.join(modules)}; "
    program += f"sys.stdout.write(' '.join({HEAVY!r} & set(sys.modules)))"
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


# What no file may contain.

CATCHES_ALL = ("alignment/rewards/errors.py", "generator/plugin.py")


def broad_handlers(source: str) -> list[ast.ExceptHandler]:
    """`except:` and `except Exception`, also among others in a tuple."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            words = set(caught.strip("()").replace(",", " ").split())
            if not caught or words & {"Exception", "BaseException"}:
                found.append(node)
    return found


def test_only_callers_of_users_code_catch_everything_and_raise_it_again():
    bad = [
        name(path)
        for path in SOURCES
        if name(path) not in CATCHES_ALL
        and broad_handlers(path.read_text(encoding="utf-8"))
    ]
    assert bad == []
    for file in CATCHES_ALL:
        handlers = broad_handlers((ROOT / file).read_text(encoding="utf-8"))
        assert handlers
        assert all(isinstance(handler.body[-1], ast.Raise) for handler in handlers)


def test_broad_handler_in_a_tuple_is_found():
    source = "try:\n    x()\nexcept (OSError, Exception):\n    pass"
    assert len(broad_handlers(source)) == 1
    assert broad_handlers(source.replace(", Exception", "")) == []


def runs_code(source: str) -> list[str]:
    """Arguments that let a library run code from files, switched on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                is_true = (
                    isinstance(keyword.value, ast.Constant)
                    and keyword.value.value is True
                )
                if (
                    keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                    and is_true
                ):
                    found.append(keyword.arg)
    return found


def test_no_file_lets_a_library_run_code_from_files():
    bad = {name(path): runs_code(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: found for path, found in bad.items() if found} == {}
    assert runs_code("f(trust_remote_code=True, shell=False)") == ["trust_remote_code"]


def test_the_pickle_is_read_once_and_tensors_only():
    source = ROOT / "rm" / "convert" / "weights.py"
    calls = [n for n in ast.walk(tree(source)) if isinstance(n, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}
    assert given["weights_only"] == "True"


def test_no_file_knows_this_machine():
    marks = [f"/{folder}/" for folder in ("work", "root", "home")]
    marks += ["../" + "shared", "index" + "-url", "pypi" + ".org"]
    kinds = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".html", ".cff", ""}
    folders = (*ROOMS, "tests", "configs", "assets", "docs", "examples", ".ci")
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in folders:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    bad = []
    for path in files:
        if path.suffix in kinds:
            text = path.read_text(encoding="utf-8", errors="replace")
            bad += [f"{name(path)} contains {mark}" for mark in marks if mark in text]
    assert bad == []


# Density, comments and names: the limits of `make style`.


def test_style_counts_tokens_and_comments(tmp_path):
    from tests.style import measure

    file = tmp_path / "a.py"
    file.write_text('"""Text."""\n\n# heading\nx = f(\n    1,\n)\n')
    found = measure(file)
    assert (found.tokens, found.code_lines, found.comment_lines) == (7, 3, 1)
