"""A set of pairs on disk: latents and prompt embeddings, so that training needs no encoders.

manifest.json              latent shape, shards with size and SHA-256, what the pairs were made
                           of; written last
index.jsonl                a line per pair: its prompt, its place, and the values of its videos
shards/00000.safetensors   chosen (n, C, F, H, W), rejected (n, C, F, H, W), prompt.i (L, D) for
                           each different text, and image.i.NAME for each different image, what
                           the generator is told of it
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from common.files import (
    give_usual_mode,
    read_json,
    read_jsonl,
    replace_text,
    replaced,
    sha256,
)
from common.schema import config
from common.types import ImagePrompt, Prompt, text_of

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
MANIFEST = "manifest.json"
INDEX = "index.jsonl"
SHARDS = "shards"
VERSION = 2


@config
class StoredFile:
    """A shard as it was written."""

    size: int
    sha256: str


@config
class PairManifest:
    """What a complete set of pairs holds; ``about`` says what the pairs were made of."""

    version: int
    pairs: int
    latent_shape: tuple[int, ...]
    files: dict[str, StoredFile]
    about: dict[str, Any]


@config
class PairRow:
    """A pair's line in the index.

    shard, row      The place of its latents.
    embedding       The number i of its prompt.i in that shard.
    chosen_value, rejected_value  The normalised values of its videos; null where people only
                    said which video is better.
    source          The seeds or files of its videos, for people.
    image, condition  The file of the image that its videos begin with, which is not read again,
                    and the number i of its image.i.NAME; absent for a text alone.
    """

    prompt: str
    shard: int
    row: int
    embedding: int
    chosen_value: float | None = None
    rejected_value: float | None = None
    source: str = ""
    image: str | None = None
    condition: int | None = None

    @property
    def whole_prompt(self) -> Prompt:
        """The text, with its image if there is one."""
        if self.image is None:
            return self.prompt
        return ImagePrompt(self.prompt, self.image)

    def as_json(self) -> dict[str, Any]:
        """The line of the index; a text alone says nothing of images."""
        line = asdict(self)
        if self.image is None:
            del line["image"], line["condition"]
        return line


@dataclass(frozen=True)
class LatentPair:
    """A pair in memory: clean normalised latents, and the prompt's embedding without padding.

    condition  What the generator is told of the prompt's image, by name; empty for a text.
    """

    prompt: Prompt
    chosen_CFHW: Tensor
    rejected_CFHW: Tensor
    embedding_LD: Tensor
    chosen_value: float | None = None
    rejected_value: float | None = None
    source: str = ""
    condition: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt without its image."""
        return text_of(self.prompt)

    @property
    def image(self) -> str | None:
        """The file of the prompt's image."""
        return self.prompt.image if isinstance(self.prompt, ImagePrompt) else None


@dataclass(frozen=True)
class PairBatch:
    """Pairs as `PairSet.read` returns them: latents in fp32, (N, C, F, H, W).

    embeddings  {text: (L, D)}
    images      {file: what the generator is told of it}; empty for texts alone
    """

    prompts: tuple[Prompt, ...]
    chosen_NCFHW: Tensor
    rejected_NCFHW: Tensor
    embeddings: Mapping[str, Tensor]
    images: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def write_pairs(
    folder: str | Path,
    pairs: Iterator[LatentPair],
    *,
    per_shard: int,
    dtype: torch.dtype,
    about: Mapping[str, Any],
) -> int:
    """Write a set of pairs and return their number. The same pairs give the same bytes.

    ``per_shard`` is the number of pairs in a file, ``dtype`` that of the stored latents;
    embeddings keep theirs. ``about`` is JSON: what the pairs were made of. A folder without a
    manifest is an unfinished set.
    """
    folder = Path(folder)
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    # a set that is being written again is unfinished
    (folder / MANIFEST).unlink(missing_ok=True)

    # the shards, and each pair's line in the index
    rows: list[PairRow] = []
    files: dict[str, dict[str, Any]] = {}
    shape: tuple[int, ...] = ()
    for number, shard in enumerate(_in_shards(pairs, per_shard)):
        shape = tuple(shard[0].chosen_CFHW.shape)
        # each different text and image is stored once in a shard
        texts = list(dict.fromkeys(pair.text for pair in shard))
        images = list(dict.fromkeys(pair.image for pair in shard if pair.image))
        name = f"{SHARDS}/{number:05d}.safetensors"
        files[name] = _write_shard(folder / name, shard, texts, images, dtype)
        for i, pair in enumerate(shard):
            row = PairRow(
                prompt=pair.text,
                shard=number,
                row=i,
                embedding=texts.index(pair.text),
                image=pair.image,
                condition=images.index(pair.image) if pair.image else None,
                chosen_value=pair.chosen_value,
                rejected_value=pair.rejected_value,
                source=pair.source,
            )
            rows.append(row)

    # the index, then the manifest, which makes the set complete
    lines = []
    for row in rows:
        line = row.as_json()
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
    replace_text(folder / INDEX, "".join(line + "\n" for line in lines))
    manifest = {
        "version": VERSION,
        "pairs": len(rows),
        "latent_shape": shape,
        "files": files,
        "about": dict(about),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    replace_text(folder / MANIFEST, text + "\n")
    return len(rows)


class PairSet:
    """Reads a set that `write_pairs` wrote.

    ``check`` compares the "size" of every shard with the manifest, or its "sha256" too, which
    reads every file. Raises ValueError, naming the file, for a set that is incomplete, changed,
    or of another version.
    """

    def __init__(self, folder: str | Path, *, check: str = "size") -> None:
        self.folder = Path(folder)
        manifest = self._read_manifest()
        # every shard must be what the manifest describes
        for name, entry in manifest.files.items():
            self._check_file(self.folder / name, entry, check)
        # the index, a row per pair
        index = self.folder / INDEX
        self.rows = _parsed(tuple[PairRow, ...], read_jsonl(index), index)
        if len(self.rows) != manifest.pairs:
            raise ValueError(
                f"{index} has {len(self.rows)} lines, "
                f"but {MANIFEST} counts {manifest.pairs} pairs"
            )
        self.latent_shape = manifest.latent_shape
        self.about = manifest.about

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> PairBatch:
        """Read these pairs from their shards, row by row."""
        from safetensors import safe_open

        chosen = []
        rejected = []
        embeddings = {}
        images = {}
        for i in indices:
            row = self.rows[i]
            path = self.folder / SHARDS / f"{row.shard:05d}.safetensors"
            place = slice(row.row, row.row + 1)
            # only the rows that are needed are read
            with safe_open(path, framework="pt") as file:
                chosen.append(file.get_slice("chosen")[place].float())
                rejected.append(file.get_slice("rejected")[place].float())
                if row.prompt not in embeddings:
                    embeddings[row.prompt] = file.get_tensor(f"prompt.{row.embedding}")
                if row.image is not None and row.image not in images:
                    prefix = f"image.{row.condition}."
                    images[row.image] = under(prefix, file.keys(), file.get_tensor)
        prompts = tuple(self.rows[i].whole_prompt for i in indices)
        return PairBatch(
            prompts, torch.cat(chosen), torch.cat(rejected), embeddings, images
        )

    def values(self) -> Tensor:
        """Return the values of the chosen and the rejected videos, (N, 2) fp64. NaN is unknown."""
        # NaN where people only said which video is better
        value_N2 = torch.full((len(self.rows), 2), math.nan, dtype=torch.float64)
        for i, row in enumerate(self.rows):
            if row.chosen_value is not None:
                value_N2[i, 0] = row.chosen_value
            if row.rejected_value is not None:
                value_N2[i, 1] = row.rejected_value
        return value_N2

    def _read_manifest(self) -> PairManifest:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{self.folder} is no finished set of pairs: it has no {MANIFEST}"
            )
        # other versions name their tensors differently
        content = read_json(path)
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise ValueError(
                f"{path} has format version {version}, this code reads "
                f"version {VERSION}: make the set again with launch/pairs.py"
            )
        return _parsed(PairManifest, content, path)

    @staticmethod
    def _check_file(file: Path, entry: StoredFile, check: str) -> None:
        if not file.is_file() or file.stat().st_size != entry.size:
            raise ValueError(f"{file} is missing, or its size differs from {MANIFEST}")
        if check == "sha256" and sha256(file) != entry.sha256:
            raise ValueError(f"{file} was changed: its SHA-256 differs from {MANIFEST}")


def _parsed(kind: type[T], content: Any, path: Path) -> T:
    """Check what a JSON file holds. Raises ValueError with the file and the wrong fields."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        mistakes = []
        for mistake in error.errors():
            where = ".".join(str(part) for part in mistake["loc"])
            mistakes.append(f"{where}: {mistake['msg']}")
        raise ValueError(f"{path}: {'; '.join(mistakes[:5])}") from error


def _in_shards(pairs: Iterator[LatentPair], size: int) -> Iterator[list[LatentPair]]:
    shard: list[LatentPair] = []
    for pair in pairs:
        shard.append(pair)
        if len(shard) == size:
            yield shard
            shard = []
    if shard:
        yield shard


def under(
    prefix: str, names: Iterable[str], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Read the tensors whose names begin with a prefix; the result's names are without it."""
    found = {}
    for name in names:
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = read(name)
    return found


def _write_shard(
    path: Path,
    pairs: Sequence[LatentPair],
    texts: Sequence[str],
    images: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write latents, embeddings and conditions of these pairs; return size and SHA-256."""
    from safetensors.torch import save_file

    tensors = {
        "chosen": torch.stack([pair.chosen_CFHW for pair in pairs]).to(dtype),
        "rejected": torch.stack([pair.rejected_CFHW for pair in pairs]).to(dtype),
    }
    for pair in pairs:
        tensors[f"prompt.{texts.index(pair.text)}"] = pair.embedding_LD
        for name, tensor in pair.condition.items():
            tensors[f"image.{images.index(pair.image)}.{name}"] = tensor
    # a safetensors file holds no tensors that share memory, hence the copies
    for name, tensor in tensors.items():
        tensors[name] = tensor.cpu().clone().contiguous()
    with replaced(path) as partial:
        save_file(tensors, partial)
        give_usual_mode(partial)
        entry = {"size": partial.stat().st_size, "sha256": sha256(partial)}
    return entry
