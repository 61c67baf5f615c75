"""Turn a checkpoint of the official DeScore release into a folder that everything here reads.

    python launch/convert_descore.py --official checkpoint-1000 --out descore --prompt instruction.txt --allow-pickle
    python launch/convert_descore.py --official merged --no-lora --head rm_head.safetensors --out descore

The first is stage 1's layout; the second what stage 2's FSDP shards give once merged. The head is a pickle there: it
is read only with --allow-pickle, tensors only. LoRA is merged in fp32. The folder needs nothing else:
``DeScoreScorer.load("descore")``, ``rewards.descore.checkpoint=descore``, ``checkpoint=descore`` of launch/dual_rl.py.
See rm/convert/official.py for what becomes of each part, and for what the official inference does otherwise.
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
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    parser.add_argument(
        "--official",
        required=True,
        **folder,
        help="checkpoint-N: weights, lora_adapter/, tokenizer",
    )
    parser.add_argument(
        "--out",
        required=True,
        **folder,
        help="the folder to write; must be new or empty",
    )
    parser.add_argument(
        "--head",
        **file,
        help=".safetensors or .pth; else among the weights or beside them",
    )
    parser.add_argument(
        "--base",
        **folder,
        help="a Qwen3-VL whose config.json to use if the checkpoint has none",
    )
    parser.add_argument(
        "--prompt",
        **file,
        help="prompt.json, or a text with [insert prompt here] and <video>",
    )
    parser.add_argument(
        "--video",
        **file,
        help="video.json; else 2 fps and 448 x 448 pixels a frame, as trained",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="LoRA's, if not 128, which the official adapter_config always says",
    )
    parser.add_argument(
        "--no-lora", action="store_true", help="the checkpoint has no lora_adapter/"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .pth head, tensors only"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 is half the size and less exact",
    )
    args = parser.parse_args(argv)
    try:
        _convert(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _convert(args: argparse.Namespace) -> None:
    """Read, write, and say what was taken from where. Nothing is written unless everything could be read."""
    check_new_folder(args.out)
    from launch.compose import quiet

    quiet()
    from rm.config import VideoSettings
    from rm.convert.official import convert, read_template
    from rm.prompt import DEFAULT_TEMPLATE

    template = DEFAULT_TEMPLATE if args.prompt is None else read_template(args.prompt)
    conversion = convert(
        args.official,
        template=template,
        settings=None if args.video is None else VideoSettings.load(args.video),
        head=args.head,
        base=args.base,
        lora=not args.no_lora,
        alpha=args.alpha,
        allow_pickle=args.allow_pickle,
        dtype=args.dtype,
    )
    judge = conversion.judge
    judge.save(args.out)
    print(
        f"{args.out}: {args.dtype}, LoRA merged into {conversion.merged} linears, head from {conversion.head_from}"
    )
    print(f"query: id {judge.query_id}; the tokenizer no longer knows <Reward>")
    print(
        f"video: {judge.settings.fps:g} fps, at most {judge.settings.max_pixels} pixels a {judge.settings.budget}"
    )
    if args.prompt is None:
        print(
            "prompt: NOT the one it was trained with but this framework's own; --prompt takes the official text"
        )
    else:
        print(f"prompt: {args.prompt}")


if __name__ == "__main__":
    main()
