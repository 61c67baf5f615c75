"""A script's folder hides no package, and never runs another copy of the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(script: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), **env},
        check=False,
    )


def test_script_folder_is_not_on_the_path(tmp_path):
    program = "import sys, launch; sys.stdout.write('\\n'.join(sys.path))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'launch'); {program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(ROOT / "launch") not in done.stdout.splitlines()
    assert "launch" not in done.stdout.splitlines()


def test_reward_that_imports_evaluate_does_not_get_the_command(tmp_path):
    (tmp_path / "evaluate.py").write_text("THEIRS = 1\n")
    script = tmp_path / "run.py"
    script.write_text("import launch, evaluate, sys; sys.exit(evaluate.THEIRS - 1)\n")
    assert run(script, PYTHONPATH=f"{ROOT}:{tmp_path}").returncode == 0


def test_script_of_another_copy_exits_2(tmp_path):
    package = tmp_path / "launch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "script_folder.py").write_text("")
    (package / "grpo.py").write_text("from launch.command import read_command\n")
    done = run(package / "grpo.py")
    assert done.returncode == 2
    assert str(ROOT) in done.stderr


def test_script_in_a_folder_of_the_same_name_runs(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("")
    script = tmp_path / "launch" / "mine.py"
    script.write_text("import launch\n")
    assert run(script).returncode == 0
