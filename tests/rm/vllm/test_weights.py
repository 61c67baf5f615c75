"""One file of weights for all ranks of a node, and errors that reach all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.processes import torchrun

SCRIPT = """
import json, sys
from pathlib import Path

import torch

from common import distributed
from rm.vllm.weights import WEIGHTS, TrainedWeights
from tests.rm.vllm.test_client import talker

parent = Path(sys.argv[1])
distributed.init_process_group(timeout_s=60, for_deepspeed=False)
me = distributed.rank()
weights = TrainedWeights(talker(), str(parent))
out = {"folder": str(weights.folder)}

def load():
    out["seen"] = [str(path) for path in parent.rglob(WEIGHTS)]

weights.hand_over(load)
distributed.barrier()
out["after"] = [str(path) for path in parent.rglob(WEIGHTS)]
# The next hand-over writes the file again.
distributed.barrier()

def fail():
    if me == 1:
        raise RuntimeError("this GPU is full")

try:
    weights.hand_over(fail)
except RuntimeError as error:
    out["error"] = str(error)
distributed.barrier()
(parent / f"{me}.json").write_text(json.dumps(out))
distributed.shutdown()
"""


@pytest.mark.slow
def test_ranks_of_a_node_share_a_file_that_is_deleted_after_loading(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    parent = tmp_path / "private"
    parent.mkdir()
    torchrun(2, str(script), str(parent))
    first, second = (
        json.loads((parent / f"{rank}.json").read_text()) for rank in range(2)
    )
    assert first["folder"] == second["folder"]
    assert first["seen"] == second["seen"] == [f"{first['folder']}/model.safetensors"]
    assert first["after"] == second["after"] == []
    assert second["error"] == "this GPU is full"
    assert first["error"] == "on rank 1: this GPU is full"
    # Both processes have ended, and the folder with them.
    assert not Path(first["folder"]).exists()
