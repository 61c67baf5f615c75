"""GRPO runs with forward objectives: what is refused, what it costs, and resuming bit by bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import ConfigError, load
from generator.config import SamplerConfig
from generator.experts import check_stochastic_steps
from generator.family import Family
from launch.compose import check_family
from launch.planning.forwards import forwards_per_update, samples_per_rollout
from launch.schemas.training import GrpoRun
from launch.training.grpo_loop import levels_of
from launch.training.grpo_outputs import evaluate_heldout
from tests.fakes import FunctionReward
from tests.launch.processes import ROOT
from tests.launch.test_grpo import adapter_of, alone, numbers

BASE = ("run_dir=x", "prompts=x", "generator.path=org/wan", "rewards.brightness={}")
SOLVER = (
    "generator.sampler.stochastic=none",
    "generator.sampler.initial_noise=member",
)
NFT = (
    *SOLVER,
    "generator.sampler.guidance_scale=1",
    "grpo.objective=nft",
    "grpo.advantage_clip=5",
)
DGPO = ("grpo.objective=dgpo", "grpo.forward.micro_batch=8")
SHAPES = ROOT / "configs" / "shapes" / "grpo_oracle.yaml"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        # the policy gradient needs a density, the others a solver and independent members
        (SOLVER, "stochastic=none"),
        (["generator.sampler.stochastic=none"], "initial_noise=member"),
        (["grpo.objective=nft", "grpo.advantage_clip=5"], "stochastic=none"),
        # rollout, update and evaluation are one model
        (
            [
                *NFT,
                "generator.sampler.guidance_scale=4.5",
                "generator.guidance_in_update=false",
            ],
            "guidance_in_update",
        ),
        ([*NFT, "generator.sampler.tail_guidance=3"], "tail_guidance"),
        ([*NFT, "grpo.forward.timesteps_per_sample=16"], "timesteps_per_sample"),
        # flow matching is wrong for a base of few steps
        (
            [*NFT, "generator.sampler.tail_steps=4", "generator.path=a/FastWan2.1-T2V"],
            "allow_distilled",
        ),
    ],
)
def test_sampler_that_does_not_fit_the_objective_is_refused(
    words: list[str], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        load(GrpoRun, None, [*BASE, *words])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["generator.sampler.guidance_scale=4.5", "grpo.forward.micro_batch=2"],
        ["generator.path=a/FastWan2.1-T2V"],
        ["generator.path=turbo/wan", "generator.sampler.tail_steps=4"],
        [
            "generator.path=a/FastWan2.1-T2V",
            "generator.sampler.tail_steps=4",
            "grpo.forward.allow_distilled=true",
        ],
    ],
)
def test_sampler_that_fits_the_objective_is_accepted(words: list[str]) -> None:
    load(GrpoRun, None, [*BASE, *NFT, *words])


def test_trained_levels_are_those_of_the_rollouts_grid() -> None:
    """Shift 3: sigma = 3 u / (1 + 2 u), u = 1, 3/4, 1/2; the last step of 4 is left out."""
    cfg = load(GrpoRun, None, [*BASE, *NFT, "generator.sampler.tail_steps=4"])
    assert levels_of(cfg) == pytest.approx([1.0, 0.9, 0.75])


@pytest.mark.parametrize(
    ("words", "forwards"),
    [
        # per group of 8: 8 [T_r + n (3 + o + l)]
        (["generator.sampler.num_steps=8", "A", "old"], 96),
        (["generator.sampler.tail_steps=4", "A", "old"], 64),
        (["generator.sampler.tail_steps=4", "A"], 56),
        (["generator.sampler.tail_steps=4", "grpo.forward.timesteps_per_sample=2", "A", "old"], 96),
        (["grpo.forward.timesteps_per_sample=7", "old"], 344),
        # l = 1 without a KL term as well: 8 [4 + 2 (3 + 1)]
        (["generator.sampler.tail_steps=4", "grpo.forward.timesteps_per_sample=2", *DGPO, "A"], 96),
        (["generator.sampler.tail_steps=4", "grpo.forward.timesteps_per_sample=2", *DGPO], 96),
    ],
)  # fmt: skip
def test_forwards_of_a_group_by_hand(words: list[str], forwards: int) -> None:
    """T_r steps, n levels; o = 1 for an old policy of its own, l = 1 with KL."""
    short = {
        "A": "grpo.kl_weight=0",
        "old": "grpo.forward.old_policy.max_decay=0.5",
    }
    cfg = load(GrpoRun, SHAPES, [*NFT, *(short.get(word, word) for word in words)])
    rollout = samples_per_rollout(cfg.generator.sampler, 8)
    assert rollout + forwards_per_update(cfg) == forwards


def test_forwards_of_the_recipes_by_hand() -> None:
    """Longcat: 46.5 + 4 of 8 members, 107 + 8 guided of 4; a further update is 4 more."""
    cfg = load(GrpoRun, SHAPES)
    assert samples_per_rollout(cfg.generator.sampler, 8) == 46.5
    assert forwards_per_update(cfg) == 4
    words = ["rewards.descore={}", "generator.sampler.tail_steps=null"]
    wan = load(GrpoRun, ROOT / "configs" / "wan" / "grpo.yaml", words)
    assert samples_per_rollout(wan.generator.sampler, 4) == 107
    assert forwards_per_update(wan) == 8
    twice = load(GrpoRun, SHAPES, ["grpo.updates=2", "grpo.divergence_clip=1e-5"])
    assert forwards_per_update(twice) == 8
    words = [
        "generator.sampler.guidance_scale=4.5",
        "generator.guidance_in_update=false",
    ]
    assert forwards_per_update(load(GrpoRun, SHAPES, words)) == 4


def test_flow_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(GrpoRun, None, [*BASE, *NFT])
    monkeypatch.setattr("generator.wan_folder.find_wan", lambda _: Path("wan"))
    monkeypatch.setattr(Family, "of", lambda _: Family(flow_map=True))
    with pytest.raises(ValueError, match="flow map"):
        check_family(cfg, stochastic=True, objective="nft")
    check_family(cfg, stochastic=True, objective="policy")


def test_model_with_two_transformers_needs_a_stochastic_step() -> None:
    cfg = load(GrpoRun, None, [*BASE, *NFT]).generator
    with pytest.raises(ValueError, match="two transformers"):
        check_stochastic_steps(cfg, Family(("transformer", "transformer_2"), 0.875))
    check_stochastic_steps(cfg, Family())


def test_solver_needs_members_of_their_own_noise() -> None:
    with pytest.raises(ValueError, match="initial_noise=member"):
        SamplerConfig(stochastic="none")


GUIDED = "evaluation.usual_guidance=4.5"
MEASURED = "evaluation.prompts=x"


@pytest.mark.parametrize(
    ("words", "scale"),
    [
        ([], None),
        ([MEASURED], None),
        ([MEASURED, GUIDED], 4.5),
        # guided as users do: one evaluation
        ([MEASURED, GUIDED, "generator.sampler.guidance_scale=4.5"], None),
    ],
)
def test_usual_guidance_is_evaluated_where_it_is_another(
    words: list[str], scale: float | None
) -> None:
    assert load(GrpoRun, None, [*BASE, *NFT, *words]).other_guidance == scale


def test_usual_guidance_is_refused_where_there_is_no_single_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*BASE, *NFT, MEASURED, GUIDED]
    with pytest.raises(ConfigError, match="guidance_scale_2"):
        load(GrpoRun, None, [*words, "generator.sampler.guidance_scale_2=3"])
    with pytest.raises(ConfigError, match="usual_guidance"):
        load(
            GrpoRun, None, [*words, "generator.target=examples/own_generator.py:build"]
        )
    # a flow map is guided by its weights
    cfg = load(GrpoRun, None, words)
    monkeypatch.setattr("generator.wan_folder.find_wan", lambda _: Path("wan"))
    monkeypatch.setattr(Family, "of", lambda _: Family(flow_map=True))
    with pytest.raises(ValueError, match="usual_guidance"):
        check_family(cfg, stochastic=True, objective="policy")


class Guided:
    """A generator whose videos are as bright as ten times their guidance."""

    cfg = SimpleNamespace(context_parallel=1, target="own", fps=8.0)
    sharded = False

    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        scheduler: str,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        assert scheduler == "euler"
        return torch.full((len(prompts), 2, 1, 1, 3), 10 * guidance_scale)

    def decode(self, clean: torch.Tensor) -> torch.Tensor:
        return clean.to(torch.uint8)


def test_evaluation_at_both_guidances(tmp_path: Path) -> None:
    """Both in metrics: 10 at the guidance that is trained, 45 at the usual one."""
    mean = FunctionReward("grey", lambda video, _: float(video.float().mean()))
    loop = SimpleNamespace(generator=Guided(), rewards={"grey": mean})
    words = [*BASE[1:], *NFT, MEASURED, f"run_dir={tmp_path}", "evaluation.videos=0"]
    found = []
    for more in ([], [GUIDED]):
        run = load(GrpoRun, None, [*words, *more])
        found.append(evaluate_heldout(run, loop, None, ["a", "b"], 0))
    assert found == [{"eval/grey": 10.0}, {"eval/grey": 10.0, "eval_usual/grey": 45.0}]


@pytest.mark.long
def test_resumed_nft_run_equals_the_whole_run(tiny: Path) -> None:
    """Two steps, and one with one more from its checkpoint: weights, old policy and metrics."""
    words = [*NFT, "grpo.forward.micro_batch=2", "grpo.scale=batch"]
    words += ["grpo.forward.old_policy={ramp_rate: 0.2, max_decay: 0.5}"]
    whole, parts = tiny.parent / "whole_nft", tiny.parent / "parts_nft"
    alone(tiny, *words, f"run_dir={whole}", "steps=2", "video_every=0")
    alone(tiny, *words, f"run_dir={parts}", "steps=1", "video_every=0")
    alone(tiny, *words, f"run_dir={parts}", "steps=2", "video_every=0")
    # 4 prompts x 2 members: six Euler steps; per latent 3 and one each for KL and the old policy
    assert numbers(whole)[0]["forwards/grad"] == 8
    same = [
        {k: v for k, v in row.items() if k.startswith(("train/", "reward/"))}
        for row in (numbers(whole)[1], numbers(parts)[1])
    ]
    assert same[0] == same[1]
    assert same[0]["train/old_distance"] > 0.0
    a, b = adapter_of(whole), adapter_of(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    from common.checkpoint import load_tensors

    place = Path("checkpoints", "step-000002", "old_policy.safetensors")
    old = [load_tensors(folder / place) for folder in (whole, parts)]
    assert all(torch.equal(old[0][name], old[1][name]) for name in old[0])
