"""VBench's standard prompts (2311.17982): which there are, how many videos each needs, what the files are called.

They are read from the ``VBench_full_info.json`` of the `vbench` package, 0.1.5 in what follows: a list of 946 objects
with ``prompt_en`` and ``dimension``. Two prompts are in it twice, for other dimensions, so that there are 944 prompts.
In its standard mode VBench looks for ``{prompt}-{index}.mp4``, index 0 to 4, by comparing names of a folder's listing:
a prompt with a slash or a name too long for the file system could never be found, and is refused here. It takes the
ending of ALL names from the first file of the listing, so nothing but videos may lie beside them. For
temporal_flickering its prompts/README.md asks for 25 videos, from which its filter keeps static ones. No torch here.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# the order of VBench's own table (scripts/constant.py); how many entries of the file name each
ENTRIES = {
    "subject_consistency": 72, "background_consistency": 86, "temporal_flickering": 75, "motion_smoothness": 72,
    "dynamic_degree": 72, "aesthetic_quality": 93, "imaging_quality": 93, "object_class": 79, "multiple_objects": 82,
    "human_action": 100, "color": 85, "spatial_relationship": 84, "scene": 86, "appearance_style": 90,
    "temporal_style": 100, "overall_consistency": 93,
}  # fmt: skip
DIMENSIONS = tuple(ENTRIES)
FLICKERING = "temporal_flickering"
INDICES = 5  # videos of a prompt that VBench looks at
INFO = "VBench_full_info.json"
INSTALL = "pip install --no-deps vbench==0.1.5 (the prompts, for sampling)"
_LONGEST = 255  # bytes of a file name on every usual file system


@dataclass(frozen=True)
class SuiteVideo:
    """One file that VBench looks for."""

    prompt: str
    index: int

    @property
    def name(self) -> str:
        return f"{self.prompt}-{self.index}.mp4"


@dataclass(frozen=True)
class Suite:
    """The entries of an info file: (prompt, its dimensions), in the file's order."""

    path: Path
    entries: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def is_standard(self) -> bool:
        """Whether there are as many entries as in VBench's own file, in all and of every dimension."""
        return len(self.entries) == 946 and all(
            self.count(name) == count for name, count in ENTRIES.items()
        )

    def count(self, dimension: str) -> int:
        """Entries of one dimension."""
        return sum(dimension in dimensions for _, dimensions in self.entries)

    def prompts(self, dimensions: Collection[str] = DIMENSIONS) -> list[str]:
        """Those of any of these dimensions, each once."""
        return list(
            dict.fromkeys(
                prompt for prompt, own in self.entries if set(own) & set(dimensions)
            )
        )

    def videos(
        self, prompts: Iterable[str], *, each: int, flickering: int
    ) -> list[SuiteVideo]:
        """All of these prompts, prompt by prompt: ``flickering`` of a prompt of that dimension, else ``each``."""
        flicker = set(self.prompts([FLICKERING]))
        return [
            SuiteVideo(p, i)
            for p in prompts
            for i in range(flickering if p in flicker else each)
        ]

    def missing(self, folder: Path, dimension: str, *, flickering: int) -> list[str]:
        """Names of this dimension's videos that are not in the folder, or are empty files."""
        wanted = self.videos(
            self.prompts([dimension]), each=INDICES, flickering=flickering
        )
        return [video.name for video in wanted if not _has_content(folder / video.name)]


def read_suite(path: str | Path | None) -> Suite:
    """``path``, or the file of a `vbench` that is installed here. Raises ValueError for what VBench could not use."""
    path = installed_info() if path is None else Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"info: {path} cannot be read: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"info: {path} must hold a list of prompts, as {INFO} does")
    entries = tuple(_entry(path, number, one) for number, one in enumerate(found))
    return Suite(path, entries)


def installed_info() -> Path:
    """The info file of the `vbench` in this environment, which is not imported. ValueError if there is none."""
    spec = importlib.util.find_spec("vbench")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / INFO).is_file():
            return Path(folder) / INFO
    raise ValueError(
        f"info: no vbench is installed here; {INSTALL}, or name its {INFO}: info=PATH"
    )


def read_rewritten(path: str | Path, prompts: Iterable[str]) -> dict[str, str]:
    """{prompt: what the generator reads instead} of a .jsonl file of {"prompt": ..., "augmented": ...} lines.

    Every one of ``prompts`` must have a line; others are left out. Raises ValueError, with the line's number, for a
    line of another kind and for two lines that disagree.
    """
    rewritten: dict[str, str] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"augmented: {path}:{number}: not JSON: {error.msg}"
            ) from error
        texts = [
            row.get(key) if isinstance(row, dict) else None
            for key in ("prompt", "augmented")
        ]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f'augmented: {path}:{number}: needs texts under "prompt" and "augmented"'
            )
        prompt, text = texts
        if rewritten.setdefault(prompt, text.strip()) != text.strip():
            raise ValueError(
                f"augmented: {path}:{number}: another text for a prompt of an earlier line: {prompt!r}"
            )
    prompts = list(prompts)
    without = [prompt for prompt in prompts if prompt not in rewritten]
    if without:
        raise ValueError(
            f"augmented: {path} lacks {len(without)} of {len(prompts)} prompts, first {without[0]!r}"
        )
    return {prompt: rewritten[prompt] for prompt in prompts}


def strangers(folder: Path) -> str | None:
    """A problem where something else than videos lies in a folder of videos, or None."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix != ".mp4")
    return (
        f"{folder} holds {found[0]!r}: VBench might look for videos of that ending"
        if found
        else None
    )


def _entry(path: Path, number: int, one: object) -> tuple[str, tuple[str, ...]]:
    where = f"info: {path}, entry {number}"
    prompt, dimensions = (
        (one.get("prompt_en"), one.get("dimension"))
        if isinstance(one, Mapping)
        else (None, None)
    )
    if not isinstance(prompt, str) or not prompt or not isinstance(dimensions, list):
        raise ValueError(f'{where}: needs "prompt_en" and "dimension"')
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"{where}: VBench has no dimension {unknown[0]!r}")
    if "/" in prompt or "\0" in prompt:
        raise ValueError(f"{where}: no file can be called {prompt!r}")
    if len(f"{prompt}-99.mp4".encode()) > _LONGEST:
        raise ValueError(
            f"{where}: a file name has at most {_LONGEST} bytes, too few for {prompt!r}"
        )
    return prompt, tuple(dimensions)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"augmented: {path} cannot be read: {error}") from error


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
