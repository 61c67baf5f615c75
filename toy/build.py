"""Build the tiny base models of the embedded world from nothing: `python toy/build.py`.

Writes ordinary `from_pretrained` folders: `assets/shapes/wan` (a WanPipeline) and
`assets/shapes/qwen` (a Qwen3VLForConditionalGeneration with tokenizer). An interrupted stage
continues from its last saved state when the command is started again. The stages:

    prompts  training and held-out prompts with disjoint combinations of attributes
    vae      AutoencoderKLWan on rendered clips
    wan      WanTransformer3DModel and UMT5 by flow matching on captions that are sometimes wrong
    anyflow  a flow map distilled from that Wan, which samples in one to four forwards
    qwen     Qwen3-VL on renders, then on videos of that Wan, describing and answering
    shuffled a control: the last part of qwen on shuffled annotations, measured and not saved

Every stage measures on held-out data, prints the result and writes it to ``STAGE.measured.json``.
Together they take hours on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

STAGES = ("prompts", "vae", "wan", "anyflow", "qwen", "shuffled")


def write_prompts(out: Path, work: Path, *, steps: int | None) -> dict[str, int]:
    """Write a caption of every training combination and 240 captions of held-out ones."""
    from toy.world import caption, captions, split_attributes

    rng = random.Random("prompts")
    train, heldout = split_attributes()
    files = {
        "train": [caption(a, wording=rng.randrange(4)) for a in train],
        "heldout": rng.sample(captions(heldout), 240),
    }
    for name, prompts in files.items():
        text = "\n".join(prompts) + "\n"
        (out / f"prompts_{name}.txt").write_text(text, encoding="utf-8")
    return {name: len(prompts) for name, prompts in files.items()}


def main() -> None:
    """Run the stages of the command line in their order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("assets/shapes"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/build_shapes"),
        help="folder for the state of unfinished stages",
    )
    parser.add_argument("--steps", type=int, help="steps of every stage, for a trial")
    args = parser.parse_args()

    import torch

    from toy import build_anyflow, build_qwen, build_vae, build_wan

    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "prompts": write_prompts,
        "vae": build_vae.build,
        "wan": build_wan.build,
        "anyflow": build_anyflow.build,
        "qwen": build_qwen.build,
        "shuffled": build_qwen.build_shuffled,
    }
    for name in args.stages:
        measured = stages[name](args.out, args.work, steps=args.steps)
        text = json.dumps(measured, indent=1) + "\n"
        (args.out / f"{name}.measured.json").write_text(text, encoding="utf-8")
        print(f"{name}: {json.dumps(measured)}")


if __name__ == "__main__":
    main()
