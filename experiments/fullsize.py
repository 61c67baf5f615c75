"""Run the models at their true size on a CPU with 24 GiB: `make fullsize`.

Wan 2.1 1.3B and Qwen3-VL 2B have their published configs and random weights, in fp32 because most
CPUs emulate bfloat16. The ordinary recipes and loops make a GRPO update, a DPO step, scores of
DeScore and a cold-start step. Each part runs in its process, whose peak memory is compared with the
prediction of ``--dry-run``. The text encoder (22.7 GB in fp32) is left out: embeddings of the
prompt are random. Results: docs/results/fullsize.json.
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

from experiments.runner import ROOT, commit, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from generator.config import GeneratorConfig
    from generator.wan import WanGenerator
    from launch.planning.plan import Plan
    from launch.schemas.training import ColdStartRun
    from rm.model import DeScore

# The JSON names it.
COMMAND = "python experiments/fullsize.py"
# Inputs of all parts.
PROMPT = "A paper boat drifts down a gutter in the rain."
COT = "word " * 40
# A small video: memory is mostly weights.
WAN_SIZE = (
    "generator.height=128",
    "generator.width=128",
    "generator.num_frames=9",
    "generator.dtype=float32",
)
REWARD_MODEL = "Qwen/Qwen3-VL-2B-Instruct"
# The C library returns freed memory to the system, as the allocator of a GPU counts it.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
# Tokens of the prompt, before padding to 512.
TEXT_TOKENS = 24


@dataclass(frozen=True)
class FullSizeResult:
    """The plan of a part, its module, and its figures."""

    plan: Plan
    module: nn.Module
    facts: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run every part in its process and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument(
        "--part", choices=PARTS, help="run this part and print its JSON"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.part is not None:
        # A part runs here, and its parent reads the last line.
        print(json.dumps(measure_part(PARTS[args.part], threads=args.threads)))
        return

    # Run the parts after each other.
    began = time.time()
    threads = str(args.threads)
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": threads,
    }
    parts = {}
    for part in PARTS:
        process = subprocess.run(
            [sys.executable, __file__, "--part", part, "--threads", threads],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        last_line = process.stdout.splitlines()[-1]
        parts[part] = json.loads(last_line)
        print(f"{part:10} {last_line}", flush=True)

    record = {
        "command": COMMAND,
        "commit": commit(),
        "threads": args.threads,
        "parts": parts,
        "minutes": round((time.time() - began) / 60, 1),
    }
    path = args.out / "fullsize.json"
    write_json(path, record)
    print(f"{record['minutes']} minutes; {path}")


def measure_part(
    part: Callable[[Path], FullSizeResult], *, threads: int
) -> dict[str, Any]:
    """Run a part; return its figures, its seconds, and its peak memory with the prediction."""
    from common import distributed
    from common.memory import peak_memory
    from launch.compose import quiet
    from launch.planning.plan import GIB, RESERVE

    quiet()
    _import_libraries()
    import torch

    torch.set_num_threads(threads)
    distributed.init_process_group()

    # Memory of the libraries does not count.
    libraries = _resident_bytes()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        result = part(Path(folder))
    process = peak_memory()["memory/peak_gb"] * GIB
    peak = process - libraries
    predicted = result.plan.peak - RESERVE
    distributed.shutdown()
    return {
        "parameters": sum(p.numel() for p in result.module.parameters()),
        "seconds": round(time.time() - began, 1),
        "peak_gib": round(peak / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "off": round(predicted / peak - 1, 3),
        "process_gib": round(process / GIB, 2),
        **result.facts,
    }


def grpo(folder: Path) -> FullSizeResult:
    """Make an update of configs/wan/grpo.yaml on two videos, with brightness as reward."""
    # Heavy imports belong to the process of the part.
    from alignment.rewards.brightness import Brightness
    from common.config import load
    from launch.planning.plan import DEVICES, Where
    from launch.planning.runs import plan_grpo
    from launch.schemas.training import GrpoRun
    from launch.training.grpo_loop import loop_of

    # Two videos of three steps with guidance.
    words = [
        *WAN_SIZE,
        f"run_dir={folder}",
        "prompts_per_step=1",
        "grpo.group_size=2",
        "generator.sampler.num_steps=3",
        "generator.sampler.stochastic_range=1",
        "rewards.descore.weight=0",
        "rewards.brightness.weight=1",
    ]
    cfg = load(GrpoRun, ROOT / "configs/wan/grpo.yaml", words)

    # DeScore is measured by another part.
    cfg = replace(cfg, rewards={"brightness": cfg.rewards["brightness"]})
    generator = random_wan(cfg.generator)
    loop = loop_of(cfg, [PROMPT], generator, {"brightness": Brightness()})

    # The update.
    embeddings = {
        PROMPT: random_embedding(0),
        cfg.generator.sampler.negative_prompt: random_embedding(1),
    }
    with generator.given_prompts(embeddings):
        metrics = loop.step(0).metrics

    # SUM of the adapter's output matrices, which start as zeros.
    moved = 0.0
    for name, parameter in generator.module.named_parameters():
        if "lora_B" in name:
            moved += float(parameter.detach().abs().sum())
    facts = {
        "grad_norm": metrics["train/grad_norm"],
        "lora_B": moved,
        "not_finite": loop.engine.pop_skipped_count(),
    }
    return FullSizeResult(
        plan_grpo(cfg, Where(DEVICES["h100"])), generator.module, facts
    )


def dpo(folder: Path) -> FullSizeResult:
    """Make a step of configs/wan/dpo.yaml on a stored pair of random latents."""
    import torch

    from alignment.pair_store import LatentPair, PairSet, write_pairs
    from common.config import load
    from launch.planning.plan import DEVICES, Where
    from launch.planning.runs import plan_dpo
    from launch.schemas.pairs import DpoRun
    from launch.training.dpo_loop import loop_of

    store = folder / "pairs"

    # The first step has its full learning rate.
    words = [
        *WAN_SIZE,
        f"run_dir={folder}",
        f"pairs={store}",
        "dpo.pairs_per_step=1",
        "optimizer.warmup_steps=0",
    ]
    cfg = load(DpoRun, ROOT / "configs/wan/dpo.yaml", words)

    # Store the pair.
    latents = []
    for seed in (2, 3):
        draw = torch.Generator().manual_seed(seed)
        latents.append(torch.randn(16, 3, 16, 16, generator=draw))
    pair = LatentPair(PROMPT, *latents, random_embedding(0))
    write_pairs(store, iter([pair]), per_shard=1, dtype=torch.float32, about={})

    # The step.
    generator = random_wan(cfg.generator, vae=False)
    loop = loop_of(cfg, PairSet(store), generator, accumulation=1)
    metrics = loop.step(0)
    facts = {
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
    }
    return FullSizeResult(
        plan_dpo(cfg, Where(DEVICES["h100"])), generator.module, facts
    )


def cold_start(folder: Path) -> FullSizeResult:
    """Score video files, with and without a CoT, and make a step of stage 1 on a pair."""
    from common.config import load
    from launch.cold_start import loop_of
    from launch.planning.models import Lengths
    from launch.planning.plan import DEVICES, Where
    from launch.planning.runs import plan_reward_model
    from launch.schemas.training import ColdStartRun
    from rm.data import Pair
    from rm.scorer import DeScoreScorer
    from rm.video import prepare

    # A CoT of four tokens ends before it is complete.
    words = [
        f"base={REWARD_MODEL}",
        f"run_dir={folder}",
        "dtype=float32",
        "cold_start.pairs_per_step=1",
        "data.train=none.csv",
        "generation.max_new_tokens=4",
        "zero_stage=1",
        "optimizer.warmup_steps=0",
    ]
    cfg = load(ColdStartRun, ROOT / "configs/wan/cold_start.yaml", words)
    files = _write_videos(folder)
    model = random_descore(cfg)

    # Score without a CoT, then with a CoT that its limit cuts off, which gives NaN.
    without_cot = DeScoreScorer(model, chains=0).score(files, [PROMPT] * 2)
    with_cot = DeScoreScorer(model).score(files[:1], [PROMPT])
    unscored = bool(with_cot.value_B.isnan().all())

    # A step of stage 1.
    video = prepare(files[0], model.settings)
    tokens = len(model.encode(PROMPT, video, COT).ids)
    pair = Pair(PROMPT, *files, COT, COT, 1)
    loop, engine = loop_of(cfg, [pair], model.train(), accumulation=1)
    metrics = loop.step(0)
    facts = {
        "rewards": [round(value, 4) for value in without_cot.value_B.tolist()],
        "unfinished_chain": "not judged" if unscored else "JUDGED",
        "words_written": len(with_cot.texts[0]),
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
        "tokens": tokens,
    }

    # The plan counts the CoT as part of the prompt. Four patches make a token.
    frames, height, width = video.grid
    video_tokens = frames * height * width // 4
    lengths = Lengths(
        video.grid,
        video_tokens,
        prompt=tokens - video_tokens,
        chain=0,
    )
    plan = plan_reward_model(cfg, Where(DEVICES["h100"]), lengths)
    return FullSizeResult(plan, engine.module, facts)


def _write_videos(folder: Path) -> list[Path]:
    """Write two videos of random colours, 128 x 128 pixels and 8 frames."""
    import torch

    from common.video_io import write_mp4

    files = [folder / "A.mp4", folder / "B.mp4"]
    for seed, file in enumerate(files):
        draw = torch.Generator().manual_seed(seed)
        small = torch.randint(0, 256, (8, 8, 8, 3), generator=draw, dtype=torch.uint8)
        large = small.repeat_interleave(16, 1).repeat_interleave(16, 2)
        write_mp4(file, large, 4.0)
    return files


def random_wan(cfg: GeneratorConfig, *, vae: bool = True) -> WanGenerator:
    """Make Wan of its published size with random weights and without a text encoder."""
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

    # The published size on random weights.
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config(WAN[cfg.path]).eval()
    transformer.enable_gradient_checkpointing()

    # The last layer starts as zeros, which would hide the layers before it.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    decoder = None
    if vae:
        decoder = AutoencoderKLWan.from_config(WAN_VAE).eval()
        decoder.requires_grad_(requires_grad=False)

    # Prompts are given as embeddings.
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=decoder,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.sampler.shift),
    )
    module = adapter.attach(transformer, cfg.lora, seed=0).eval()
    return WanGenerator(cfg, pipeline, module, torch.device("cpu"))


def random_descore(cfg: ColdStartRun) -> DeScore:
    """Make DeScore of its published size with random weights and a small tokenizer."""
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
    folder = ROOT / "assets" / "shapes" / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(folder.as_posix())

    config = Qwen3VLConfig(
        **QWEN3_VL[REWARD_MODEL],
        video_token_id=token_id(tokenizer, VIDEO_PAD),
    )
    return DeScore(
        Qwen3VLForConditionalGeneration(config).eval(),
        tokenizer,
        DEFAULT_TEMPLATE,
        cfg.video,
        max(tokenizer.get_vocab().values()) + 1,
        cfg.generation,
    )


def random_embedding(seed: int) -> Tensor:
    """Draw the text encoder's output for a prompt: (L, D) without padding."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return torch.randn(TEXT_TOKENS, 4096, generator=draw)


def _import_libraries() -> None:
    """Import all that the parts use, before memory is counted."""
    import deepspeed  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


PARTS: dict[str, Callable[[Path], FullSizeResult]] = {
    "grpo": grpo,
    "dpo": dpo,
    "cold_start": cold_start,
}


if __name__ == "__main__":
    main()
