"""Build the embedded world's tiny base models from nothing: `python toy/build.py`.

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
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

STAGES = ("prompts", "vae", "wan", "qwen")


def write_prompts(out: Path, work: Path, *, steps: int | None) -> dict[str, int]:
    """One wording of every training combination, 240 wordings of held-out ones."""
    import random

    from toy.world import caption, captions, split_attributes

    rng = random.Random("prompts")
    train, heldout = split_attributes()
    files = {
        "train": [caption(a, wording=rng.randrange(4)) for a in train],
        "heldout": rng.sample(captions(heldout), 240),
    }
    for name, prompts in files.items():
        (out / f"prompts_{name}.txt").write_text(
            "\n".join(prompts) + "\n", encoding="utf-8"
        )
    return {name: len(prompts) for name, prompts in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("assets/shapes"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/build_shapes"),
        help="state of unfinished stages",
    )
    parser.add_argument(
        "--steps", type=int, help="instead of the stage's own number, for a trial"
    )
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    from toy import build_qwen, build_vae, build_wan

    args.work.mkdir(parents=True, exist_ok=True)
    build = {
        "prompts": write_prompts,
        "vae": build_vae.build,
        "wan": build_wan.build,
        "qwen": build_qwen.build,
    }
    for stage in args.stages:
        measured = build[stage](args.out, args.work, steps=args.steps)
        (args.out / f"{stage}.measured.json").write_text(
            json.dumps(measured, indent=1) + "\n", encoding="utf-8"
        )
        print(f"{stage}: {json.dumps(measured)}")


if __name__ == "__main__":
    main()
