"""One thread per process, no network, a fixed seed: the same numbers on every machine."""

from __future__ import annotations

import os
from pathlib import Path

# before torch is imported anywhere, and inherited by the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
import yaml

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow, long = (
        {one.path for one in items if one.get_closest_marker(mark)}
        for mark in ("slow", "long")
    )
    items.sort(key=lambda item: (item.path not in long, item.path not in slow))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a GRPO run on a random Wan: 4 prompts, 2 members each, brightness as reward."""
    from tests.tiny import build_tiny_wan

    root = tmp_path_factory.mktemp("grpo")
    build_tiny_wan(root / "wan")
    (root / "prompts.txt").write_text(
        "a red circle\na blue square\ntwo cats\nrain\nsnow\n"
    )
    values = {
        "run_dir": str(root / "run"),
        "prompts": str(root / "prompts.txt"),
        "prompts_per_step": 4,
        "steps": 4,
        "save_every": 1,
        "keep": 4,
        "video_every": 2,
        "video_groups": 1,
        "generator": {
            "path": str(root / "wan"),
            "height": 16,
            "width": 16,
            "num_frames": 9,
            "fps": 8.0,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "decode_batch": 8,
            "max_sequence_length": 24,
            "lora": {"rank": 4, "alpha": 8.0},
            "sampler": {"num_steps": 6, "stochastic_range": 3, "guidance_scale": 3.0},
        },
        "grpo": {"group_size": 2},
        "rewards": {"brightness": {}},
        "optimizer": {"lr": 1e-3, "warmup_steps": 3},
        # a diagnosis samples and scores again, and tests count calls
        "diagnosis": None,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    return root / "run.yaml"


@pytest.fixture(scope="module")
def dpo_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a DPO run on ten random pairs: four pairs a step, three steps."""
    from alignment.pair_store import LatentPair, write_pairs
    from common.config import load
    from common.distributed import seeded_generator
    from launch.compose import build_generator
    from launch.schemas.pairs import DpoRun
    from tests.launch.test_pairs import GENERATOR
    from tests.tiny import build_tiny_wan

    root = tmp_path_factory.mktemp("dpo")
    build_tiny_wan(root / "wan")
    overrides = [f"generator.path={root / 'wan'}", "run_dir=x", "pairs=x"]
    generator = build_generator(load(DpoRun, None, overrides).generator)

    for name, count in (("pairs", 10), ("heldout", 5)):
        pairs = []
        for i in range(count):
            chosen, rejected = torch.randn(
                (2, 16, 3, 2, 2), generator=seeded_generator(name, i)
            )
            prompt = ["a red circle", "rain"][i % 2]
            rows = generator.prompts.rows_of(prompt)
            pairs.append(
                LatentPair(prompt, chosen, rejected, rows, float(i), -float(i))
            )
        write_pairs(
            root / name, iter(pairs), per_shard=4, dtype=torch.float32, about={}
        )

    values = {
        "run_dir": str(root / "run"),
        "pairs": str(root / "pairs"),
        "heldout": str(root / "heldout"),
        "generator": {"path": str(root / "wan"), **GENERATOR},
        "dpo": {"pairs_per_step": 4, "micro_batch": 2, "epochs": 1.3, "beta": 50.0},
        "optimizer": {"lr": 1e-3},
        "save_every": 1,
        "keep": 3,
        "heldout_pairs": 5,
    }
    (root / "dpo.yaml").write_text(yaml.safe_dump(values))
    return root / "dpo.yaml"
