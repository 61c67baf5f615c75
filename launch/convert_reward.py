"""Convert the published VideoReward or HPSv3 into a folder that the rewards of those names read.

    python launch/convert_reward.py videoreward --official VideoReward \\
        --base Qwen2-VL-2B-Instruct --instruction instruction.txt --out models/videoreward \\
        --allow-pickle
    python launch/convert_reward.py hpsv3 --official HPSv3.safetensors \\
        --base Qwen2-VL-7B-Instruct --instruction instruction.txt --out models/hpsv3

Config and tokenizer are the base's; its weights are not read. The instruction is a text file with
the model's exact words, which its repository has (rm/baselines/load_published.py says where).
VideoReward's weights are a pickle, which is read only with --allow-pickle, and only its tensors;
its LoRA is merged in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.cli import check_new_folder, new_folder_parser, user_errors


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_folder_parser(__doc__)
    add = parser.add_argument
    add("kind", choices=("videoreward", "hpsv3"))
    add(
        "--official",
        required=True,
        type=Path,
        metavar="PATH",
        help="the published folder or file",
    )
    add(
        "--base",
        required=True,
        type=Path,
        metavar="DIR",
        help="the Qwen2-VL it was trained from: config.json and tokenizer",
    )
    add(
        "--instruction",
        required=True,
        type=Path,
        metavar="FILE",
        help="text with {text_prompt} and the reward tokens",
    )
    add("--allow-pickle", action="store_true", help="read a .pth, tensors only")
    # The reward head stays in float32.
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="the backbone's dtype",
    )
    args = parser.parse_args(argv)
    with user_errors():
        convert_folder(args)


def convert_folder(args: argparse.Namespace) -> None:
    """Convert the checkpoint; nothing is written unless everything could be read."""
    check_new_folder(args.out)

    # Heavy imports come after the check of the options.
    from launch.compose import quiet

    quiet()
    from rm.baselines.load_published import read_hpsv3, read_videoreward

    # Only VideoReward is published as a pickle.
    options = {"base": args.base, "instruction": args.instruction, "dtype": args.dtype}
    if args.kind == "videoreward":
        options["allow_pickle"] = args.allow_pickle
        loaded = read_videoreward(args.official, **options)
    else:
        loaded = read_hpsv3(args.official, **options)

    # Write our layout.
    loaded.model.save(args.out)

    # Print how the reward model reads a video.
    layout = loaded.model.layout
    settings = layout.settings
    print(
        f"{args.out}: {args.dtype}, {loaded.tensors} tensors of {loaded.source}, "
        f"LoRA merged into {loaded.merged} linears"
    )
    print(f"gives {', '.join(layout.outputs)} at {', '.join(layout.tokens)}")
    rate = f"{settings.fps:g} frames a second, " if layout.media == "video" else ""
    print(f"sees {rate}{settings.min_pixels} to {settings.max_pixels} pixels each")
    for name, (mean, std) in layout.normal.items():
        print(f"{name}: (x - {mean:g}) / {std:g}")
    print(
        f"next: rewards.{args.kind}.checkpoint={args.out} in a run that scores with it"
    )


if __name__ == "__main__":
    main()
