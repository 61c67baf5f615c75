"""Write a trained model in a layout that other programs load, with a model card; push it if asked.

    python launch/export.py runs/wan/grpo/final --format diffusers --out wan_lora
    python launch/export.py runs/wan/grpo/final --format comfyui --out wan_comfyui
    python launch/export.py runs/wan/grpo/final --format merged --out wan --push OWNER/NAME
    python launch/export.py runs/wan/descore/final --format merged --out descore --push O/N --public

A generator's adapter becomes a LoRA for stock `WanPipeline.load_lora_weights`, a LoRA for ComfyUI,
or a whole transformer with the adapter merged in fp32. Adapters of a model with two transformers
(Wan 2.2 A14B) stay two: that of the one for low noise is in transformer_2/. A transformer that was
trained whole and a DeScore have the format merged only. A pushed repository is private without
--public. Nothing is written unless everything could be read and fits.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import check_new_folder, new_folder_parser, user_errors
from common.files import give_usual_mode
from common.run_record import value_at
from launch.release.hub import PushError, check_repo_id, push
from launch.release.model_card import ExportedFiles, model_card
from launch.release.provenance import is_hub_name, read_provenance, run_folder
from launch.reporting.data import config

if TYPE_CHECKING:
    from generator.adapter_file import StoredAdapter

# Each kind of trained folder by the file that shows it.
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SECOND = "transformer_2"
KINDS = {
    ADAPTER_FILE: "adapter",
    f"{SECOND}/{ADAPTER_FILE}": "adapter",
    "transformer/config.json": "transformer",
    "descore.json": "DeScore",
}
FORMATS = ("diffusers", "comfyui", "merged")


def main(argv: Sequence[str] | None = None) -> None:
    # Options.
    parser = new_folder_parser(__doc__)
    add = parser.add_argument
    add(
        "trained",
        type=Path,
        metavar="DIR",
        help="final/ or final_ema/ of a run",
    )
    add("--format", required=True, choices=FORMATS)
    add("--base", metavar="PATH", help="the Wan that was trained; default: the run's")
    add("--base-model", metavar="OWNER/NAME", help="its hub name, for the card")
    add("--push", metavar="OWNER/NAME", help="upload to this repository, as private")
    add("--public", action="store_true", help="push to a public repository")
    args = parser.parse_args(argv)
    if args.public and not args.push:
        parser.error("--public goes with --push")
    with user_errors():
        export_folder(args)

    # Push what is written.
    if args.push:
        try:
            print(f"pushed to {push(args.out, args.push, public=args.public)}")
        except PushError as error:
            text = f"{args.out} is written, but not pushed: {error}"
            parser.exit(1, f"{parser.prog}: {text}\n")


def export_folder(args: argparse.Namespace) -> None:
    """Write the folder and its model card, and print what it holds.

    Errors name the file, and the option that would help.
    """
    # Check the options before anything heavy is imported.
    check_new_folder(args.out)
    kind = trained_kind(args.trained)
    if kind != "adapter" and args.format != "merged":
        raise ValueError(
            f"--format {args.format} is for adapters, but {args.trained} holds a {kind}; "
            "try --format merged"
        )
    if kind == "DeScore" and args.base:
        raise ValueError(
            f"--base is for generators, but {args.trained} holds a DeScore"
        )
    from launch.compose import quiet

    quiet()
    for repo_id in (args.push, args.base_model):
        if repo_id:
            check_repo_id(repo_id)

    # Write the weights.
    run = read_provenance(args.trained)
    base = args.base or run.base_path
    if kind == "DeScore":
        exported = export_descore(args.trained, args.out)
    elif kind == "transformer":
        exported = export_transformer(args.trained, args.out)
    else:
        adapters = read_adapters(args.trained)
        if args.format == "merged":
            exported = export_merged(adapters, base, args.out)
        else:
            if args.base and not Path(args.base).is_dir():
                raise ValueError(f"--base {args.base} is not a folder")
            exported = export_adapters(adapters, base, args.out, format=args.format)

    if kind != "DeScore":
        exported = replace(exported, pipeline=pipeline_of(base))

    # Write the card.
    base_model = args.base_model or run.base_model
    if not args.base_model and is_hub_name(args.base):
        base_model = args.base
    text = model_card(
        exported,
        run,
        base_model=base_model,
        repo_id=args.push,
    )
    (args.out / "README.md").write_text(text, encoding="utf-8")
    for fact in exported.facts:
        print(f"{args.out}: {fact}")
    print(
        f"{args.out}/README.md: base_model {base_model or 'is unknown; give --base-model'}"
    )
    print(f"next: {args.out}/README.md shows how to load it")


def trained_kind(trained: Path) -> str:
    """Return the kind of a trained folder by its files. ValueError for none or several kinds."""
    files = [name for name in KINDS if (trained / name).is_file()]
    # The adapters of two transformers are one kind.
    kinds = {KINDS[name] for name in files}
    if len(kinds) == 1:
        return kinds.pop()
    if files:
        raise ValueError(f"{trained} must hold only one of {' and '.join(files)}")

    # Another generator's files are its own.
    own = value_at(config(run_folder(trained)), "generator.target")
    if own is not None:
        raise ValueError(
            f"{trained} was trained with generator.target={own}, whose files are its own; "
            "this command knows Wan and DeScore only"
        )
    # Users often give the run's folder.
    hint = ""
    if (trained / "final").is_dir():
        hint = f"; did you mean {trained / 'final'}?"
    raise ValueError(f"{trained} holds none of {', '.join(KINDS)}{hint}")


def pipeline_of(base: str | None) -> str:
    """Return the class of the stock pipeline of a base; of an unknown one that for texts."""
    from launch.planning import known_models

    known = base in known_models.WAN
    if base is None or not (known or (Path(base) / "model_index.json").is_file()):
        return "WanPipeline"
    return known_models.wan_family(base).pipeline


def read_adapters(trained: Path) -> dict[str, StoredAdapter]:
    """Read the adapter of each transformer that has one, by the transformer's folder."""
    from generator import adapter_file

    adapters = {}
    for part, folder in (("transformer", trained), (SECOND, trained / SECOND)):
        if (folder / ADAPTER_FILE).is_file():
            adapters[part] = adapter_file.read(folder)
    return adapters


def export_adapters(
    adapters: Mapping[str, StoredAdapter],
    base: str | None,
    out: Path,
    *,
    format: str,
) -> ExportedFiles:
    """Write adapters apart from their base, which is only checked, if it is on this machine."""
    from generator import adapter_file, weights

    # Each adapter must fit its base.
    if base and Path(base).is_dir():
        for part, adapter in adapters.items():
            shapes = weights.shapes_of(weights.read_config(Path(base), part))
            adapter_file.require_fit(adapter, shapes)

    facts = []
    files = {}
    for part, adapter in adapters.items():
        about = describe_adapter(adapter)
        if part == SECOND:
            about = f"of the transformer for low noise: {about}"
        # diffusers' layout is the trained file.
        if format == "diffusers":
            folder = out / SECOND if part == SECOND else out
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(adapter.source, folder / ADAPTER_FILE)
            facts.append(f"{about}, as trained")
            files[part] = ADAPTER_FILE
        else:
            name = out.resolve().name
            files[part] = f"{name}.safetensors"
            if part == SECOND:
                files[part] = f"{name}_{SECOND}.safetensors"
            count = _write_comfyui(adapter, out / files[part])
            facts.append(f"{about}, {count} tensors under the names of Wan's own code")
    return ExportedFiles(
        "lora" if format == "diffusers" else "comfyui",
        facts,
        file=files.get("transformer", ""),
        second_file=files.get(SECOND, ""),
    )


def _write_comfyui(adapter: StoredAdapter, file: Path) -> int:
    """Write an adapter in ComfyUI's layout, which has other names; return how many tensors."""
    from safetensors.torch import save_file

    from generator import adapter_file

    tensors = adapter_file.comfyui(adapter)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    give_usual_mode(file)
    return len(tensors)


def export_merged(
    adapters: Mapping[str, StoredAdapter], base: str | None, out: Path
) -> ExportedFiles:
    """Write the base's transformers with their adapters merged in fp32, in the base's dtypes.

    diffusers' fuse_lora is not used: in a bfloat16 transformer it rounds the change before it
    is added, and its config.json holds the base's local path.
    """
    from generator import adapter_file, weights

    if base is None:
        source = next(iter(adapters.values())).source
        raise ValueError(f"no config.yaml above {source} names the base; give --base")

    facts = []
    folder = local_base(base, adapters)
    for part, adapter in adapters.items():
        # Merge, and keep everything but the linears as it is.
        stored = weights.read(folder, part)
        merged = adapter_file.merge(stored.state, adapter)
        weights.write(weights.Stored(stored.config, merged.state), out, part=part)
        linears = {name: merged.state[f"{name}.weight"] for name in adapter.pairs}
        into = f"merged in float32 and stored in the base's {dtypes_of(linears)}"
        facts.append(f"{describe_adapter(adapter)}, {into}")
        if merged.lost:
            facts.append(f"rounding takes {merged.lost:.2g} of what was merged in")
    return ExportedFiles("transformer", facts, parts=tuple(adapters))


def export_transformer(trained: Path, out: Path) -> ExportedFiles:
    """Write a transformer that was trained whole, as it is."""
    from generator import weights

    # Read, check and write in shards.
    stored = weights.read(trained)
    weights.write(stored, out)
    fact = f"all {len(stored.state)} weights trained, {dtypes_of(stored.state)}"
    return ExportedFiles("transformer", [fact])


def export_descore(trained: Path, out: Path) -> ExportedFiles:
    """Copy a DeScore; an adapter that a bfloat16 training kept apart is merged here."""
    from rm.convert import release

    folder = release.inspect(trained)
    lost = release.copy_release(folder, out)
    video = folder.video

    # The card and the console get the same facts.
    facts = [
        f"{folder.tensors} weights of a stock Qwen3-VL, {folder.dtype}, LoRA merged",
        "descore.safetensors: the query tokens' embeddings and the head in float32; "
        f"rewards: {', '.join(folder.dimensions)}",
        f"sees {video.fps:g} frames a second, at most {video.max_pixels} pixels a {video.budget}",
    ]
    if lost:
        facts.append(
            f"rounding to {folder.dtype} takes {lost:.2g} of what was merged in; the trained "
            "folder applies its adapter without loss"
        )
    return ExportedFiles(
        "descore",
        facts,
        query_id=folder.query_id,
        rewards=len(folder.dimensions),
    )


def local_base(base: str, parts: Iterable[str]) -> Path:
    """Return a folder with these parts: a local one, or a hub name's from the cache or the hub."""
    # A local folder, or a name on the hub.
    if Path(base).is_dir():
        return Path(base)
    if not is_hub_name(base):
        raise ValueError(f"there is no folder {base}; give --base")
    from huggingface_hub import snapshot_download

    # Only transformers are needed.
    wanted = [f"{part}/*" for part in parts]
    try:
        return Path(snapshot_download(base, allow_patterns=wanted))
    except OSError as error:
        raise ValueError(
            f"{base} is not in the cache and cannot be downloaded "
            f"({type(error).__name__}); give --base"
        ) from error


def describe_adapter(adapter: StoredAdapter) -> str:
    # "LoRA of 240 linears, rank 32, alpha 64".
    linears = f"LoRA of {len(adapter.pairs)} linears"
    scales = adapter.scales
    kind = ", rank-stabilised" if scales.use_rslora else ""
    return f"{linears}, rank {scales.rank}, alpha {scales.alpha:g}{kind}"


def dtypes_of(state: Mapping[str, Any]) -> str:
    """Return the names of the dtypes of all tensors, for a sentence."""
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    return ", ".join(sorted(names))


if __name__ == "__main__":
    main()
