"""Build the embedded world's tiny base models from nothing: `python launch/build_shapes.py`.

Writes ordinary `from_pretrained` folders: `assets/shapes/wan` (a WanPipeline) and `assets/shapes/qwen` (a
Qwen3VLForConditionalGeneration with tokenizer). Stages, each resumable (kill it and start it again)::

    prompts  train and held-out prompts, disjoint in their combinations of attributes
    vae    AutoencoderKLWan on rendered clips                      -> oracle agreement, PSNR
    wan    WanTransformer3DModel + UMT5 by flow matching on captions that are sometimes wrong
    qwen   Qwen3-VL learns to see the world, then the videos of that Wan, and to write its judgement

Every stage prints what it measured on held-out data and writes it to ``measured.json`` in the work folder; the final
numbers are in `assets/shapes/README.md`. Hours on a core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGES = ("prompts", "vae", "wan", "qwen")


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    peak: float,
    work: Path,
    evaluate: Callable[[], dict[str, float]],
    every: int = 200,
    slow: str | None = None,
) -> dict[str, float]:
    """AdamW with a linear warm-up of 5 % and a cosine to zero; ``loss_at(step)`` draws its own data from the step.

    The whole state (weights, both Adam moments) is one safetensors file, written every ``every`` steps, so that a
    stopped stage goes on where it was. Parameters with ``slow`` in their name, trained by an earlier stage, take a
    fifth of the rate. Returns the last evaluation.
    """
    import math

    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
    late = [p for k, p in parameters.items() if slow is not None and slow in k]
    new = [p for k, p in parameters.items() if slow is None or slow not in k]
    groups = [{"params": new, "scale": 1.0}, {"params": late, "scale": 0.2}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, betas=(0.9, 0.98), weight_decay=1e-3)
    state_file = work / f"{name}.safetensors"
    start = 0
    if state_file.exists():
        saved = load_file(state_file)
        start = int(saved.pop("step"))
        for key, parameter in parameters.items():
            parameter.data.copy_(saved[f"weight.{key}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(start)),
                "exp_avg": saved[f"first.{key}"],
                "exp_avg_sq": saved[f"second.{key}"],
            }
    measured: dict[str, float] = {}
    began = time.time()
    for step in tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5):
        warm, done = min(1.0, (step + 1) / (0.05 * steps)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * peak * warm * 0.5 * (1 + math.cos(math.pi * done))
        torch.manual_seed(step)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            tensors = {"step": torch.tensor(step + 1)}
            for key, parameter in parameters.items():
                tensors[f"weight.{key}"] = parameter.data.contiguous()
                tensors[f"first.{key}"] = optimizer.state[parameter]["exp_avg"].contiguous()
                tensors[f"second.{key}"] = optimizer.state[parameter]["exp_avg_sq"].contiguous()
            partial = state_file.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(state_file)
            measured = {"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), **evaluate()}
            line = "  ".join(f"{k} {v:.4g}" for k, v in measured.items())
            tqdm.write(f"{name}  {line}  {time.time() - began:.0f} s")
    return measured or evaluate()


def write_prompts(out: Path, work: Path, *, steps: int | None) -> dict[str, int]:
    """One wording of every training combination, 240 wordings of held-out ones."""
    import random

    from common.shapes import caption, captions, split_attributes

    rng = random.Random("prompts")
    train, heldout = split_attributes()
    files = {
        "train": [caption(a, wording=rng.randrange(4)) for a in train],
        "heldout": rng.sample(captions(heldout), 240),
    }
    for name, prompts in files.items():
        (out / f"prompts_{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return {name: len(prompts) for name, prompts in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("assets/shapes"))
    parser.add_argument("--work", type=Path, default=Path("runs/build_shapes"), help="state of unfinished stages")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number, for a trial")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    from launch import build_qwen, build_vae, build_wan

    args.work.mkdir(parents=True, exist_ok=True)
    build = {"prompts": write_prompts, "vae": build_vae.build, "wan": build_wan.build, "qwen": build_qwen.build}
    for stage in args.stages:
        measured = build[stage](args.out, args.work, steps=args.steps)
        (args.out / f"{stage}.measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(f"{stage}: {json.dumps(measured)}")


if __name__ == "__main__":
    main()
