"""Convert a checkpoint of the official DeScore release into a folder that this project reads.

    python launch/convert_descore.py --official checkpoint-1000 --out descore \\
        --prompt instruction.txt --allow-pickle
    python launch/convert_descore.py --official merged --no-lora --head rm_head.safetensors \\
        --out descore

The first is stage 1's layout, the second the result of merging stage 2's FSDP shards. The official
head is a pickle: it is read only with --allow-pickle, and only its tensors. LoRA is merged in fp32.
The folder is complete: use it as ``DeScoreScorer.load("descore")``,
``rewards.descore.checkpoint=descore``, or ``checkpoint=descore`` of launch/dual_rl.py.
rm/convert/official.py says how each part is converted, and how the official inference differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.cli import check_new_folder, new_folder_parser, user_errors


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_folder_parser(__doc__)
    add = parser.add_argument
    # The checkpoint's parts.
    add("--official", required=True, type=Path, metavar="DIR", help="checkpoint-N")
    add(
        "--head",
        type=Path,
        metavar="FILE",
        help=".safetensors or .pth; default: among the weights or beside them",
    )
    add(
        "--base",
        type=Path,
        metavar="DIR",
        help="a Qwen3-VL whose config.json to use if the checkpoint has none",
    )
    add(
        "--prompt",
        type=Path,
        metavar="FILE",
        help="prompt.json, or a text with [insert prompt here] and <video>",
    )
    add(
        "--video",
        type=Path,
        metavar="FILE",
        help="video.json; default: 2 fps and 448 x 448 pixels a frame, as trained",
    )
    # Corrections of what the checkpoint says or lacks.
    add("--alpha", type=float, help="LoRA's alpha, if adapter_config.json is wrong")
    add("--no-lora", action="store_true", help="the checkpoint has no lora_adapter/")
    add("--allow-pickle", action="store_true", help="read a .pth head, tensors only")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 is half the size and less exact",
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
    from rm.config import VideoSettings
    from rm.convert.official import convert_checkpoint, read_template
    from rm.prompt import DEFAULT_TEMPLATE

    conversion = convert_checkpoint(
        args.official,
        base=args.base,
        head=args.head,
        lora=not args.no_lora,
        alpha=args.alpha,
        allow_pickle=args.allow_pickle,
        template=read_template(args.prompt) if args.prompt else DEFAULT_TEMPLATE,
        settings=VideoSettings.load(args.video) if args.video else None,
        dtype=args.dtype,
    )

    # Write our layout.
    model = conversion.model
    model.save(args.out)

    # Print where each part came from.
    settings = model.settings
    print(
        f"{args.out}: {args.dtype}, LoRA merged into {conversion.merged} linears, "
        f"head from {conversion.head_from}"
    )
    if conversion.lost:
        print(f"rounding takes {conversion.lost:.2g} of what LoRA changed")
    print(f"query: id {model.query_id}; <Reward> is removed from the tokenizer")
    print(
        f"video: {settings.fps:g} fps, at most {settings.max_pixels} pixels a {settings.budget}"
    )
    # A reward model is only as good as the prompt that it was trained with.
    default = "NOT the official text but this project's default; --prompt takes the official text"
    print(f"prompt: {args.prompt or default}")
    print(
        "next: python launch/evaluate.py rm --config configs/wan/evaluate_rm.yaml "
        f"checkpoint={args.out} pairs=PAIRS.csv"
    )


if __name__ == "__main__":
    main()
