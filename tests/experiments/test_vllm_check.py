"""`make vllm-check`: against the stand-in, and against a real vLLM where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments import vllm_check
from tests.launch.processes import ROOT, run

FAKE = ROOT / "tests" / "fakes_vllm"
CHECKS = 10


def settings(fault: str):
    env = {"PYTHONPATH": str(FAKE), "FAKE_VLLM": fault}
    return vllm_check.settings_for(Path(sys.executable), env=env)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "failing"),
    [("", []), ("stale", ["after an update", "with a LoRA"])],
)
def test_check_passes_with_the_stand_in_and_fails_with_stale_weights(
    monkeypatch, capsys, fault, failing
):
    # The stand-in reads the whole sequence for every token.
    monkeypatch.setattr(vllm_check, "VIDEOS", 2)
    monkeypatch.setattr(vllm_check, "SEEDS", [11, 12, 13, 2**63 - 1])
    report = vllm_check.run_checks(settings(fault))
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == report.failed == len(failing)
    assert all(name in line for name, line in zip(failing, failed, strict=True))
    assert sum(line.startswith("PASS") for line in lines) == CHECKS - len(failing)


@pytest.mark.long
@pytest.mark.skipif(
    not vllm_check.PYTHON.is_file(),
    reason="no .venv-vllm: `make vllm-check` makes it",
)
def test_check_passes_with_a_real_vllm():
    out = run(sys.executable, "experiments/vllm_check.py", timeout=1200.0).stdout
    lines = [line for line in out.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(lines) == CHECKS
    assert all(line.startswith("PASS") for line in lines)
