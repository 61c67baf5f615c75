"""Check files of weights before they are loaded: whole, finished, safetensors, as the index says.

Only headers are read here, so a folder of any size takes a few milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

# What git leaves in place of a large file until `git lfs pull` fetches it.
LFS_POINTER = b"version https://git-lfs"
# Endings of the files of downloads that are running or were given up.
UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".tmp")
# Formats that can run code when they are read, or that transformers no longer reads.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")

# Types of numbers that stand for themselves; others need scales.
DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that count or index; weights are never integers.
_INTEGER_BUFFERS = ("position_ids", "num_batches_tracked")


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file. ValueError, with its name, if it is cut short or another format."""
    from safetensors import SafetensorError, safe_open

    # The library's error does not name the file.
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} {_reason(file, error)}") from error


def _reason(file: Path, error: Exception) -> str:
    """Say why a file is no safetensors file, in words for its owner."""
    if is_lfs_pointer(file):
        return "is a git-LFS pointer, not the file itself; `git lfs pull` fetches it"
    size = file.stat().st_size
    if size == 0:
        return "is empty, so it is not a whole safetensors file; download it again"
    return (
        f"is not a whole safetensors file of {size} bytes ({error}); "
        "download or save it again"
    )


def is_lfs_pointer(file: Path) -> bool:
    """True for a file of text that git-LFS replaces by the real file."""
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. Errors as in `open_safetensors`."""
    with open_safetensors(file) as tensors:
        names = tensors.keys()
        return {name: tensors.get_tensor(name) for name in names}


def weight_files(folder: Path, name: str) -> list[Path]:
    """List the files of a model's weights: ``name``, or the shards in ``name``.index.json.

    Raises FileNotFoundError, naming what is missing, and ValueError where both are there or the
    index cannot be read.
    """
    single = folder / name
    index_file = folder / f"{name}.index.json"
    # Libraries differ in which of the two they read.
    if single.is_file() and index_file.is_file():
        raise ValueError(
            f"{folder} holds both {name} and {index_file.name}; delete the one that is not wanted"
        )
    if single.is_file():
        return [single]
    if not index_file.is_file():
        raise FileNotFoundError(
            f"{folder} has no weights: it lacks {name} and {index_file.name}"
            f"{_other_weights(folder, name)}"
        )

    # The index maps every weight to its shard.
    shards = sorted(set(read_index(index_file).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {index_file.name} names; "
            "finish the download"
        )
    return [folder / shard for shard in shards]


def _other_weights(folder: Path, name: str) -> str:
    """Name the weights that lie in a folder under names that are not read."""
    if not folder.is_dir():
        return ""
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"; {', '.join(pickles)} is not read, because such files can run code: "
            "save the model as safetensors"
        )
    # For example NAME.fp16.safetensors.
    stem = name.removesuffix(".safetensors")
    others = sorted(file.name for file in folder.glob(f"{stem}*.safetensors"))
    if not others:
        return ""
    return (
        f"; it holds {', '.join(others)}: rename it if these are the weights you mean"
    )


def read_index(file: Path) -> dict[str, str]:
    """Read which shard of its folder holds each tensor. ValueError names the file."""
    content = read_json(file)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{file} has no weight_map")
    for shard in shards.values():
        # A shard lies next to its index.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{file}: weight_map names {shard!r}, which is no file")
    return shards


def tensor_places(folder: Path, name: str) -> dict[str, Path]:
    """Map every tensor of a model to its file, by the headers of `weight_files`.

    Raises ValueError, naming file and tensor, where a file is damaged, quantised or empty, or
    holds other tensors than the index says.
    """
    places: dict[str, Path] = {}
    for file in weight_files(folder, name):
        with open_safetensors(file) as tensors:
            names = list(tensors.keys())
            for tensor in names:
                dtype = tensors.get_slice(tensor).get_dtype()
                if dtype not in DTYPES and not tensor.endswith(_INTEGER_BUFFERS):
                    raise ValueError(
                        f"{file} stores {tensor} as {dtype}; quantised weights and integers are "
                        "not read"
                    )
        if not names:
            raise ValueError(f"{file} holds no tensors")
        # Which of the two would be loaded depends on the library.
        double = sorted(places.keys() & set(names))
        if double:
            raise ValueError(
                f"{file} and {places[double[0]].name} both hold {double[0]}"
            )
        places |= dict.fromkeys(names, file)

    index_file = folder / f"{name}.index.json"
    if index_file.is_file():
        _require_index(index_file, places)
    return places


def _require_index(index_file: Path, places: dict[str, Path]) -> None:
    """Raise ValueError unless the index agrees with the headers of the shards."""
    wanted = read_index(index_file)
    for tensor in sorted(wanted.keys() | places.keys()):
        if tensor not in places:
            raise ValueError(
                f"{index_file.with_name(wanted[tensor])} lacks {tensor}, "
                f"which {index_file.name} places there"
            )
        if tensor not in wanted or wanted[tensor] != places[tensor].name:
            raise ValueError(
                f"{places[tensor]} holds {tensor}, and {index_file.name} does not say so"
            )


def require_whole_folder(folder: Path) -> None:
    """Raise ValueError for what a download or a clone left unfinished in a model's folder.

    That is a file with an ending of an unfinished download, a git-LFS pointer, or a JSON file
    that cannot be read.
    """
    for file in sorted(folder.iterdir()):
        if not file.is_file():
            continue
        if file.name.endswith(UNFINISHED):
            raise ValueError(
                f"{file} is a download that was not finished; finish it, or delete the file"
            )
        if is_lfs_pointer(file):
            raise ValueError(
                f"{file} is a git-LFS pointer, not the file itself; `git lfs pull` fetches it"
            )
        if file.suffix == ".json":
            read_json(file)
