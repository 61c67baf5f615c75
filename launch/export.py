"""Write what a run trained in a layout that others load, with a model card, and push it to the hub if asked.

    python launch/export.py runs/wan/grpo/final --format diffusers --out wan_lora
    python launch/export.py runs/wan/grpo/final --format comfyui --out wan_comfyui
    python launch/export.py runs/wan/grpo/final --format merged --out wan_merged --push OWNER/NAME
    python launch/export.py runs/wan/descore/final --format merged --out descore --push OWNER/NAME --public

A generator's adapter becomes a LoRA for stock `WanPipeline.load_lora_weights`, one for ComfyUI, or a whole transformer
with the adapter merged in fp32. A transformer that was trained whole, and a DeScore, have the format merged only. What
is pushed is private without --public. Nothing is written unless everything could be read and fits.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.cli import check_new_folder

if TYPE_CHECKING:
    from generator.adapter_file import StoredAdapter
    from launch.release.model_card import WrittenFiles
    from launch.release.provenance import Origin

ADAPTER, JUDGE, TRANSFORMER = (
    "pytorch_lora_weights.safetensors",
    "descore.json",
    "transformer/config.json",
)
FORMATS = ("diffusers", "comfyui", "merged")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "trained", type=Path, metavar="DIR", help="final/ or final_ema/ of a run"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="the folder to write; new or empty",
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="the Wan that was trained, else as the run's config.yaml says",
    )
    parser.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="its hub name, for the card, if that does not say it",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to this repository, a private one",
    )
    parser.add_argument("--public", action="store_true", help="a public one")
    args = parser.parse_args(argv)
    if args.public and not args.push:
        parser.error("--public goes with --push")
    try:
        export(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if args.push:
        from launch.release.hub import PushError, push

        try:
            print(f"pushed to {push(args.out, args.push, public=args.public)}")
        except PushError as error:
            parser.exit(
                1, f"{parser.prog}: {args.out} is written, but not pushed: {error}\n"
            )


def export(args: argparse.Namespace) -> None:
    """Read, write, and say what was written. Errors name the file, and the option that would help."""
    check_new_folder(args.out)
    kind = kind_of(args.trained)
    if kind != "adapter" and args.format != "merged":
        raise ValueError(
            f"{args.trained} holds a whole {kind}, and --format {args.format} is for adapters; try merged"
        )
    if kind == "judge" and args.base:
        raise ValueError(f"--base is for generators, and {args.trained} holds a judge")
    from launch.compose import quiet

    quiet()
    from launch.release import hub, model_card
    from launch.release.provenance import is_hub_name, origin_of

    for repo_id in (name for name in (args.push, args.base_model) if name):
        hub.check_repo_id(repo_id)
    origin = origin_of(args.trained)
    write = {
        "adapter": export_adapter,
        "transformer": export_transformer,
        "judge": export_judge,
    }[kind]
    written = write(args, origin)
    base_model = args.base_model or (
        args.base if is_hub_name(args.base) else origin.base_model
    )
    text = model_card.card(written, origin, base_model=base_model, repo_id=args.push)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    for fact in written.facts:
        print(f"{args.out}: {fact}")
    print(
        f"{args.out}/README.md: base_model {base_model or 'not known by a hub name; --base-model gives one'}"
    )


def kind_of(trained: Path) -> Literal["adapter", "transformer", "judge"]:
    """By what a folder holds. ValueError where that is nothing, or more than one of them."""
    holds = {"adapter": ADAPTER, "transformer": TRANSFORMER, "judge": JUDGE}
    found = [kind for kind, name in holds.items() if (trained / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{trained} holds both {' and '.join(holds[kind] for kind in found)}"
        )
    hint = f"; is it {trained / 'final'}?" if (trained / "final").is_dir() else ""
    raise ValueError(
        f"{trained} is nothing that a run trained: it holds none of {', '.join(holds.values())}{hint}"
    )


def export_adapter(args: argparse.Namespace, origin: Origin) -> WrittenFiles:
    """In the layout of args.format."""
    from generator import adapter_file, weights
    from launch.release.model_card import WrittenFiles

    adapter = adapter_file.read(args.trained)
    what = f"LoRA of {len(adapter.pairs)} linears, rank {adapter.rank}, alpha {adapter.alpha:g}"
    if args.format == "merged":
        return export_merged(args, origin, adapter, what)
    if (base := args.base or origin.base_path) and Path(base).is_dir():
        adapter_file.require_fit(
            adapter, weights.shapes_of(weights.read_config(Path(base)))
        )
    elif args.base:
        raise ValueError(
            f"--base {args.base} is no folder, and --format {args.format} needs none"
        )
    if args.format == "diffusers":
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter.source, args.out / ADAPTER)
        return WrittenFiles("lora", [f"{what}, as trained"], file=ADAPTER)
    from safetensors.torch import save_file

    tensors, name = (
        adapter_file.comfyui(adapter),
        f"{args.out.resolve().name}.safetensors",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / name, metadata={"format": "pt"})
    return WrittenFiles(
        "comfyui",
        [f"{what}, {len(tensors)} tensors under the names of Wan's own code"],
        file=name,
    )


def export_merged(
    args: argparse.Namespace, origin: Origin, adapter: StoredAdapter, what: str
) -> WrittenFiles:
    """The base's transformer with the adapter in it."""
    from generator import adapter_file, weights
    from launch.release.model_card import WrittenFiles

    base = args.base or origin.base_path
    if base is None:
        raise ValueError(
            f"{args.trained} has no config.yaml above it that says what was trained; give --base"
        )
    stored = weights.read(local_base(base))
    merged = adapter_file.merge(stored.state, adapter)
    weights.write(weights.Stored(stored.config, merged.state), args.out)
    dtypes = sorted(
        {
            str(merged.state[f"{name}.weight"].dtype).removeprefix("torch.")
            for name in adapter.pairs
        }
    )
    into = f"merged in float32 and stored in the base's {', '.join(dtypes)}"
    lost = (
        [f"rounding takes {merged.lost:.2g} of what was merged in"]
        if merged.lost
        else []
    )
    return WrittenFiles("transformer", [f"{what}, {into}", *lost])


def local_base(base: str) -> Path:
    """A folder with transformer/ in it: the path itself, or a hub name's from the cache or the network."""
    from launch.release.provenance import is_hub_name

    if Path(base).is_dir():
        return Path(base)
    if not is_hub_name(base):
        raise ValueError(f"there is no folder {base}; give --base")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["transformer/*"]))
    except OSError as error:
        raise ValueError(
            f"{base} is not in the cache and cannot be had ({type(error).__name__}); give --base"
        ) from error


def export_transformer(args: argparse.Namespace, origin: Origin) -> WrittenFiles:
    """One that was trained whole, as it is."""
    from generator import weights
    from launch.release.model_card import WrittenFiles

    stored = weights.read(args.trained)
    weights.write(stored, args.out)
    dtypes = sorted(
        {str(weight.dtype).removeprefix("torch.") for weight in stored.state.values()}
    )
    return WrittenFiles(
        "transformer", [f"all {len(stored.state)} weights trained, {', '.join(dtypes)}"]
    )


def export_judge(args: argparse.Namespace, origin: Origin) -> WrittenFiles:
    """A DeScore, whose LoRA is merged since it was saved, as it is."""
    from launch.release.model_card import WrittenFiles
    from rm.convert import release

    judge = release.inspect(args.trained)
    release.copy(judge, args.out)
    names = ", ".join(judge.dimensions)
    facts = [
        f"{judge.tensors} weights of a stock Qwen3-VL, {judge.dtype}, LoRA merged",
        f"descore.safetensors: the query tokens' embeddings and the head in float32; rewards: {names}",
        f"sees {judge.video.fps:g} frames a second, at most {judge.video.max_pixels} pixels a {judge.video.budget}",
    ]
    return WrittenFiles(
        "judge", facts, query_id=judge.query_id, rows=len(judge.dimensions)
    )


if __name__ == "__main__":
    main()
