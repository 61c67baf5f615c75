"""Turn the published VideoReward or HPSv3 into a folder that the rewards of those names read.

    python launch/convert_reward.py videoreward --official VideoReward --base Qwen2-VL-2B-Instruct \\
        --instruction instruction.txt --out models/videoreward --allow-pickle
    python launch/convert_reward.py hpsv3 --official HPSv3.safetensors --base Qwen2-VL-7B-Instruct \\
        --instruction instruction.txt --out models/hpsv3

Config and tokenizer are the base's; its weights are not read. The instruction is a text file with the model's own
words, which its repository has (rm/baselines/load_published.py says where). VideoReward's weights are a pickle, read only with
--allow-pickle, tensors only; its LoRA is merged in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.cli import check_new_folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("kind", choices=("videoreward", "hpsv3"))
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    parser.add_argument(
        "--official",
        required=True,
        type=Path,
        metavar="PATH",
        help="the published folder or file",
    )
    parser.add_argument(
        "--base",
        required=True,
        **folder,
        help="the Qwen2-VL it began as: config.json and tokenizer",
    )
    parser.add_argument(
        "--instruction",
        required=True,
        **file,
        help="text with {text_prompt} and the reward tokens",
    )
    parser.add_argument(
        "--out",
        required=True,
        **folder,
        help="the folder to write; must be new or empty",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .pth, tensors only"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the backbone",
    )
    args = parser.parse_args(argv)
    try:
        _convert(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _convert(args: argparse.Namespace) -> None:
    """Nothing is written unless everything could be read."""
    check_new_folder(args.out)
    from launch.compose import quiet

    quiet()
    from rm.baselines.load_published import read_hpsv3, read_videoreward

    options = {"base": args.base, "instruction": args.instruction, "dtype": args.dtype}
    if args.kind == "videoreward":
        read = read_videoreward(
            args.official, allow_pickle=args.allow_pickle, **options
        )
    else:
        read = read_hpsv3(args.official, **options)
    read.judge.save(args.out)
    settings, layout = read.judge.layout.settings, read.judge.layout
    print(
        f"{args.out}: {args.dtype}, {read.tensors} tensors of {read.source}, LoRA merged into {read.merged} linears"
    )
    print(f"gives {', '.join(layout.outputs)} at {', '.join(layout.tokens)}")
    seen = f"{settings.fps:g} frames a second, " if layout.media == "video" else ""
    print(f"sees {seen}{settings.min_pixels} to {settings.max_pixels} pixels each")
    for name, (mean, std) in layout.normal.items():
        print(f"{name}: (x - {mean:g}) / {std:g}")


if __name__ == "__main__":
    main()
