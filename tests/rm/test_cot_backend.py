"""The built-in backend, and what stage 2 asks of any backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import ConfigError, load
from launch.schemas.training import DualRlRun
from rm.config import Generation
from rm.cot_backend import BuiltinBackend
from rm.cot_rollout import encode_pairs
from rm.generate import generate
from tests.rm.test_dual_rl import G, build, collect, pairs

__all__ = ["pairs"]  # a fixture
SAMPLED = Generation(max_new_tokens=12, temperature=2.0, repetition_penalty=1.0)
YAML = Path(__file__).parents[2] / "configs" / "shapes" / "dual_rl.yaml"


class Diary(BuiltinBackend):
    """Notes what it is asked."""

    def __init__(self, model, **options) -> None:
        super().__init__(model, **options)
        self.notes: list[tuple] = []

    def sync(self, version: int) -> None:
        weights = [p.double().sum().item() for p in self.model.parameters()]
        self.notes.append(("sync", version, sum(weights)))

    def write(self, encoded, videos, how, **options):
        note = ("write", options["version"], len(encoded), options["copies"])
        self.notes.append(note)
        assert not self.model.training
        return super().write(encoded, videos, how, **options)

    def rest(self) -> None:
        self.notes.append(("rest",))


def test_builtin_cots_are_those_of_generate_for_any_batch(pairs):
    model = build(pairs).model
    videos, encoded = encode_pairs(model, pairs)
    batch = model.batch(encoded, videos, query=False)
    written = generate(model, batch, SAMPLED, seeds=range(24), copies=3)
    want = [written.cot(row) for row in range(24)]
    assert written.finished_B.any()
    assert not written.finished_B.all()
    assert len({cot.ids for cot in want}) > 12
    for size in (1, 3, 8):
        found = BuiltinBackend(model, batch=size).write(
            encoded, videos, SAMPLED, version=9, seeds=range(24), copies=3
        )
        assert [len(group) for group in found] == [3] * 8
        assert [cot for group in found for cot in group] == want
    with pytest.raises(ValueError, match="batch=0"):
        BuiltinBackend(model, batch=0)


def test_step_syncs_writes_all_cots_together_and_lets_the_backend_rest(pairs):
    loop = build(pairs, pairs_per_update=2, micro_batch=1)
    loop.backend = diary = Diary(loop.model, batch=2)
    loop.step(0)
    loop.step(1)
    # Two updates a step, and two videos of each of four pairs.
    assert [note[:2] for note in diary.notes] == [
        ("sync", 0),
        ("write", 0),
        ("rest",),
        ("sync", 2),
        ("write", 2),
        ("rest",),
    ]
    written = [note[2:] for note in diary.notes if note[0] == "write"]
    assert written == [(8, G)] * 2
    before, after = (note[2] for note in diary.notes if note[0] == "sync")
    assert before != after


def test_micro_batches_get_the_cots_of_their_own_pairs(pairs):
    loop = build(pairs, pairs_per_update=2, micro_batch=1)
    sampled = loop.sample([2, 0, 3], 5)
    for row, part in zip([2, 0, 3], sampled.parts(1), strict=True):
        alone = loop.sample([row], 5)
        assert part.pairs == [pairs[row]]
        assert part.encoded == alone.encoded
        assert part.cots == alone.cots


def test_ratio_is_1_for_cots_from_another_distribution(pairs):
    """CoTs sampled at another temperature: log-probabilities are still the trained model's."""

    class Hot(BuiltinBackend):
        def write(self, encoded, videos, how, **options):
            how = replace(how, temperature=2.0)
            return super().write(encoded, videos, how, **options)

    loop = build(pairs, pairs_per_update=2, micro_batch=2)
    cool = collect(loop, [0, 1], step=0)
    loop.backend = Hot(loop.model, batch=4)
    rollouts = collect(loop, [0, 1], step=0)
    assert not torch.equal(rollouts.packed.batch.ids_BL, cool.packed.batch.ids_BL)
    with torch.no_grad():
        assert torch.equal(
            rollouts.old_BGT, loop.log_probs(loop.model, rollouts.packed)
        )
    assert loop.update([rollouts])["train/ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_settings_of_vllm_are_checked_with_the_config():
    assert load(DualRlRun, YAML).dual_rl.engine == "builtin"
    vllm = ["dual_rl.engine=vllm", "vllm.python=p"]
    found = load(DualRlRun, YAML, [*vllm, "vllm.env.A=b", "vllm.engine_args.x=1"])
    assert (found.vllm.python, found.vllm.env, found.vllm.engine_args) == (
        "p",
        {"A": "b"},
        {"x": 1},
    )
    for overrides, message in (
        (["dual_rl.engine=vllm"], r"vllm\.python"),
        ([*vllm, "zero_stage=3"], "zero_stage"),
        ([*vllm, "vllm.gpu_memory=1.5"], "gpu_memory"),
        ([*vllm, "vllm.gpu_memroy=0.5"], "gpu_memory"),
        ([*vllm, "vllm.max_model_len=0"], "max_model_len"),
        ([*vllm, "vllm.timeout_s=0"], "timeout_s"),
        (["dual_rl.engine=hf"], "engine"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(DualRlRun, YAML, overrides)


def test_cot_batch_changes_no_token_and_halves_when_memory_runs_out(pairs, monkeypatch):
    """Eight videos in batches of 2, of 3, and of 8 that only fit by twos."""
    want = build(pairs, micro_batch=1).sample([0, 1, 2, 3], 0).cots
    loop = build(pairs, micro_batch=1, cot_batch=3)
    assert loop.sample([0, 1, 2, 3], 0).cots == want

    loop = build(pairs, micro_batch=1, cot_batch=8)
    sizes = []

    def small_memory(size: int) -> None:
        sizes.append(size)
        if size > 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr("common.faults.memory", small_memory)
    assert loop.sample([0, 1, 2, 3], 0).cots == want
    assert sizes == [8, 4, 2, 2, 2, 2]
    # ranks that share the weights make the same number of calls
    monkeypatch.setattr(loop.model, "sharded", True, raising=False)
    loop.backend.portions.size = 8
    with pytest.raises(torch.OutOfMemoryError):
        loop.sample([0, 1, 2, 3], 0)
