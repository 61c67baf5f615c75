"""Everything at its true size that a CPU with 24 GiB can do: `make fullsize`, or `python experiments/fullsize.py`.

Wan 2.1 1.3B and Qwen3-VL 2B with their published configs and random weights, computing in fp32
(bfloat16 is emulated on most CPUs). With the ordinary recipes, loops and engines: a GRPO update and
a DPO step of the transformer with its adapter under gradient checkpointing, a video judged and a
cold-start step of the judge. Each runs in a process of its own, whose peak of memory is held
against what ``--dry-run`` predicts. The text encoder (22.7 GB in fp32) is not there: embeddings of
the prompt are random. Results: docs/results/fullsize.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runner import ROOT, commit

if TYPE_CHECKING:
    from torch import Tensor

    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator
    from launch.planning.plan import Plan
    from rm.model import DeScore

COMMAND = "python experiments/fullsize.py"
PROMPT = "A paper boat drifts down a gutter in the rain."
SMALL = (
    "generator.height=128",
    "generator.width=128",
    "generator.num_frames=9",
    "generator.dtype=float32",
)
JUDGE = "Qwen/Qwen3-VL-2B-Instruct"
# what is freed goes back to the system at once, as a GPU's allocator counts; the C library would keep some of it
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TEXT_ROWS = 24  # of the prompt's embedding, before its padding to 512


@dataclass(frozen=True)
class FullSizeResult:
    """What a part did; ``facts`` are its own figures."""

    plan: Plan
    parameters: int
    facts: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument(
        "--part", choices=list(PARTS), help="this one only, here, as a line of JSON"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.part is not None:
        print(json.dumps(measured(PARTS[args.part], threads=args.threads)))
        return
    record: dict[str, Any] = {
        "command": COMMAND,
        "commit": commit(),
        "threads": args.threads,
        "parts": {},
    }
    began = time.time()
    for part in PARTS:
        words = [
            sys.executable,
            __file__,
            "--part",
            part,
            "--threads",
            str(args.threads),
        ]
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(args.threads),
        }
        done = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        record["parts"][part] = found = json.loads(done.stdout.splitlines()[-1])
        print(f"{part:10} {json.dumps(found)}", flush=True)
    record["minutes"] = round((time.time() - began) / 60, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fullsize.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    print(f"{record['minutes']} minutes; {args.out / 'fullsize.json'}")


def measured(part: Callable[[Path], FullSizeResult], *, threads: int) -> dict[str, Any]:
    """Run it; its seconds, and the peak of this process over what the libraries take, beside what the plan says."""
    from common import distributed
    from launch.compose import quiet

    quiet()
    _import_all()
    import torch

    torch.set_num_threads(threads)
    distributed.init_process_group()
    before, began = _resident(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        outcome = part(Path(folder))
    from common.memory import peak_memory
    from launch.planning.plan import GIB, RESERVE

    peak = peak_memory()["memory/peak_gb"] * GIB - before

    predicted = outcome.plan.peak - RESERVE
    distributed.shutdown()
    return {
        "parameters": outcome.parameters,
        "seconds": round(time.time() - began, 1),
        "peak_gib": round(peak / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "off": round(predicted / peak - 1, 3),
        "process_gib": round((peak + before) / GIB, 2),
        **outcome.facts,
    }


def grpo(folder: Path) -> FullSizeResult:
    """One update of configs/wan/grpo.yaml on two videos of three steps under guidance, judged by brightness."""
    from alignment.rewards.brightness import Brightness
    from common.config import load
    from launch.grpo import loop_of
    from launch.planning.plan import DEVICES, Where
    from launch.planning.runs import plan_grpo
    from launch.schemas.training import GrpoRun

    words = [
        *SMALL,
        f"run_dir={folder}",
        "prompts_per_step=1",
        "grpo.group_size=2",
    ]
    words += ["generator.sampler.num_steps=3", "generator.sampler.stochastic_range=1"]
    words += ["rewards.descore.weight=0", "rewards.brightness.weight=1"]
    cfg = load(GrpoRun, ROOT / "configs/wan/grpo.yaml", words)
    cfg = replace(cfg, rewards={"brightness": cfg.rewards["brightness"]})
    generator = random_wan(cfg.generator)
    loop, engine = loop_of(cfg, [PROMPT], generator, {"brightness": Brightness()})
    with generator.given_prompts(
        {PROMPT: embedding(0), cfg.generator.sampler.negative_prompt: embedding(1)}
    ):
        result = loop.step(0)
    metrics = result.metrics
    moved = sum(
        float(p.detach().abs().sum())
        for n, p in generator.module.named_parameters()
        if "lora_B" in n
    )
    facts = {
        "grad_norm": metrics["train/grad_norm"],
        "lora_B": moved,
        "not_finite": loop.engine.pop_skipped_count(),
    }
    plan = plan_grpo(cfg, Where(DEVICES["h100"]))
    return FullSizeResult(
        plan, sum(p.numel() for p in engine.module.parameters()), facts
    )


def dpo(folder: Path) -> FullSizeResult:
    """One step of configs/wan/dpo.yaml on one pair of random latents, through the store that launch/pairs.py writes."""
    import torch

    from alignment.pair_store import LatentPair, PairSet, write_pairs
    from common.config import load
    from launch.dpo import loop_of
    from launch.planning.plan import DEVICES, Where
    from launch.planning.runs import plan_dpo
    from launch.schemas.pairs import DpoRun

    words = [
        *SMALL,
        f"run_dir={folder}",
        f"pairs={folder / 'pairs'}",
        "dpo.pairs_per_step=1",
    ]
    words += ["optimizer.warmup_steps=0"]
    cfg = load(DpoRun, ROOT / "configs/wan/dpo.yaml", words)
    chosen, rejected = (
        torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        for seed in (2, 3)
    )
    pair = LatentPair(PROMPT, chosen, rejected, embedding(0))
    write_pairs(
        folder / "pairs", iter([pair]), per_shard=1, dtype=torch.float32, about={}
    )
    generator = random_wan(cfg.generator, vae=False)
    loop, engine = loop_of(cfg, PairSet(folder / "pairs"), generator, accumulation=1)
    metrics = loop.step(0)
    facts = {"loss": metrics["train/loss"], "grad_norm": metrics["train/grad_norm"]}
    plan = plan_dpo(cfg, Where(DEVICES["h100"]))
    return FullSizeResult(
        plan, sum(p.numel() for p in engine.module.parameters()), facts
    )


def cold_start(folder: Path) -> FullSizeResult:
    """A video file judged, at once and behind a chain of thought that never ends, and one step of stage 1 on a pair."""
    import torch

    from common.config import load
    from common.video_io import write_mp4
    from launch.cold_start import loop_of
    from launch.planning.models import Lengths
    from launch.planning.plan import DEVICES, Where
    from launch.planning.runs import plan_reward_model
    from launch.schemas.training import ColdStartRun
    from rm.data import Pair
    from rm.scorer import DeScoreScorer
    from rm.video import prepare

    words = [
        f"base={JUDGE}",
        f"run_dir={folder}",
        "dtype=float32",
        "cold_start.pairs_per_step=1",
    ]
    words += [
        "data.train=none.csv",
        "generation.max_new_tokens=4",
        "zero_stage=1",
        "optimizer.warmup_steps=0",
    ]
    cfg = load(ColdStartRun, ROOT / "configs/wan/cold_start.yaml", words)
    files = [folder / f"{side}.mp4" for side in "AB"]
    for seed, file in enumerate(files):
        draw = torch.Generator().manual_seed(seed)
        small = torch.randint(0, 256, (8, 8, 8, 3), generator=draw, dtype=torch.uint8)
        write_mp4(file, small.repeat_interleave(16, 1).repeat_interleave(16, 2), 4.0)
    model = random_judge(cfg)
    at_once = DeScoreScorer(model, chains=0).score(files, [PROMPT] * 2).value_B.tolist()
    thought = DeScoreScorer(model).score(files[:1], [PROMPT])
    video = prepare(files[0], model.settings)
    tokens = len(model.encode(PROMPT, video, "word " * 40).ids)
    pair = Pair(PROMPT, *files, "word " * 40, "word " * 40, 1)
    loop, engine = loop_of(cfg, [pair], model.train(), accumulation=1)
    metrics = loop.step(0)
    facts = {
        "rewards": [round(value, 4) for value in at_once],
        "unfinished_chain": "not judged"
        if bool(thought.value_B.isnan().all())
        else "JUDGED",
        "words_written": len(thought.texts[0]),
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
        "tokens": tokens,
    }
    seen = video.grid[0] * video.grid[1] * video.grid[2] // 4
    plan = plan_reward_model(
        cfg,
        Where(DEVICES["h100"]),
        Lengths(video.grid, seen, prompt=tokens - seen, chain=0),
    )
    return FullSizeResult(
        plan, sum(p.numel() for p in engine.module.parameters()), facts
    )


def random_wan(cfg: GeneratorConfig, *, vae: bool = True) -> WanGenerator:
    """Of its published size, as `WanGenerator.load` makes one, but for the weights and the text encoder."""
    import torch
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    from generator import adapter
    from generator.wan import WanGenerator
    from launch.planning.known_models import WAN, WAN_VAE

    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config(WAN[cfg.path]).eval()
    transformer.enable_gradient_checkpointing()
    with torch.no_grad():  # its last layer starts as zeros in training from nothing, which would hide what is before
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    eye = (
        AutoencoderKLWan.from_config(WAN_VAE).eval().requires_grad_(requires_grad=False)
        if vae
        else None
    )
    schedule = FlowMatchEulerDiscreteScheduler(shift=cfg.sampler.shift)
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=eye,
        transformer=transformer,
        scheduler=schedule,
    )
    module = adapter.attach(transformer, cfg.lora, seed=0).eval()
    return WanGenerator(cfg, pipeline, module, torch.device("cpu"))


def random_judge(cfg: Any) -> DeScore:
    """Of the published size on random weights; its texts are read by the embedded world's tokenizer."""
    import torch
    from transformers import (
        AutoTokenizer,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    from launch.planning.known_models import QWEN3_VL
    from rm.model import DeScore
    from rm.prompt import DEFAULT_TEMPLATE, VIDEO_PAD, token_id

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(
        (ROOT / "assets" / "shapes" / "qwen").as_posix()
    )
    config = Qwen3VLConfig(
        **QWEN3_VL[JUDGE], video_token_id=token_id(tokenizer, VIDEO_PAD)
    )
    backbone = Qwen3VLForConditionalGeneration(config).eval()
    query = max(tokenizer.get_vocab().values()) + 1
    return DeScore(
        backbone, tokenizer, DEFAULT_TEMPLATE, cfg.video, query, cfg.generation
    )


def embedding(seed: int) -> Tensor:
    """What the text encoder would say of a prompt: (L, D) without padding."""
    import torch

    return torch.randn(TEXT_ROWS, 4096, generator=torch.Generator().manual_seed(seed))


def _import_all() -> None:
    """What the parts use, before memory is counted."""
    import deepspeed  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


PARTS: dict[str, Callable[[Path], FullSizeResult]] = {
    "grpo": grpo,
    "dpo": dpo,
    "cold_start": cold_start,
}


if __name__ == "__main__":
    main()
