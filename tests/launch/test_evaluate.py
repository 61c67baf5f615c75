"""launch/evaluate.py: who judges what, what is averaged over what, and how a killed evaluation goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats
from torch import Tensor

import launch.compose
from common.bootstrap import mean_ci95
from common.config import load
from common.distributed import derive_seed
from common.distributed import generator as random_generator
from common.types import Score
from launch import calibrate, evaluate, pair_rows
from launch.rows import RowTable, attempt, fingerprint, read_rows
from rm.data import Pair
from tests.launch.processes import ROOT, run, torchrun

SCRIPT = str(ROOT / "launch" / "evaluate.py")


class GreyGenerator:
    """The video of a seed is uniformly grey: seed % 200, and 50 brighter with the adapter."""

    def __init__(self) -> None:
        self.lift, self.seeds = 0, list[int]()
        self.fail_after: int | None = None

    def load_trained(self, folder: str) -> None:
        self.lift = 50

    def sample(self, prompts: Sequence[str], *, seeds: Sequence[int], scheduler: str) -> Tensor:
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
        "generator": {"path": "owner/name", "height": 16, "width": 16, "num_frames": 5, "fps": 8},
        "rewards": {"brightness": {}},
        "batch": 3,
        "keep_videos": 2,
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def evaluated(config: Path, *words: str) -> dict[str, Any]:
    evaluate.main(["generator", "--config", str(config), *words])
    out = next((w.removeprefix("out=") for w in words if w.startswith("out=")), str(config.parent / "eval"))
    return json.loads((Path(out) / "summary.json").read_text())


def expected_rewards(count: int = 7, *, lift: int = 0) -> list[float]:
    return [(derive_seed(0, "evaluate", i) % 200 + lift) / 255 for i in range(count)]


# ------------------------------------------------------------------ generator


def test_each_prompt_is_judged_at_its_own_seed(grey: GreyGenerator, config: Path) -> None:
    summary = evaluated(config)
    rows = read_rows(config.parent / "eval" / "results.jsonl")
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(7)]
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(expected_rewards(), abs=1e-6)
    assert summary["brightness"] == mean_ci95([row["rewards"]["brightness"] for row in rows], seed=0).as_dict()
    assert summary["brightness"]["mean"] == pytest.approx(sum(expected_rewards()) / 7, abs=1e-6)
    assert [row["video"] for row in rows] == ["videos/0000.mp4", "videos/0001.mp4", *[None] * 5]
    assert len(list((config.parent / "eval" / "videos").iterdir())) == 2


def test_base_and_tuned_share_their_seeds(grey: GreyGenerator, config: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    base = evaluated(config)
    tuned = evaluated(config, f"adapter={tmp_path / 'adapter'}", f"out={tmp_path / 'tuned'}")
    assert grey.seeds[:7] == grey.seeds[7:]
    assert tuned["brightness"]["mean"] - base["brightness"]["mean"] == pytest.approx(50 / 255, abs=1e-6)


def test_a_killed_evaluation_goes_on_where_it_was(
    grey: GreyGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluated(config)
    part = config.parent / "eval" / "results.rank-0.jsonl"
    part.write_text(part.read_text() + '{"index": 3, "prom')  # killed in the middle of a line
    grey.fail_after = None
    evaluated(config)
    assert grey.seeds == [derive_seed(0, "evaluate", i) for i in range(7)]  # none twice
    assert [row["index"] for row in read_rows(config.parent / "eval" / "results.jsonl")] == list(range(7))
    assert not part.exists()
    evaluated(config, "resamples=500")  # nothing but the summary is made again
    assert len(grey.seeds) == 7
    assert "0 of 7 to do" in capsys.readouterr().out


def test_more_prompts_keep_the_finished_ones(grey: GreyGenerator, config: Path) -> None:
    assert evaluated(config, "limit=3")["brightness"]["n"] == 3
    assert evaluated(config)["brightness"]["n"] == 7
    assert len(grey.seeds) == 7


def test_another_configuration_is_refused(
    grey: GreyGenerator, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(config)
    with pytest.raises(SystemExit) as exit_:
        evaluated(config, "seed=5")
    assert exit_.value.code == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    evaluated(config, "seed=5", "--resume", "none")
    rows = read_rows(config.parent / "eval" / "results.jsonl")
    assert rows[0]["seed"] == derive_seed(5, "evaluate", 0)


def test_changed_weights_under_the_same_name_are_noticed(grey: GreyGenerator, config: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"one")
    evaluated(config, f"adapter={tmp_path / 'adapter'}")
    (tmp_path / "adapter" / "weights").write_bytes(b"two")
    with pytest.raises(SystemExit):
        evaluated(config, f"adapter={tmp_path / 'adapter'}")


def test_unjudged_videos_are_missing_and_never_zero() -> None:
    rows = [
        {"rewards": {"a.b": 1.0}, "parts": {"a.b": {"x": 2.0}}},
        {"rewards": {"a.b": None}, "parts": {"a.b": {"x": None}}},
        {"rewards": {"a.b": 0.0}, "parts": {"a.b": {"x": 2.0}}},
    ]
    summary = evaluate.summarise(rows, seed=0, resamples=100)
    assert (summary["a.b"]["mean"], summary["a.b"]["n"], summary["a.b"]["missing"]) == (0.5, 2, 1)
    assert summary["a.b.x"] == {"mean": 2.0, "ci95": [2.0, 2.0], "n": 2, "missing": 1}


# ------------------------------------------------------------------ reward model


class NamedScorer:
    """The reward of v_A.mp4 is the A of its name; broken.mp4 cannot be read, nan.mp4 not be judged."""

    name = "descore"

    def score(self, videos: Sequence[Path], prompts: Sequence[str], *, fps: float | None = None) -> Score:
        if any("broken" in video.name for video in videos):
            raise ValueError("broken.mp4: cannot be decoded")
        values = [float(video.stem.partition("_")[2] or "nan") for video in videos]
        return Score(torch.tensor(values), parts={"subject": torch.ones(len(values))}, texts=[v.name for v in videos])


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Margins 1, -1, 2, NaN (unjudged), NaN (broken) and a tie of 0.25; people said A, A, A, B, A, same."""
    import rm.scorer

    scorer = NamedScorer()
    monkeypatch.setattr(rm.scorer.DeScoreScorer, "load", classmethod(lambda cls, path: scorer))
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "descore.json").write_text('{"format": 1}')
    table = [("v_2", "v_1", "A"), ("v_1", "v_2", "A"), ("v_3", "v_1", "A"), ("nan", "v_9", "B")]
    table += [("broken", "v_1", "A"), ("v_1", "v_0.75", "same")]
    lines = ["videos,prompt,GSB"]
    for a, b, label in table:
        for name in (a, b):
            (tmp_path / f"{name}.mp4").write_bytes(b"")
        lines.append(f"\"['{a}.mp4', '{b}.mp4']\",a prompt,{label}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


def test_preference_accuracy_of_hand_made_margins(pairs: Path, tmp_path: Path) -> None:
    words = [f"out={tmp_path / 'eval'}", f"checkpoint={tmp_path / 'judge'}", f"pairs={pairs}", "batch=6"]
    evaluate.main(["--local_rank=0", "rm", *words])
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["without_ties"]["mean"] == pytest.approx(2 / 5)  # the unjudged pairs are wrong
    assert summary["without_ties"]["n"] == 5
    # threshold 0.25 keeps the two right ones and wins the tie
    assert summary["with_ties"]["mean"] == pytest.approx(3 / 6)
    assert summary["threshold"] == pytest.approx(0.25)
    assert (summary["pairs"], summary["ties"], summary["unjudged"]) == (6, 1, 2)
    rows = read_rows(tmp_path / "eval" / "results.jsonl")
    assert (rows[0]["reward_A"], rows[0]["cot_B"], rows[0]["parts_A"]) == (2.0, "v_1.mp4", {"subject": 1.0})
    assert rows[3]["reward_A"] is None
    assert "cannot be decoded" in rows[4]["error"]
    assert (tmp_path / "eval" / rows[2]["video_A"]).resolve() == tmp_path / "v_3.mp4"


def test_dimensions_and_right_sub_dimensions_are_counted_apart() -> None:
    answer = '<answer>{"dimensional_scores": {"subject": 2, "camera": 1}}</answer>'
    pair = Pair("p", Path("a"), Path("b"), "", "", 1, {"subject": 2, "camera": 0}, {"subject": 1}, {"TA": -1})
    found = {"cot_A": answer, "cot_B": answer, "parts_A": {"reward.TA": 1.0, "reward.camera": 2.0, "subject": 2.0}}
    assert pair_rows.quality(pair, found) == {"quality_A": 0.5, "quality_B": 0.0}
    assert pair_rows.labels(pair, found) == {"labels": {"TA": -1}}  # B's camera is unknown
    rows = [
        {"label": 1, "reward_A": 1.0, "reward_B": 0.0, "parts_A": {"reward.TA": a}, "parts_B": {"reward.TA": b},
         "labels": {"TA": label}, "quality_A": q, "quality_B": 1.0}
        for a, b, label, q in ((0.0, 1.0, -1, 1.0), (3.0, 1.0, 1, 0.0), (1.0, 2.0, 1, 0.5), (9.0, 0.0, 0, 0.5))
    ]  # fmt: skip
    rows += [{"label": 1, "error": "broken"}]
    summary = pair_rows.summarise_pairs(rows, seed=0, resamples=50)
    assert summary["without_ties"]["mean"] == pytest.approx(4 / 5)
    assert (summary["without_ties.TA"]["mean"], summary["without_ties.TA"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (summary["sub_dimensions"]["mean"], summary["sub_dimensions"]["n"]) == (pytest.approx(0.75), 4)


def calibrated(monkeypatch: pytest.MonkeyPatch, *words: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, words)])
    calibrate.main()


def test_calibration_takes_the_rewards_of_an_evaluation(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = tmp_path / "judge"
    words = [f"checkpoint={judge}", f"pairs={pairs}", "batch=6"]
    evaluate.main(["rm", f"out={tmp_path / 'eval'}", *words])
    calibrated(monkeypatch, judge, tmp_path / "eval")
    found = json.loads((judge / "calibration.json").read_text())
    values = [2.0, 1.0, 1.0, 2.0, 3.0, 1.0, 9.0, 1.0, 0.75]  # of the pair with a broken file nothing is known
    assert found["videos"] == len(values)
    assert found["mean"]["overall"] == pytest.approx(sum(values) / len(values))
    assert found["std"]["overall"] == pytest.approx(torch.tensor(values).std(correction=0).item())

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "descore.json").write_text('{"format": 1}')
    with pytest.raises(SystemExit, match="2"):
        calibrated(monkeypatch, tmp_path / "other", tmp_path / "eval")
    assert "is about" in capsys.readouterr().err


def test_accuracy_without_ties_has_the_binomial_interval() -> None:
    """300 decided pairs, 255 right: in a resample the number of right ones is Binomial(300, 0.85)."""
    rows = [{"reward_A": 1.0 if i < 255 else -1.0, "reward_B": 0.0, "label": 1} for i in range(300)]
    rows += [{"reward_A": 0.0, "reward_B": 3.0, "label": 0} for _ in range(100)]
    summary = pair_rows.summarise_pairs(rows, seed=0, resamples=2_000)
    low, high = stats.binom.ppf([0.025, 0.975], 300, 0.85) / 300
    assert summary["without_ties"]["mean"] == pytest.approx(0.85)
    assert summary["without_ties"]["ci95"] == pytest.approx([low, high], abs=1 / 300)
    assert summary["with_ties"]["mean"] == pytest.approx(255 / 400)


# ------------------------------------------------------------------ rows


def test_a_file_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "mine"}\n')
    for resume in ("auto", "none"):
        with pytest.raises(ValueError, match="was not written by this program"):
            RowTable(tmp_path / "prompts.jsonl", identity={}, resume=resume)
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_one_bad_item_costs_one_row() -> None:
    calls = []

    def judge(items: Sequence[int]) -> list[dict[str, Any]]:
        calls.append(list(items))
        if 3 in items:
            raise ValueError("no three")
        return [{"square": item**2} for item in items]

    assert attempt(judge, [2, 3, 4]) == [{"square": 4}, {"error": "no three"}, {"square": 16}]
    assert calls == [[2, 3, 4], [2], [3], [4]]


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
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
    [("evaluate.yaml", evaluate.GeneratorEvaluation), ("evaluate_rm.yaml", evaluate.RewardEvaluation)],
)
def test_shipped_configs_are_valid(name: str, schema: type) -> None:
    for path in ROOT.glob(f"configs/*/{name}"):
        assert load(schema, path).out


def test_a_typo_is_exit_2_in_two_seconds_with_the_right_key() -> None:
    start = time.perf_counter()
    done = run(sys.executable, SCRIPT, "generator", "generator.sampler.num_stpes=4", "batch=x", expect=2)
    assert time.perf_counter() - start < 2.0
    assert "generator.sampler.num_steps" in done.stderr
    assert "batch: expected int" in done.stderr
    assert "generator --config" in run(sys.executable, SCRIPT, "genrator", expect=2).stderr


@pytest.mark.slow
def test_two_ranks_give_the_rows_of_one(config: Path, tmp_path: Path) -> None:
    done = torchrun(2, str(ROOT / "tests" / "launch" / "evaluate_ranks.py"), "--config", str(config))
    assert sorted(line for line in done.stdout.splitlines() if "sampled" in line) == ["sampled 3", "sampled 4"]
    rows = read_rows(tmp_path / "eval" / "results.jsonl")
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["rewards"]["brightness"] for row in rows] == pytest.approx(expected_rewards(), abs=1e-6)
    assert [row["video"] for row in rows] == ["videos/0000.mp4", "videos/0001.mp4", *[None] * 5]
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["brightness"]["n"] == 7


@pytest.mark.slow
def test_the_real_generator_is_sampled_as_the_stock_pipeline_does(config: Path, tmp_path: Path) -> None:
    """``scheduler=pipeline`` must give the brightness of what WanPipeline itself makes of the same noise."""
    from diffusers import WanPipeline

    from tests.tiny import PROMPTS, build_tiny_wan

    path = build_tiny_wan(tmp_path / "wan", scheduler="euler")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:2]))
    settings = yaml.safe_load(config.read_text())
    settings["generator"] |= {"path": str(path), "dtype": "float32", "height": 32, "width": 32, "num_frames": 9}
    settings["generator"] |= {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": False}
    settings["generator"] |= {"max_sequence_length": 24, "sampler": {"num_steps": 4, "stochastic_range": 2}}
    config.write_text(yaml.safe_dump(settings))
    evaluated(config, "scheduler=pipeline")

    pipeline = WanPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    for i, row in enumerate(read_rows(tmp_path / "eval" / "results.jsonl")):
        noise = torch.randn((1, 16, 3, 4, 4), generator=random_generator(row["seed"], "noise"))
        video = pipeline(
            PROMPTS[i], "", height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=4.5,
            latents=noise, max_sequence_length=24, output_type="np",
        ).frames  # fmt: skip
        assert row["rewards"]["brightness"] == pytest.approx(float(video.mean()), abs=1e-3)


@pytest.mark.slow
def test_a_real_judge_reads_the_files_of_the_table(tmp_path: Path) -> None:
    """A random DeScore of the real classes: in batches each file gets what it gets alone; broken is wrong."""
    from common.video_io import write_mp4
    from rm.model import DeScore
    from rm.scorer import DeScoreScorer
    from tests.tiny_qwen import SETTINGS, TEMPLATE, random_frames, save_tiny_qwen

    base = save_tiny_qwen(tmp_path / "base")
    TEMPLATE.save(base / "prompt.json")
    SETTINGS.save(base / "video.json")
    DeScore.from_base(base).save(tmp_path / "judge")
    for i in range(5):
        write_mp4(tmp_path / f"{i}.mp4", random_frames(i), 4.0)
    (tmp_path / "5.mp4").write_bytes(b"no video")
    table = [(0, 1, "A"), (2, 3, "B"), (4, 5, "A")]
    lines = [f"\"['{a}.mp4', '{b}.mp4']\",prompt {a},{label}" for a, b, label in table]
    (tmp_path / "pairs.csv").write_text("\n".join(["videos,prompt,GSB", *lines]) + "\n")
    words = [f"out={tmp_path / 'eval'}", f"checkpoint={tmp_path / 'judge'}", f"pairs={tmp_path / 'pairs.csv'}"]
    evaluate.main(["rm", *words, "options={chains: 0}"])

    rows = read_rows(tmp_path / "eval" / "results.jsonl")
    scorer = DeScoreScorer.load(tmp_path / "judge", chains=0)
    for row, (a, b, _) in zip(rows[:2], table, strict=False):
        alone = [float(scorer.score([tmp_path / f"{v}.mp4"], [f"prompt {a}"]).value_B[0]) for v in (a, b)]
        assert [row["reward_A"], row["reward_B"]] == pytest.approx(alone, abs=1e-5)
        assert alone[0] != pytest.approx(alone[1], abs=1e-4)
    right = sum((row["reward_A"] - row["reward_B"]) * row["label"] > 0 for row in rows[:2])
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["without_ties"]["mean"] == pytest.approx(right / 3)
    assert summary["unjudged"] == 1
