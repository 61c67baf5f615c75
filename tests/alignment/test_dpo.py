"""The DPO loop on the fakes, where every error can be computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alignment.config import DpoConfig
from alignment.dpo import DpoLoop, backwards_per_update, draw_sigma, steps_of, summarise
from alignment.pair_store import LatentPair, PairSet, write_pairs
from common import distributed
from common.distributed import seeded_generator
from engine.config import EmaConfig
from engine.ema import Ema
from launch.training.dpo_loop import evaluate_average
from tests.fakes import SHAPE, FakeGenerator, PlainEngine

PAIRS = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    """Chosen videos are bright (mean 0.6), rejected ones dark (mean -0.6)."""
    folder = tmp_path_factory.mktemp("pairs")

    def made():
        for i in range(PAIRS):
            draw = seeded_generator("pair", i)
            noise = 0.3 * torch.randn((2, *SHAPE), generator=draw)
            yield LatentPair(
                f"prompt {i % 3}",
                noise[0] + 0.6,
                noise[1] - 0.6,
                torch.ones(2, 4),
                i / 4,
                -i / 4,
            )

    write_pairs(folder, made(), per_shard=3, dtype=torch.float32, about={})
    return PairSet(folder)


def loop_of(
    pairs: PairSet,
    *,
    lr: float = 1e-2,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> DpoLoop:
    cfg = DpoConfig(**{"pairs_per_step": 4, "micro_batch": 2, "beta": 5.0, **options})
    generator = FakeGenerator(dtype=dtype)
    engine = PlainEngine(
        generator.module, accumulation=backwards_per_update(cfg, 1), lr=lr
    )
    return DpoLoop(
        cfg,
        generator=generator,
        engine=engine,
        pairs=pairs,
        seed=3,
        grad_norm=engine.grad_norm,
    )


@pytest.mark.parametrize("schedule", ["constant", "quadratic"])
def test_first_dpo_loss_is_log_2(pairs: PairSet, schedule: str) -> None:
    metrics = loop_of(pairs, beta_schedule=schedule, beta=500.0).step(0)
    assert metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["train/accuracy"] == 0.5
    assert metrics["train/chosen_change"] == metrics["train/rejected_change"] == 0.0
    assert metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_evaluated_and_the_weights_come_back(
    pairs: PairSet, dtype: torch.dtype
) -> None:
    """d_1 = 2 / 11: after an update the average is 2 / 11 of the first weights."""
    loop = loop_of(pairs, dtype=dtype)
    module = loop.generator.module
    weights = dict(module.named_parameters())
    first = {name: p.detach().clone().float() for name, p in weights.items()}
    ema = Ema(EmaConfig(decay=0.9), module)
    loop.step(0)
    ema.update()
    last = {name: p.detach().clone() for name, p in weights.items()}

    found = evaluate_average(loop, ema, pairs, limit=PAIRS)
    for name, parameter in weights.items():
        assert torch.equal(parameter, last[name]), name
    of_last = evaluate_average(loop, None, pairs, limit=PAIRS)
    assert of_last == loop.evaluate(pairs, limit=PAIRS)

    with torch.no_grad():
        for name, parameter in weights.items():
            average = 2 / 11 * first[name] + 9 / 11 * last[name].float()
            parameter.copy_(average)
    by_hand = loop.evaluate(pairs, limit=PAIRS)
    assert found == pytest.approx(by_hand, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert abs(found["heldout/loss"] - of_last["heldout/loss"]) > 1e-4


def test_chosen_error_falls_and_rejected_error_rises(pairs: PairSet) -> None:
    loop = loop_of(pairs)
    history = [loop.step(step) for step in range(30)]
    last = history[-1]
    assert last["train/loss"] < 0.5
    assert last["train/accuracy"] == 1.0
    assert last["train/chosen_change"] < 0 < last["train/rejected_change"]
    # the policy is pulled to bright videos: v = eps - x_0, so the velocity's bias falls
    assert bool((loop.generator.module.bias_C < 0).all())


def test_dpo_gradient_equals_the_formula(pairs: PairSet) -> None:
    """The update equals that of separate pairs in fp64, with draws from the same seeds."""
    options = {"dtype": torch.float64, "sft_weight": 0.25}
    loop = loop_of(pairs, lr=0.0, **options)
    loop.step(0)
    other = FakeGenerator(dtype=torch.float64)
    total = 0.0
    for place, i in enumerate(loop.schedule.at(0)):
        batch = pairs.read([i])
        source = seeded_generator(3, "dpo", "step", 0, place)
        sigma = float(torch.tensor(draw_sigma(loop.cfg, source), dtype=torch.float32))
        noise = torch.randn(SHAPE, generator=source).double()
        errors = []
        for adapter_on in (True, False):
            other.module.adapter_on = adapter_on
            for clean in (
                batch.chosen_NCFHW[0].double(),
                batch.rejected_NCFHW[0].double(),
            ):
                x = (1 - sigma) * clean + sigma * noise
                errors.append(
                    (other.module(x[None], sigma)[0] - (noise - clean)).square().mean()
                )
        chosen, rejected, ref_chosen, ref_rejected = errors
        gap = (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())
        total = total + F.softplus(2.5 * gap) / 4 + 0.25 * chosen / 4
    total.backward()
    own = [p for p in other.module.parameters() if p.requires_grad]
    for mine, theirs in zip(loop.engine.last_gradient, own, strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-9, atol=1e-12)


def test_micro_batches_and_ranks_do_not_change_the_gradient(
    pairs: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop_of(pairs, lr=0.0, micro_batch=4, dtype=torch.float64)
    want = whole.step(2)
    halves = loop_of(pairs, lr=0.0, micro_batch=1, dtype=torch.float64)
    got = halves.step(2)
    assert got == pytest.approx(want, rel=1e-9, nan_ok=True)
    for mine, theirs in zip(
        halves.engine.last_gradient, whole.engine.last_gradient, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)
    # each of two ranks does its half; the mean of their gradients is the whole's
    gradients = []
    for me in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda me=me: me)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "gather_objects", lambda rows: [rows] * 2)
        one = loop_of(pairs, lr=0.0, micro_batch=2, dtype=torch.float64)
        one.backwards = 1
        one.engine.accumulation = 1
        one.step(2)
        gradients.append(one.engine.last_gradient)
    for a, b, want in zip(*gradients, whole.engine.last_gradient, strict=True):
        torch.testing.assert_close((a + b) / 2, want, rtol=1e-9, atol=1e-15)


def test_dpo_step_takes_two_forwards_and_sft_one(
    pairs: PairSet,
) -> None:
    loop = loop_of(pairs)
    loop.step(0)
    assert [len(asked) for asked in loop.generator.asked] == [
        4,
        4,
    ] * 2  # 2 pairs x 2 videos, with and without adapter
    assert all(asked[:2] == asked[2:] for asked in loop.generator.asked)
    assert loop.generator.grad_forwards == 4 * 2
    assert loop.generator.known == set()  # embeddings are not piled up
    loop = loop_of(pairs, method="sft")
    loop.step(0)
    assert [len(asked) for asked in loop.generator.asked] == [
        2,
        2,
    ]  # the chosen videos alone, no reference


def test_sft_and_rwr_losses_are_weighted_flow_errors(pairs: PairSet) -> None:
    sft, rwr = (
        loop_of(pairs, method="sft", lr=0.0),
        loop_of(pairs, method="rwr", temperature=2.0, lr=0.0),
    )
    indices = sft.schedule.at(0)
    errors = []
    for place, i in enumerate(indices):
        batch = pairs.read([i])
        draw = sft.draw(batch, "step", 0, [place])
        with torch.no_grad():
            errors.append(torch.cat(sft.errors(batch, draw)))
    error_N2 = torch.stack(errors)
    assert sft.step(0)["train/loss"] == pytest.approx(
        float(error_N2[:, 0].mean()), rel=1e-6
    )
    # values +-i / 4 at temperature 2: weights e^(+-i / 8) over their mean
    everything = [math.exp(sign * i / 8) for i in range(PAIRS) for sign in (1, -1)]
    mean = sum(everything) / len(everything)
    weight_N2 = torch.tensor(
        [[math.exp(i / 8) / mean, math.exp(-i / 8) / mean] for i in indices]
    )
    assert rwr.step(0)["train/loss"] == pytest.approx(
        float((weight_N2 * error_N2).mean()), rel=1e-6
    )
    assert "train/accuracy" not in rwr.step(1)  # which takes a reference


@pytest.mark.parametrize("method", ["sft", "rwr"])
def test_sft_and_rwr_lower_the_chosen_error(pairs: PairSet, method: str) -> None:
    loop = loop_of(pairs, method=method)
    first = loop.evaluate(pairs, limit=PAIRS)
    for step in range(30):
        loop.step(step)
    last = loop.evaluate(pairs, limit=PAIRS)
    assert first["heldout/chosen_change"] == 0.0
    assert last["heldout/chosen_change"] < -1e-3


def test_evaluate_is_the_same_every_time(pairs: PairSet) -> None:
    loop = loop_of(pairs, micro_batch=2)
    first = loop.evaluate(pairs, limit=7)
    assert first == loop.evaluate(pairs, limit=7)
    assert first["heldout/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first == pytest.approx(
        loop_of(pairs, micro_batch=4).evaluate(pairs, limit=7), rel=1e-5
    )
    still = loop_of(pairs, method="sft", lr=0.0)
    with torch.no_grad():
        still.generator.module.bias_C += 0.1
    before = still.evaluate(pairs, limit=7)
    still.step(0)
    assert still.evaluate(pairs, limit=7) == before
    assert (
        still.evaluate(pairs, limit=6)["heldout/chosen_change"]
        != before["heldout/chosen_change"]
    )
    for step in range(20):
        loop.step(step)
    assert loop.evaluate(pairs, limit=7)["heldout/accuracy"] == 1.0


def test_summarise_by_hand() -> None:
    cfg = DpoConfig(beta=4.0)
    rows = torch.tensor(
        [
            [0.1, 1.0, -0.5, 0.5],
            [0.19, 3.0, 0.5, -0.5],
            [0.2, 5.0, 0.25, 0.25],
            [1.0, 7.0, -1.0, 0.0],
        ]
    )
    found = summarise(rows, cfg, "train")
    assert found["train/loss"] == 4.0
    assert found["train/accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["train/chosen_change"] == pytest.approx(-0.75 / 4)
    assert found["train/dpo_logit_abs"] == pytest.approx(2 * (1 + 1 + 0 + 1) / 4)
    assert (found["train/loss_sigma_0-0.2"], found["train/loss_sigma_0.2-0.4"]) == (
        2.0,
        5.0,
    )
    assert found["train/loss_sigma_0.8-1"] == 7.0
    assert found["train/accuracy_sigma_0-0.2"] == 0.5
    assert "train/loss_sigma_0.4-0.6" not in found


def test_draw_sigma_has_the_distribution_of_the_config() -> None:
    def draws(**options: Any) -> torch.Tensor:
        cfg = DpoConfig(**options)
        return torch.tensor(
            [draw_sigma(cfg, seeded_generator("draw", i)) for i in range(4000)],
            dtype=torch.float64,
        )

    uniform = draws()
    assert float(uniform.min()) > 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(
        0.5, abs=0.015
    )  # 0.289 / sqrt(4000) = 0.0046
    assert float(uniform.std()) == pytest.approx(1 / math.sqrt(12), abs=0.01)
    assert torch.allclose(draws(noise_shift=3.0), 3 * uniform / (1 + 2 * uniform))
    logit = draws(noise="logit_normal").logit()
    assert float(logit.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.04)


def test_pairs_per_step_must_divide_over_ranks(pairs: PairSet) -> None:
    cfg = DpoConfig(pairs_per_step=64, micro_batch=4)
    assert (backwards_per_update(cfg, 1), backwards_per_update(cfg, 8)) == (16, 2)
    with pytest.raises(ValueError, match="micro_batch=4"):
        backwards_per_update(cfg, 3)
    assert steps_of(DpoConfig(pairs_per_step=64, epochs=2.5), 100) == 3
    assert steps_of(DpoConfig(pairs_per_step=64), 10) == 1


def test_rwr_without_values_raises(tmp_path: Path) -> None:
    one = torch.ones(SHAPE)
    write_pairs(
        tmp_path,
        iter([LatentPair("a", one, -one, torch.ones(1, 2))] * 4),
        per_shard=4,
        dtype=one.dtype,
        about={},
    )
    with pytest.raises(ValueError, match=r"\b8\b"):
        loop_of(PairSet(tmp_path), method="rwr")


def test_non_finite_loss_is_reported(
    pairs: PairSet, capsys: pytest.CaptureFixture
) -> None:
    loop = loop_of(pairs)
    with torch.no_grad():
        loop.generator.module.bias_C.fill_(math.nan)
    assert math.isnan(loop.step(0)["train/loss"])
    assert "nan" in capsys.readouterr().out
