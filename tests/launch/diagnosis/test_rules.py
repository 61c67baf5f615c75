"""Rules over hand-made runs: what they name, and that a sound run is not accused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from common.config import load
from common.run_record import plain
from launch import diagnose as command
from launch.diagnosis.certificate import rewards_of
from launch.diagnosis.certificates import certificate_of
from launch.diagnosis.evidence import Evidence
from launch.diagnosis.metric_rules import trend
from launch.diagnosis.rules import diagnose
from launch.diagnosis.run_files import read_run
from launch.schemas.training import GrpoRun

SETTINGS: dict[str, Any] = {
    "steps": 100,
    "prompts_per_step": 8,
    "generator": {
        "path": "none/here",
        "fps": 16.0,
        "dtype": "float32",
        "lora": {"rank": 4},
        "guidance_in_update": True,
        "sampler": {"shift": 3.0, "guidance_scale": 4.5, "initial_noise": "shared"},
    },
    "grpo": {"group_size": 4, "kl_weight": 1e-3, "updates": 1, "advantage_eps": 1e-4},
    "rewards": {"descore": {"weight": 1.0}, "look": {"weight": 0}},
    "optimizer": {"lr": 1e-4, "warmup_steps": 0},
}


def step(number: int, **changes: float) -> dict[str, float]:
    """A sound row of metrics.jsonl."""
    row = {
        "step": number,
        "seconds/step": 1.0,
        "reward/descore": 0.5,
        "reward/descore_group_std_max": 0.2,
        "reward/descore_zero_spread": 0.0,
        "reward/descore_unscored": 0.0,
        "reward/look": 0.5,
        "train/advantage_abs": 0.6,
        "train/clip_frac": 0.0,
        "train/grad_norm": 0.01,
        "train/loss": 1e-3,
        "train/nonfinite_updates": 0.0,
        "train/ratio_max_dev": 0.0,
        "train/skipped": 0.0,
    }
    return {**row, **{name.replace("__", "/"): v for name, v in changes.items()}}


def measurement(number: int, changes: dict[str, float]) -> dict[str, float]:
    """A sound row of measurements.jsonl."""
    row = {
        "step": number,
        "ranks": 1,
        "gradient/norm": 0.01,
        "weights/moved": 1e-4,
        "weights/ranks_apart": 0.0,
        "adapter/lora_B_norm": 0.5,
        "adapter/lora_B_trained": 24.0,
        "adapter/drift": 0.02,
        "rollout/gap/policy": 1e-7,
        "rollout/gap/reference": 0.02,
        "rollout/gap/unguided": 0.3,
        "rollout/adapter_effect": 0.1,
        "rollout/log_prob_gap": 1e-7,
        "update/gap/policy": 1e-7,
        "update/gap/unguided": 0.3,
        "update/log_prob_gap": 1e-7,
        "update/adapter_effect": 0.01,
        "update/gain": 0.8,
        "update/repeat": 0.0,
        "kl/pull": 1e-4,
        "text/gap": 0.0,
        "text/effect": 0.2,
        "decode/gap/policy": 0.0,
        "advantage/sign": 1.0,
        "weights/still": 0.0,
        "weights/moved_per_rate": 0.7,
        "loss/policy": 1.0,
        "loss/rest": 1e-5,
        "loss/kl_factor": 1.0,
        "batch/prompts": 1.0,
        "batch/prompts_known": 500.0,
        "batch/prompts_as_before": 0.0,
        "batch/groups": 8.0,
        "samples/groups": 8.0,
        "samples/twins": 0.0,
        "samples/apart": 0.3,
        "samples/as_before": 0.0,
        "samples/level_min": 0.8,
        "samples/level_max": 0.95,
        "rewards/descore/fps_ratio": 1.0,
        "rewards/descore/wrong_prompt": 0.0,
        "rewards/descore/alone_gap": 0.0,
        "rewards/descore/turned_gap": 4.0,
        "rewards/descore/random": 0.0,
        "rewards/descore/wrong_prompt/fell": 6.0,
        "rewards/descore/wrong_prompt/same": 1.0,
        "rewards/descore/wrong_prompt/rose": 1.0,
        "rewards/descore/shuffled_pixels/fell": 8.0,
        "rewards/descore/shuffled_pixels/same": 0.0,
        "rewards/descore/shuffled_pixels/rose": 0.0,
    }
    return {**row, **changes}


def evidence(
    settings: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    measured: dict[str, float] | None = None,
    **facts: Any,
) -> Evidence:
    """A sound run of five updates, with changes in every row."""
    merged = json.loads(json.dumps(SETTINGS))
    for key, value in (settings or {}).items():
        place = merged
        *folders, last = key.split(".")
        for folder in folders:
            place = place[folder]
        place[last] = value
    return Evidence(
        settings=merged,
        metrics=[step(n, **(metrics or {})) for n in range(5)],
        measurements=[measurement(n, measured or {}) for n in range(5)],
        facts=facts,
    )


def accused(run: Evidence) -> list[str]:
    return [diagnosis.cause for diagnosis in diagnose(run) if diagnosis.accuses]


def test_sound_run_is_not_accused() -> None:
    assert diagnose(evidence()) == []


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("prompts_per_step", 2, "few-videos"),
        ("generator.guidance_in_update", False, "guidance-not-in-update"),
        ("optimizer.lr", 0, "adapter-frozen"),
        ("optimizer.warmup_steps", 101, "warmup-too-long"),
        ("optimizer.weight_decay", 200.0, "weight-decay"),
        ("rewards.descore", {"weight": -1.0}, "reward-sign"),
        ("rewards.descore", {"weight": 0}, "no-trained-reward"),
    ],
)
def test_setting_is_named(key: str, value: Any, cause: str) -> None:
    assert accused(evidence({key: value})) == [cause]


def test_32_videos_an_update_are_enough_and_16_are_worth_knowing() -> None:
    assert accused(evidence({"prompts_per_step": 8})) == []
    (found,) = diagnose(evidence({"prompts_per_step": 4}))
    assert (found.cause, found.certainty) == ("few-videos", "possible")


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ({"reward__descore_unscored": 16.0}, "scores-missing"),
        ({"reward__descore_zero_spread": 0.6}, "reward-saturated"),
        ({"reward__descore_group_std_max": 0.0}, "reward-saturated"),
        (
            {"reward__descore_group_std_max": 0.0, "reward__descore_std": 0.3},
            "reward-blind-to-video",
        ),
        ({"train__kl": -1e-5}, "kl-sign"),
        ({"reward__descore_group_std_max": 8e-5}, "reward-saturated"),
        ({"reward__descore_group_std_median": 1e-3}, "reward-saturated"),
        ({"train__loss": math.nan}, "gradient-not-finite"),
        ({"train__clip_frac": 0.9}, "clip-too-narrow"),
        ({"train__ratio_max_dev": 0.004}, "log-prob-dtype"),
    ],
)
def test_metric_is_named(metrics: dict[str, float], cause: str) -> None:
    assert accused(evidence(metrics=metrics)) == [cause]


def test_half_of_the_scores_missing_says_50_percent() -> None:
    # 8 prompts x 4 members = 32 videos a step
    (found,) = diagnose(evidence(metrics={"reward__descore_unscored": 16.0}))
    assert "50 %" in found.what


@pytest.mark.parametrize(
    ("measured", "cause"),
    [
        (
            {"rollout/gap/policy": 0.02, "rollout/gap/reference": 1e-7},
            "adapter-not-in-sampler",
        ),
        ({"rollout/adapter_effect": 0.0}, "adapter-not-in-sampler"),
        ({"adapter/lora_B_norm": 0.0}, "lora-b-zero"),
        ({"weights/moved": 0.0}, "adapter-frozen"),
        ({"adapter/frozen": 3.0}, "adapter-frozen"),
        ({"adapter/drift": 0.0}, "adapter-without-effect"),
        ({"update/adapter_effect": 0.0}, "reference-is-policy"),
        (
            {"update/gap/policy": 0.3, "update/gap/unguided": 1e-7},
            "guidance-not-in-update",
        ),
        (
            {
                "rollout/gap/policy": 0.3,
                "rollout/gap/reference": 0.3,
                "rollout/gap/unguided": 0.4,
                "rollout/strength/unguided": 2.0,
                "rollout/beside/unguided": 0.01,
            },
            "guidance-differs",
        ),
        (
            {
                "update/gap/policy": 0.3,
                "update/strength/reference": 0.5,
                "update/beside/reference": 0.01,
            },
            "adapter-scaling",
        ),
        ({"scored/gap": 9.0}, "reward-other-videos"),
        ({"update/repeat": 0.1}, "random-forward"),
        ({"rollout/log_prob_gap": 1e-3}, "log-prob-dtype"),
        ({"text/gap": 0.5}, "wrong-embeddings"),
        ({"text/effect": 0.0}, "prompt-without-effect"),
        ({"text/cut": 1.0}, "prompts-cut"),
        ({"decode/gap/policy": 30.0}, "vae-scaling"),
        ({"vae/round_trip": 1.5}, "vae-scaling"),
        ({"rollout/sigma_gap": 0.1}, "wrong-shift"),
        ({"rollout/members_apart": 0.0}, "members-alike"),
        ({"advantage/sign": -1.0}, "reward-sign"),
        ({"advantage/off_centre": 0.5}, "advantage-differs"),
        ({"update/gain": -0.5}, "reward-sign-in-update"),
        ({"kl/pull": 0.009}, "kl-holds"),
        ({"batch/as_before": 1.0}, "same-seeds"),
        ({"batch/repeated": 0.5, "ranks": 2}, "ranks-repeat"),
        ({"batch/repeated": 0.5}, "same-seeds"),
        ({"weights/still": 0.5}, "adapter-frozen"),
        ({"weights/moved_per_rate": 0.01}, "lr-differs"),
        ({"weights/moved_per_rate": 9.0}, "lr-differs"),
        ({"ema/came": 0.0}, "ema-frozen"),
        ({"loss/policy": -1.0}, "reward-sign-in-update"),
        ({"loss/rest": 0.9}, "loss-differs"),
        ({"loss/kl_factor": -1.0}, "kl-sign"),
        ({"loss/kl_factor": 0.0}, "kl-differs"),
        ({"loss/kl_factor": 100.0}, "kl-differs"),
        ({"batch/prompts": 0.25}, "prompts-repeat"),
        ({"batch/prompts_as_before": 1.0}, "same-prompts"),
        ({"samples/twins": 0.5}, "members-alike"),
        ({"samples/apart": 1e-3}, "members-alike"),
        ({"samples/as_before": 0.5}, "stale-samples"),
        ({"samples/level_max": 0.8}, "one-noise-level"),
        ({"rollout/start_gap": 1.4}, "wrong-noise"),
        ({"prefix/gap/policy": 1.4, "prefix/gap/no-prompt": 1.4}, "wrong-noise"),
        ({"prefix/gap/policy": 0.3, "prefix/gap/no-prompt": 0.2}, "rollout-differs"),
        ({"rewards/descore/asked": 0.0}, "reward-stale"),
        (
            {"decode/gap/policy": 30.0, "decode/gap/channels": 0.0},
            "channels-swapped",
        ),
        ({"decode/gap/policy": 30.0, "decode/gap/reversed": 1.0}, "frames-reversed"),
        ({"decode/gap/policy": 30.0, "decode/gap/mirrored": 1.0}, "frames-turned"),
        ({"decode/gap/policy": 30.0, "decode/gap/clipped": 1.0}, "vae-scaling"),
        ({"adapter/drift": 3.0}, "lr-too-large"),
        ({"adapter/drift": 1e-8}, "lr-too-small"),
        ({"ranks": 2, "gradient/norm": 0.007}, "gradients-not-averaged"),
        ({"ranks": 2, "weights/ranks_apart": 1.0}, "gradients-not-averaged"),
        ({"gradient/norm": 0.02}, "gradient-differs"),
        ({"rewards/descore/fps_ratio": 1.5}, "wrong-fps"),
        ({"rewards/descore/wrong_prompt": 1.0}, "reward-swapped"),
        ({"rewards/descore/other_video": 0.5}, "reward-other-videos"),
        (
            {"rewards/descore/alone_gap": 4.0, "rewards/descore/turned_gap": 0.0},
            "reward-sign",
        ),
        ({"rewards/descore/alone_gap": 1.0}, "reward-swapped"),
        ({"rewards/descore/changed_prompt": 1.0}, "reward-other-prompts"),
        (
            {
                "rewards/descore/alone_gap": 1.0,
                "rewards/descore/late_gap": 0.0,
                "rewards/descore/as_before": 0.0,
            },
            "reward-stale",
        ),
        (
            {
                "rewards/descore/alone_gap": 0.3,
                "rewards/descore/differ": 1.0,
                "rewards/descore/compared": 4.0,
                "rewards/descore/default": 0.5,
            },
            "reward-default",
        ),
        ({"rewards/descore/random": 1.5}, "reward-random"),
        (
            {
                "rewards/descore/swapped_channels/fell": 1.0,
                "rewards/descore/swapped_channels/rose": 7.0,
            },
            "channels-swapped",
        ),
        ({"rewards/descore/at_max": 0.95}, "reward-saturated"),
        (
            {
                "rewards/descore/wrong_prompt/fell": 0.0,
                "rewards/descore/wrong_prompt/same": 8.0,
                "rewards/descore/wrong_prompt/rose": 0.0,
            },
            "reward-blind",
        ),
        (
            {
                "rewards/descore/shuffled_pixels/fell": 0.0,
                "rewards/descore/shuffled_pixels/rose": 8.0,
            },
            "reward-sign",
        ),
        (
            {
                "rewards/descore/wrong_prompt/fell": 1.0,
                "rewards/descore/wrong_prompt/rose": 6.0,
            },
            "reward-swapped",
        ),
        (
            {"evaluation/gap/policy": 9.0, "evaluation/gap/reference": 0.1},
            "evaluation-without-adapter",
        ),
        (
            {"evaluation/gap/policy": 9.0, "evaluation/gap/unguided": 0.1},
            "evaluation-settings",
        ),
    ],
)
def test_measurement_is_named(measured: dict[str, float], cause: str) -> None:
    assert accused(evidence(measured=measured)) == [cause]


def test_frequent_score_among_distinct_ones_is_worth_knowing() -> None:
    usual = {"rewards/descore/usual": 0.4, "rewards/descore/others_distinct": 1.0}
    (found,) = diagnose(evidence(measured=usual))
    assert (found.cause, found.certainty) == ("reward-default", "possible")


def test_clipped_gradients_accuse_if_they_come_near_the_eps_of_adam() -> None:
    settings = {"optimizer.max_grad_norm": 1e-6}
    for moved, certainty in ((0.1, "certain"), (0.6, "possible")):
        run = evidence(settings, measured={"weights/moved_per_rate": moved})
        (found,) = diagnose(run)
        assert (found.cause, found.certainty) == ("gradient-clipped", certainty)


def test_blind_reward_of_a_user_is_worth_knowing_and_no_accusation() -> None:
    blind = {
        "rewards/mine/wrong_prompt/fell": 0.0,
        "rewards/mine/wrong_prompt/same": 8.0,
        "rewards/mine/wrong_prompt/rose": 0.0,
    }
    mine = {"mine": {"target": "mine.py:brightness", "weight": 1.0}}
    (found,) = diagnose(evidence({"rewards": mine}, measured=blind))
    assert (found.cause, found.certainty) == ("reward-blind", "possible")


def test_wrong_shift_is_told_by_the_folder_of_the_generator(tmp_path: Path) -> None:
    assert accused(evidence({"generator.sampler.shift": 12}, flow_shift=3.0)) == [
        "wrong-shift"
    ]
    assert accused(evidence(flow_shift=3.0)) == []


def test_evaluation_with_another_guidance_and_without_adapter_is_named() -> None:
    generator = {"sampler": {"guidance_scale": 1.0}}
    folder = {"runs/eval": {"adapter": None, "generator": generator}}
    assert set(accused(evidence(evaluations=folder))) == {
        "evaluation-settings",
        "evaluation-without-adapter",
    }
    same = {"sampler": {"guidance_scale": 4.5}}
    folder = {"runs/eval": {"adapter": "runs/a/final", "generator": same}}
    assert accused(evidence(evaluations=folder)) == []


def test_spreads_are_compared_with_those_of_the_same_reward_only() -> None:
    certificate = {
        "recipe": "r",
        "settings": {},
        "rewards": {"toy/oracle.py:ShapesOracle": {"reads_prompt": True}},
        "bands": {"group_std_median": [[0.0, 0.3]] * 5},
    }
    for target, told in (("toy/oracle.py:ShapesOracle", True), ("mine.py:f", False)):
        rewards = {"mine": {"target": target, "weight": 1.0}}
        rows = [step(n) | {"reward/mine_group_std_median": 1.3} for n in range(5)]
        run = Evidence({**SETTINGS, "rewards": rewards}, rows, certificate=certificate)
        found = [diagnosis.cause for diagnosis in diagnose(run)]
        assert found == ["unlike-certificate"] * told


@pytest.mark.parametrize("name", ["grpo", "grpo_oracle"])
def test_certificate_is_that_of_the_recipe_and_knows_the_size_of_an_update(
    name: str,
) -> None:
    settings = plain(load(GrpoRun, [f"configs/shapes/{name}.yaml"], []))
    found = certificate_of(settings)
    assert found["recipe"].startswith(f"configs/shapes/{name}.yaml")
    # the sampler and the rate decide it, not the reward
    assert len(found["bands"]["adapter/drift"]) == 5
    assert found["round_trip_limit"] < 0.8
    # of a run with another adapter nothing is known but the generator
    other = {**settings, "generator": {**settings["generator"], "lora": None}}
    assert certificate_of(other)["bands"] == {}


def test_certificate_of_runs_without_measurements_says_nothing_about_prompts() -> None:
    run = evidence(measured={})
    assert rewards_of([run])["descore"] == {"reads_prompt": True}
    bare = Evidence(settings=run.settings, metrics=run.metrics)
    assert rewards_of([bare]) == {"descore": {}, "look": {}}


def test_watched_reward_that_falls_is_told() -> None:
    rows = []
    for n in range(40):
        wobble = 0.01 * (-1) ** n
        rise = {"reward__descore": 0.5 + 0.01 * n + wobble}
        rows.append(step(n, **rise, reward__look=0.5 - 0.01 * n + wobble))
    run = Evidence(settings=SETTINGS, metrics=rows)
    # from the mean of steps 0..9 to that of 30..39: 0.3, in a scatter of 0.01 and 0.0287
    assert trend(run, "descore") == pytest.approx(
        0.3 / math.sqrt(0.0287**2 + 0.01**2), rel=0.1
    )
    assert [found.cause for found in diagnose(run)] == ["reward-hacking"]


def write(folder: Path, run: Evidence) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(run.settings)))
    for name, rows in (
        ("metrics.jsonl", run.metrics),
        ("measurements.jsonl", run.measurements),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(lines)
    return folder


def test_command_prints_words_writes_json_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", evidence(measured={"weights/moved": 0.0}))
    with pytest.raises(SystemExit) as end:
        command.main([str(folder), "--json", str(tmp_path / "out.json")])
    assert end.value.code == 1
    assert "CERTAIN [adapter-frozen]" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["cause"] == "adapter-frozen"


def test_command_exits_with_0_for_a_sound_run_and_2_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", evidence())
    with pytest.raises(SystemExit) as end:
        command.main([str(folder)])
    assert end.value.code == 0
    with pytest.raises(SystemExit) as end:
        command.main([str(tmp_path / "nothing")])
    assert end.value.code == 2
    assert "config.yaml" in capsys.readouterr().err


def test_evaluation_beside_the_run_is_found_by_its_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", evidence())
    for name, adapter in (("mine", folder / "final"), ("other", tmp_path / "x/final")):
        (tmp_path / name).mkdir()
        text = yaml.safe_dump({"adapter": str(adapter)})
        (tmp_path / name / "config.yaml").write_text(text)
    found = read_run(folder).facts["evaluations"]
    assert [Path(name).name for name in found] == ["mine"]


@pytest.mark.parametrize(
    ("b", "cause"),
    [(0.0, ["lora-b-zero"]), (math.nan, ["adapter-not-finite"]), (0.1, [])],
)
def test_exported_adapter_is_read(tmp_path: Path, b: float, cause: list[str]) -> None:
    folder = write(tmp_path / "run", evidence())
    (folder / "final").mkdir()
    name = "transformer.blocks.0.attn1.to_q"
    weights = {
        f"{name}.lora_A.weight": torch.ones(2, 3),
        f"{name}.lora_B.weight": torch.full((3, 2), b),
    }
    save_file(weights, folder / "final" / "pytorch_lora_weights.safetensors")
    assert accused(read_run(folder)) == cause


def test_frozen_adapter_is_named_beside_its_export_of_zeros() -> None:
    still = {"weights/moved": 0.0, "adapter/lora_B_norm": 0.0}
    assert accused(evidence(measured=still, exported_lora_b=0.0)) == ["adapter-frozen"]


def test_evaluation_of_the_tuned_without_an_adapter_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", evidence())
    for name in ("eval_base", "eval_tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("adapter: null\n")
    assert accused(read_run(folder)) == ["evaluation-without-adapter"]
    found = read_run(folder).facts["evaluations"]
    assert [Path(name).name for name in found] == ["eval_tuned"]
    # beside an evaluation of the run, one without an adapter is what it is compared with
    (tmp_path / "mine").mkdir()
    text = yaml.safe_dump({"adapter": str(folder / "final")})
    (tmp_path / "mine" / "config.yaml").write_text(text)
    assert accused(read_run(folder)) == []


def test_report_has_a_section_of_the_diagnosis(tmp_path: Path) -> None:
    from launch.reporting.find_runs import discover
    from launch.reporting.page import PageOptions, render

    folder = write(tmp_path / "grpo", evidence(measured={"weights/moved": 0.0}))
    page = render(discover(folder), PageOptions("t"))
    section = page.partition('id="diagnosis"')[2].partition("</section>")[0]
    assert "CERTAIN" in section
    assert "adapter-frozen" in section
    sound = write(tmp_path / "sound" / "grpo", evidence())
    section = render(discover(sound), PageOptions("t")).partition('id="diagnosis"')[2]
    assert "Nothing is wrong" in section.partition("</section>")[0]
