"""launch/evaluate.py generator: seeds, means, resumed runs and refused folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import launch.compose
from common.config import load
from common.distributed import derive_seed, seeded_generator
from common.files import read_jsonl
from launch import evaluate, report
from launch.evaluation.intervals import mean_ci95
from launch.evaluation.results_table import (
    ResultsTable,
    attempt,
    fingerprint,
)
from tests.launch.processes import ROOT, next_step, refused_early, torchrun

SCRIPT = str(ROOT / "launch" / "evaluate.py")


class GreyGenerator:
    """The video of a seed is uniformly grey: seed % 200, and 50 brighter with the adapter."""

    def __init__(self) -> None:
        self.lift, self.seeds = 0, list[int]()
        self.fail_after: int | None = None

    def load_trained(self, folder: str) -> None:
        self.lift = 50

    def sample(
        self, prompts: Sequence[str], *, seeds: Sequence[int], scheduler: str
    ) -> Tensor:
        if self.fail_after is not None and len(self.seeds) >= self.fail_after:
            raise KeyboardInterrupt
        self.seeds += seeds
        return torch.tensor([float(seed % 200) for seed in seeds]).view(-1, 1, 1, 1, 1)

    def decode(self, clean_BCFHW: Tensor) -> Tensor:
        grey_B = (clean_BCFHW.flatten() + self.lift).to(torch.uint8)
        return grey_B.view(-1, 1, 1, 1, 1).expand(-1, 5, 16, 16, 3)


@pytest.fixture
def grey(monkeypatch: pytest.MonkeyPatch) -> GreyGenerator:
    generator = GreyGenerator()
    monkeypatch.setattr(launch.compose, "build_generator", lambda cfg: generator)
    return generator


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Seven prompts, brightness, batches of three."""
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(7)))
    settings = {
        "out": str(tmp_path / "eval"),
        "prompts": str(tmp_path / "prompts.txt"),
        "generator": {
            "path": "owner/name",
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "fps": 8,
        },
        "rewards": {"brightness": {}},
        "batch": 3,
        "keep_videos": 2,
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def evaluated(config: Path, *words: str) -> dict[str, Any]:
    evaluate.main(["generator", "--config", str(config), *words])
    out = next(
        (w.removeprefix("out=") for w in words if w.startswith("out=")),
        str(config.parent / "eval"),
    )
    return json.loads((Path(out) / "summary.json").read_text())


def expected_rewards(count: int = 7, *, lift: int = 0) -> list[float]:
    return [(derive_seed(0, "evaluate", i) % 200 + lift) / 255 for i in range(count)]


# ------------------------------------------------------------------ generator


def test_each_prompt_is_sampled_at_its_derived_seed(
    grey: GreyGenerator, config: Path
) -> None:
    summary = evaluated(config)
    rows = read_jsonl(config.parent / "eval" / "results.jsonl")
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(7)]
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(
        expected_rewards(), abs=1e-6
    )
    assert (
        summary["brightness"]
        == mean_ci95([row["rewards"]["brightness"] for row in rows], seed=0).as_dict()
    )
    assert summary["brightness"]["mean"] == pytest.approx(
        sum(expected_rewards()) / 7, abs=1e-6
    )
    assert [row["video"] for row in rows] == [
        "videos/0000.mp4",
        "videos/0001.mp4",
        *[None] * 5,
    ]
    assert len(list((config.parent / "eval" / "videos").iterdir())) == 2


def test_next_step_of_generator_evaluation_is_a_report_of_it(
    grey: GreyGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(config)
    words = next_step(capsys.readouterr().out)
    assert words[:2] == ["python", "launch/report.py"]
    assert report._parser().parse_args(words[2:]).base == config.parent / "eval"


def test_base_and_adapter_use_equal_seeds(
    grey: GreyGenerator, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    base = evaluated(config)
    tuned = evaluated(
        config, f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'tuned'}"
    )
    assert grey.seeds[:7] == grey.seeds[7:]
    assert tuned["brightness"]["mean"] - base["brightness"]["mean"] == pytest.approx(
        50 / 255, abs=1e-6
    )


def test_killed_evaluation_resumes_and_samples_nothing_twice(
    grey: GreyGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluated(config)
    part = config.parent / "eval" / "results.rank-0.jsonl"
    part.write_text(
        part.read_text() + '{"index": 3, "prom'
    )  # killed in the middle of a line
    grey.fail_after = None
    evaluated(config)
    assert grey.seeds == [derive_seed(0, "evaluate", i) for i in range(7)]  # none twice
    assert [
        row["index"] for row in read_jsonl(config.parent / "eval" / "results.jsonl")
    ] == list(range(7))
    assert not part.exists()
    evaluated(config, "resamples=500")  # nothing but the summary is made again
    assert len(grey.seeds) == 7
    assert "0 of 7" in capsys.readouterr().out


def test_larger_limit_keeps_finished_rows(grey: GreyGenerator, config: Path) -> None:
    assert evaluated(config, "limit=3")["brightness"]["n"] == 3
    assert evaluated(config)["brightness"]["n"] == 7
    assert len(grey.seeds) == 7


def test_resume_with_another_seed_exits_2(
    grey: GreyGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(config)
    with pytest.raises(SystemExit) as exit_:
        evaluated(config, "seed=5")
    assert exit_.value.code == 2
    assert "seed: 0" in capsys.readouterr().err
    evaluated(config, "seed=5", "--resume", "none")
    rows = read_jsonl(config.parent / "eval" / "results.jsonl")
    assert rows[0]["seed"] == derive_seed(5, "evaluate", 0)


def test_changed_adapter_under_the_same_path_exits_2(
    grey: GreyGenerator, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"one")
    evaluated(config, f"adapter={tmp_path / 'adapter'}")
    (tmp_path / "adapter" / "weights").write_bytes(b"two")
    with pytest.raises(SystemExit, match="2"):
        evaluated(config, f"adapter={tmp_path / 'adapter'}")


def test_unscored_videos_count_as_missing_not_zero() -> None:
    rows = [
        {"rewards": {"a.b": 1.0}, "parts": {"a.b": {"x": 2.0}}},
        {"rewards": {"a.b": None}, "parts": {"a.b": {"x": None}}},
        {"rewards": {"a.b": 0.0}, "parts": {"a.b": {"x": 2.0}}},
    ]
    summary = evaluate.summarise(rows, seed=0, resamples=100)
    assert (summary["a.b"]["mean"], summary["a.b"]["n"], summary["a.b"]["missing"]) == (
        0.5,
        2,
        1,
    )
    assert summary["a.b.x"] == {"mean": 2.0, "ci95": [2.0, 2.0], "n": 2, "missing": 1}


# ------------------------------------------------------------------ rows


def test_results_table_over_a_foreign_file_raises(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "mine"}\n')
    for resume in ("auto", "none"):
        with pytest.raises(ValueError, match=r"prompts\.jsonl"):
            ResultsTable(tmp_path / "prompts.jsonl", identity={}, resume=resume)
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_attempt_isolates_a_failing_item() -> None:
    calls = []

    def judge(items: Sequence[int]) -> list[dict[str, Any]]:
        calls.append(list(items))
        if 3 in items:
            raise ValueError("no three")
        return [{"square": item**2} for item in items]

    assert attempt(judge, [2, 3, 4]) == [
        {"square": 4},
        {"error": "no three"},
        {"square": 16},
    ]
    assert calls == [[2, 3, 4], [2], [3], [4]]


def test_fingerprint_depends_on_content(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"same")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "file").rename(tmp_path / "b" / "other")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "nowhere") is None


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("evaluate.yaml", evaluate.GeneratorEvaluation),
        ("evaluate_rm.yaml", evaluate.RewardEvaluation),
    ],
)
def test_shipped_evaluation_configs_load(name: str, schema: type) -> None:
    for path in ROOT.glob(f"configs/*/{name}"):
        assert load(schema, path).out


def test_config_typo_exits_2_with_the_right_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refused_early(
        SCRIPT, "generator", "generator.sampler.num_stpes=4", "batch=x"
    )
    assert "generator.sampler.num_steps" in said
    assert "batch:" in said
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["genrator"])
    assert "generator --config" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_write_the_rows_of_one_rank(config: Path, tmp_path: Path) -> None:
    done = torchrun(
        2,
        str(ROOT / "tests" / "launch" / "evaluation" / "evaluate_ranks.py"),
        "--config",
        str(config),
    )
    assert sorted(line for line in done.stdout.splitlines() if "sampled" in line) == [
        "sampled 3",
        "sampled 4",
    ]
    rows = read_jsonl(tmp_path / "eval" / "results.jsonl")
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(
        expected_rewards(), abs=1e-6
    )
    assert [row["video"] for row in rows] == [
        "videos/0000.mp4",
        "videos/0001.mp4",
        *[None] * 5,
    ]
    assert (
        json.loads((tmp_path / "eval" / "summary.json").read_text())["brightness"]["n"]
        == 7
    )


@pytest.mark.slow
def test_pipeline_scheduler_equals_the_stock_pipeline(
    config: Path, tmp_path: Path
) -> None:
    """``scheduler=pipeline`` gives the brightness of WanPipeline's video of the same noise."""
    from diffusers import WanPipeline

    from tests.tiny import PROMPTS, build_tiny_wan

    path = build_tiny_wan(tmp_path / "wan", scheduler="euler")
    (tmp_path / "prompts.txt").write_text(
        "".join(f"{prompt}\n" for prompt in PROMPTS[:2])
    )
    settings = yaml.safe_load(config.read_text())
    settings["generator"] |= {
        "path": str(path),
        "dtype": "float32",
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }
    settings["generator"] |= {
        "lora": {"rank": 4, "alpha": 8},
        "gradient_checkpointing": False,
    }
    settings["generator"] |= {
        "max_sequence_length": 24,
        "sampler": {"num_steps": 4, "stochastic_range": 2},
    }
    config.write_text(yaml.safe_dump(settings))
    evaluated(config, "scheduler=pipeline")

    pipeline = WanPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    for i, row in enumerate(read_jsonl(tmp_path / "eval" / "results.jsonl")):
        noise = torch.randn(
            (1, 16, 3, 4, 4), generator=seeded_generator(row["seed"], "noise")
        )
        video = pipeline(
            PROMPTS[i],
            "",
            height=32,
            width=32,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=4.5,
            latents=noise,
            max_sequence_length=24,
            output_type="np",
        ).frames
        assert row["rewards"]["brightness"] == pytest.approx(
            float(video.mean()), abs=1e-3
        )
