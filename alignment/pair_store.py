"""Pairs of latents on disk, encoded once: training on them needs neither VAE nor text encoder.

manifest.json              latent shape, shards with size and SHA-256, what the pairs were made of; written last
index.jsonl                a line for each pair: its prompt, place, and what its videos were worth
shards/00000.safetensors   chosen (n, C, F, H, W), rejected (n, C, F, H, W); prompt.i (L, D), one for each different prompt
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import replace_text, replaced, sha256

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, INDEX, SHARDS = "manifest.json", "index.jsonl", "shards"
VERSION = 1


@dataclass(frozen=True)
class PairRow:
    """One pair's line in the index.

    shard, row            where its latents are
    embedding             number i of prompt.i in that shard
    chosen_value, rejected_value what the videos are worth, normalised; null where people only said which is better
    source                where it came from, for people: seeds, or files
    """

    prompt: str
    shard: int
    row: int
    embedding: int
    chosen_value: float | None = None
    rejected_value: float | None = None
    source: str = ""


@dataclass(frozen=True)
class LatentPair:
    """A pair in memory, before it is written: clean normalised latents, the prompt's embedding without its padding."""

    prompt: str
    chosen_CFHW: Tensor
    rejected_CFHW: Tensor
    embedding_LD: Tensor
    chosen_value: float | None = None
    rejected_value: float | None = None
    source: str = ""


@dataclass(frozen=True)
class PairBatch:
    """Some pairs, as `PairSet.read` gives them: latents fp32 (N, C, F, H, W)."""

    prompts: tuple[str, ...]
    chosen_NCFHW: Tensor
    rejected_NCFHW: Tensor
    embeddings: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.chosen_NCFHW) == len(self.rejected_NCFHW):
            sizes = (
                len(self.prompts),
                len(self.chosen_NCFHW),
                len(self.rejected_NCFHW),
            )
            raise ValueError(
                f"PairBatch holds {sizes[0]} prompts, {sizes[1]} winners and {sizes[2]} losers"
            )
        if self.chosen_NCFHW.shape != self.rejected_NCFHW.shape:
            raise ValueError(
                f"PairBatch: {tuple(self.chosen_NCFHW.shape)} against {tuple(self.rejected_NCFHW.shape)}"
            )


def write_pairs(
    folder: str | Path,
    pairs: Iterator[LatentPair],
    *,
    per_shard: int,
    dtype: torch.dtype,
    about: Mapping[str, Any],
) -> int:
    """Write a set of pairs; how many. The same pairs give the same bytes. A folder without manifest.json is not whole.

    per_shard  pairs in one file, dtype of the stored latents; embeddings keep theirs
    about      JSON: what the pairs were made of
    """
    folder = Path(folder)
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    rows: list[PairRow] = []
    files: dict[str, dict[str, Any]] = {}
    shape: tuple[int, ...] = ()
    for number, part in enumerate(_parts(pairs, per_shard)):
        shape = tuple(part[0].chosen_CFHW.shape)
        prompts = list(dict.fromkeys(pair.prompt for pair in part))
        tensors = {
            "chosen": torch.stack([pair.chosen_CFHW for pair in part]).to(dtype),
            "rejected": torch.stack([pair.rejected_CFHW for pair in part]).to(dtype),
        }
        tensors |= {
            f"prompt.{prompts.index(pair.prompt)}": pair.embedding_LD.contiguous()
            for pair in part
        }
        name = f"{SHARDS}/{number:05d}.safetensors"
        files[name] = _write_shard(folder / name, tensors)
        rows += [
            PairRow(
                p.prompt,
                number,
                i,
                prompts.index(p.prompt),
                p.chosen_value,
                p.rejected_value,
                p.source,
            )
            for i, p in enumerate(part)
        ]
    text = "".join(
        json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n"
        for row in rows
    )
    replace_text(folder / INDEX, text)
    manifest = {
        "version": VERSION,
        "pairs": len(rows),
        "latent_shape": shape,
        "files": files,
        "about": dict(about),
    }
    replace_text(
        folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    )
    return len(rows)


class PairSet:
    """Reads what `write_pairs` wrote. Raises ValueError, naming the file, for a set that is not whole or was changed.

    check  "size" of every shard, which takes no time; or its "sha256" too
    """

    def __init__(self, folder: str | Path, *, check: str = "size") -> None:
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.folder} holds no whole set of pairs: it has no {MANIFEST}"
            ) from error
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"{self.folder / MANIFEST} is of version {manifest.get('version')}, want {VERSION}"
            )
        for name, entry in manifest["files"].items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != entry["size"]:
                raise ValueError(
                    f"{file} is missing or has another size than {MANIFEST} says"
                )
            if check == "sha256" and sha256(file) != entry["sha256"]:
                raise ValueError(
                    f"{file} was changed: its SHA-256 differs from {MANIFEST}"
                )
        lines = (self.folder / INDEX).read_text(encoding="utf-8").splitlines()
        self.rows = tuple(PairRow(**json.loads(line)) for line in lines)
        if len(self.rows) != manifest["pairs"]:
            raise ValueError(
                f"{self.folder / INDEX} has {len(self.rows)} lines, {MANIFEST} says {manifest['pairs']}"
            )
        self.latent_shape = tuple(manifest["latent_shape"])
        self.about: dict[str, Any] = manifest["about"]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> PairBatch:
        """These pairs, read from their shards row by row."""
        from safetensors import safe_open

        chosen, rejected, embeddings = [], [], {}
        for i in indices:
            row = self.rows[i]
            with safe_open(
                self.folder / SHARDS / f"{row.shard:05d}.safetensors", framework="pt"
            ) as file:
                chosen.append(file.get_slice("chosen")[row.row : row.row + 1].float())
                rejected.append(
                    file.get_slice("rejected")[row.row : row.row + 1].float()
                )
                if row.prompt not in embeddings:
                    embeddings[row.prompt] = file.get_tensor(f"prompt.{row.embedding}")
        return PairBatch(
            tuple(self.rows[i].prompt for i in indices),
            torch.cat(chosen),
            torch.cat(rejected),
            embeddings,
        )

    def values(self) -> Tensor:
        """(N, 2) fp64, winners' and losers' worth; NaN where it is not known."""
        unknown = [
            math.nan if v is None else v
            for row in self.rows
            for v in (row.chosen_value, row.rejected_value)
        ]
        return torch.tensor(unknown, dtype=torch.float64).view(-1, 2)


def _parts(pairs: Iterator[LatentPair], size: int) -> Iterator[list[LatentPair]]:
    part: list[LatentPair] = []
    for pair in pairs:
        part.append(pair)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    from safetensors.torch import save_file

    with replaced(path) as partial:
        save_file(
            {
                name: tensor.cpu().clone().contiguous()
                for name, tensor in tensors.items()
            },
            partial,
        )
        entry = {"size": partial.stat().st_size, "sha256": sha256(partial)}
    return entry
