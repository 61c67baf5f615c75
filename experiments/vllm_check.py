"""Check the vLLM backend against a real vLLM and the built-in engine: `make vllm-check`.

vLLM runs in .venv-vllm on the CPU, in fp32 and without compiling, with the Qwen3-VL of the
embedded world. Every check prints PASS or FAIL; the exit status is 1 if one fails. What a CPU
cannot show: sleeping, the GPU's memory, bfloat16.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.runner import ROOT
from rm.config import BackboneLora, Generation, LearningRates, VllmConfig
from rm.cot_backend import BuiltinBackend, CotBackend
from rm.model import DeScore
from rm.packed import PackedCot
from rm.prompt import Encoded
from rm.scorer import DeScoreScorer
from rm.video import PreparedVideo, prepare
from rm.vllm.client import VllmBackend
from toy.world import caption, random_scenes, render

BASE = ROOT / "assets" / "shapes" / "qwen"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# Videos, CoTs of each, tokens of each.
VIDEOS = 3
COPIES = 2
TOKENS = 48
FPS = 8.0
GREEDY = Generation(max_new_tokens=TOKENS, repetition_penalty=1.0)
PENALISED = Generation(max_new_tokens=TOKENS, repetition_penalty=1.05)
SAMPLED = Generation(max_new_tokens=TOKENS, temperature=1.0, repetition_penalty=1.0)
SEEDS = [11, 12, 13, 2**63 - 1, 15, 16]


class Report:
    """Prints a line for each check, and counts those that fail."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, name: str, *, passed: bool, detail: str) -> None:
        """Print the result of a check."""
        if not passed:
            self.failed += 1
        word = "PASS" if passed else "FAIL"
        print(f"{word}  {name}: {detail}", flush=True)


class Inputs:
    """Videos of the embedded world with their prompts, as the model reads them."""

    def __init__(self, model: DeScore) -> None:
        scenes = random_scenes(VIDEOS, random.Random(0))
        self.frames_BTYXC = render(scenes, frames=8, side=32)
        self.prompts = [caption(scene.attributes, wording=0) for scene in scenes]
        self.videos: list[PreparedVideo] = []
        self.encoded: list[Encoded] = []
        for frames, prompt in zip(self.frames_BTYXC, self.prompts, strict=True):
            video = prepare(frames, model.settings, fps=FPS)
            self.videos.append(video)
            self.encoded.append(model.encode(prompt, video))

    def write(
        self,
        backend: CotBackend,
        how: Generation,
        *,
        version: int,
        seeds: Sequence[int] | None = None,
    ) -> list[list[PackedCot]]:
        """Write `COPIES` CoTs about every video."""
        return backend.write(
            self.encoded,
            self.videos,
            how,
            version=version,
            seeds=seeds,
            copies=COPIES,
        )


def main() -> None:
    """Run every check; exit with status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, default=PYTHON)
    args = parser.parse_args()
    began = time.monotonic()
    report = run_checks(settings_for(args.python))
    print(f"{report.failed} checks failed, {_seconds(began)}")
    sys.exit(bool(report.failed))


def settings_for(python: Path, **changes: Any) -> VllmConfig:
    """Return the settings of the check."""
    options = {
        "max_model_len": 1024,
        # Compiling takes minutes and changes nothing here.
        "engine_args": {"enforce_eager": True},
        **changes,
    }
    return VllmConfig(python=str(python), **options)


def run_checks(settings: VllmConfig) -> Report:
    """Compare vLLM with the built-in engine."""
    report = Report()
    torch.manual_seed(0)
    model = DeScore.from_base(BASE).eval()
    inputs = Inputs(model)

    # 1. vLLM with weights that change, as in stage 2.
    began = time.monotonic()
    backend = VllmBackend(settings, model)
    backend.sync(0)
    report.add("vLLM starts", passed=True, detail=_seconds(began))
    check_greedy(report, model, backend, inputs)
    check_sampling(report, backend, inputs)
    check_updates(report, model, backend, inputs)
    backend.close()

    # 2. vLLM with the files of a checkpoint, as a reward.
    with tempfile.TemporaryDirectory() as folder:
        check_reward(report, settings, inputs, Path(folder))
    return report


def check_greedy(
    report: Report, model: DeScore, backend: VllmBackend, inputs: Inputs
) -> None:
    """Greedy CoTs are those of the built-in engine, token by token."""
    builtin = BuiltinBackend(model, batch=VIDEOS)
    for how in (GREEDY, PENALISED):
        wanted = inputs.write(builtin, how, version=0)
        began = time.monotonic()
        found = inputs.write(backend, how, version=0)
        report.add(
            f"greedy CoTs equal the built-in engine's, penalty {how.repetition_penalty}",
            passed=found == wanted,
            detail=f"{_equal(found, wanted)}, {_seconds(began)}",
        )


def check_sampling(report: Report, backend: VllmBackend, inputs: Inputs) -> None:
    """A sampled CoT depends on its seed, not on its neighbours."""
    first = inputs.write(backend, SAMPLED, version=0, seeds=SEEDS)
    again = inputs.write(backend, SAMPLED, version=0, seeds=SEEDS)
    report.add(
        "equal seeds give equal CoTs",
        passed=again == first,
        detail=_equal(again, first),
    )
    others = inputs.write(
        backend, SAMPLED, version=0, seeds=[seed - 7 for seed in SEEDS]
    )
    texts = {cot.ids for group in [*first, *others] for cot in group}
    report.add(
        "other seeds give other CoTs",
        passed=len(texts) == 2 * len(SEEDS),
        detail=f"{len(texts)} of {2 * len(SEEDS)} differ",
    )

    # One video at a time, and one CoT at a time.
    alone = []
    for n in range(VIDEOS):
        group = []
        for copy in range(COPIES):
            [[cot]] = backend.write(
                inputs.encoded[n : n + 1],
                inputs.videos[n : n + 1],
                SAMPLED,
                version=0,
                seeds=[SEEDS[n * COPIES + copy]],
            )
            group.append(cot)
        alone.append(group)
    report.add(
        "a CoT does not depend on its neighbours",
        passed=alone == first,
        detail=_equal(alone, first),
    )


def check_updates(
    report: Report, model: DeScore, backend: VllmBackend, inputs: Inputs
) -> None:
    """After an update vLLM writes with the new weights; it never chooses a banned token."""
    builtin = BuiltinBackend(model, batch=VIDEOS)
    before = inputs.write(builtin, GREEDY, version=0)

    # 1. All language weights change.
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "language_model.layers" in name:
                weight.add_(0.2 * weight.std() * torch.randn_like(weight))
    began = time.monotonic()
    backend.sync(1)
    took = _seconds(began)
    after = inputs.write(builtin, GREEDY, version=1)
    found = inputs.write(backend, GREEDY, version=1)
    report.add(
        "CoTs after an update equal the built-in engine's",
        passed=found == after and after != before,
        detail=f"{_equal(found, after)}, sync {took}",
    )

    # 2. An adapter is added to them.
    groups_of = model.param_groups(
        LearningRates(),
        lora=BackboneLora(rank=4, alpha=8.0, dropout=0.0),
        weight_decay=0.0,
        seed=0,
    )
    assert groups_of
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    backend.sync(2)
    adapted = inputs.write(builtin, GREEDY, version=2)
    found = inputs.write(backend, GREEDY, version=2)
    report.add(
        "CoTs with a LoRA equal the built-in engine's",
        passed=found == adapted and adapted != after,
        detail=_equal(found, adapted),
    )

    # 3. The banned tokens become more likely than any other.
    banned_V = model.banned_ids()
    with torch.no_grad():
        batch = model.batch(inputs.encoded, inputs.videos, query=False)
        last_BD = model.hidden(batch)[torch.arange(VIDEOS), batch.last_B]
        head_VD = model.backbone.get_output_embeddings().weight
        wanted = (last_BD @ head_VD.T).max() + 10.0
        head_VD[banned_V] = wanted * last_BD[0] / last_BD[0].square().sum()
        wished_B = (last_BD @ head_VD.T).argmax(-1)
    backend.sync(3)
    sampled = inputs.write(backend, SAMPLED, version=3, seeds=SEEDS)
    tokens = [token for group in sampled for cot in group for token in cot.ids]
    report.add(
        "no banned token is chosen",
        passed=bool(banned_V[wished_B].any() and not banned_V[tokens].any()),
        detail=f"{len(tokens)} tokens, {int(banned_V[wished_B].sum())} of {VIDEOS} "
        "prompts would begin with one",
    )


def check_reward(
    report: Report, settings: VllmConfig, inputs: Inputs, folder: Path
) -> None:
    """Scores behind vLLM's CoTs equal those that the built-in engine gives."""
    model = DeScore.from_base(BASE, generation=PENALISED)
    model.save(folder)
    scores = []
    for options in ({}, {"engine": "vllm", "vllm": asdict(settings)}):
        scorer = DeScoreScorer.load(folder, **options)
        scores.append(scorer.score(inputs.frames_BTYXC, inputs.prompts, fps=FPS))
    wanted, found = scores
    # A CoT that does not end has no score, with either.
    scored_B = wanted.value_B.isfinite()
    difference_B = (found.value_B - wanted.value_B)[scored_B].abs()
    report.add(
        "scores behind vLLM's CoTs equal the built-in engine's",
        passed=found.texts == wanted.texts
        and bool(scored_B.any())
        and bool((found.value_B.isfinite() == scored_B).all())
        and difference_B.max().item() < 1e-4,
        detail=f"{int(scored_B.sum())} of {VIDEOS} CoTs end, "
        f"largest difference {difference_B.max().item():.1e}",
    )


def _equal(found: list[list[PackedCot]], wanted: list[list[PackedCot]]) -> str:
    equal = 0
    for groups in zip(found, wanted, strict=True):
        equal += sum(a == b for a, b in zip(*groups, strict=True))
    return f"{equal} of {VIDEOS * COPIES} equal"


def _seconds(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"


if __name__ == "__main__":
    main()
