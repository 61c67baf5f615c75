"""The engine that is always there, and what stage 2 asks of any engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import ConfigError, load
from launch.schemas.training import DualRlRun
from rm.config import Generation
from rm.cot_backend import HfBackend
from rm.cot_rollout import encode_pairs
from rm.data import Pair
from rm.generate import generate
from tests.rm.test_dual_rl import G, build
from tests.tiny_qwen import SETTINGS

SAMPLED = Generation(max_new_tokens=12, temperature=2.0, repetition_penalty=1.0)
YAML = Path(__file__).parents[2] / "configs" / "shapes" / "dual_rl.yaml"


@pytest.fixture(scope="module")
def pairs(dual_rl_pairs) -> list[Pair]:
    return dual_rl_pairs


class Diary(HfBackend):
    """Notes what it is asked."""

    def __init__(self, model, **options) -> None:
        super().__init__(model, **options)
        self.notes: list[tuple] = []

    def sync(self, version: int) -> None:
        self.notes.append(
            (
                "sync",
                version,
                sum(p.double().sum().item() for p in self.model.parameters()),
            )
        )

    def write(self, encoded, videos, how, **options):
        self.notes.append(
            ("write", options["version"], len(encoded), options["copies"])
        )
        assert not self.model.training
        return super().write(encoded, videos, how, **options)

    def rest(self) -> None:
        self.notes.append(("rest",))


def test_backend_cots_equal_generate_for_any_batch(pairs):
    model = build(pairs).model
    loop = build(pairs)
    videos, encoded = encode_pairs(loop.model, pairs)
    written = generate(
        model,
        model.batch(encoded, videos, query=False),
        SAMPLED,
        seeds=range(24),
        copies=3,
    )
    want = [tuple(written.ids(row)) for row in range(24)]
    assert written.finished_B.any()
    assert not written.finished_B.all()
    assert len(set(want)) > 12
    for batch in (1, 3, 8):
        found = HfBackend(model, batch=batch).write(
            encoded, videos, SAMPLED, version=9, seeds=range(24), copies=3
        )
        assert [len(group) for group in found] == [3] * 8
        assert [chain.ids for group in found for chain in group] == want
        assert [
            chain.finished for group in found for chain in group
        ] == written.finished_B.tolist()
    with pytest.raises(ValueError, match="batch=0"):
        HfBackend(model, batch=0)


def test_step_syncs_generates_and_frees_backend(pairs):
    loop = build(pairs, pairs_per_update=2, micro_batch=1)
    loop.writer = diary = Diary(loop.model, batch=2)
    loop.step(0)
    loop.step(1)
    assert [note[:2] for note in diary.notes] == [
        ("sync", 0),
        ("write", 0),
        ("rest",),
        ("sync", 2),
        ("write", 2),
        ("rest",),
    ]
    assert [note[2:] for note in diary.notes if note[0] == "write"] == [
        (8, G)
    ] * 2  # two videos of four pairs
    before, after = (note[2] for note in diary.notes if note[0] == "sync")
    assert before != after


def test_ratios_use_the_trained_model_for_any_backend(pairs):
    """CoTs sampled at a high temperature give the same log-probs and first ratio."""

    class Hot(HfBackend):
        def write(self, encoded, videos, how, **options):
            return super().write(encoded, videos, SAMPLED, **options)

    loop = build(pairs, pairs_per_update=2, micro_batch=2)
    loop.writer = Hot(loop.model, batch=4)
    rollouts = loop.collect([0, 1], step=0)
    with torch.no_grad():
        assert torch.equal(
            rollouts.old_BGT, loop.log_probs(loop.model, rollouts.packed)
        )
    assert loop.update([rollouts])["train/ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_cot_backend_settings_are_checked():
    assert load(DualRlRun, YAML).cot_backend.kind == "hf"
    found = load(
        DualRlRun,
        YAML,
        [
            "cot_backend.kind=vllm",
            "cot_backend.python=p",
            "cot_backend.env.A=b",
            "cot_backend.engine_args.x=1",
        ],
    )
    assert (
        found.cot_backend.python,
        found.cot_backend.env,
        found.cot_backend.engine_args,
    ) == (
        "p",
        {"A": "b"},
        {"x": 1},
    )
    for override, message in (
        ("cot_backend.kind=vllm", "python"),
        ("cot_backend.gpu_memory=1.5", "gpu_memory"),
        ("cot_backend.gpu_memroy=0.5", "gpu_memory"),
        ("cot_backend.max_model_len=0", "max_model_len"),
        ("cot_backend.timeout_s=0", "timeout_s"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(DualRlRun, YAML, [override])
    assert (
        SETTINGS.merge_size == SETTINGS.temporal_patch_size
    )  # what the tests of the other engine stand on
