"""Read VBench's standard prompts (2311.17982) and name the videos that VBench looks for.

The prompts come from ``VBench_full_info.json`` of the `vbench` package, version 0.1.5 in what
follows: a list of 946 objects with ``prompt_en`` and ``dimension``. Two prompts appear twice, for
other dimensions, so that there are 944 prompts.

In its standard mode VBench looks for ``{prompt}-{index}.mp4``, index 0 to 4, in a folder's listing.
A prompt with a slash or a name too long for the file system could never match and is refused here.
VBench takes the extension of ALL names from the first file of the listing, so that
the folder must hold videos only. For temporal_flickering its prompts/README.md asks for 25 videos,
from which its filter keeps static ones. No torch here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from common.files import check_text, parse_json_line, read_json, read_lines

# Entries of the file by dimension, in the order of VBench's scripts/constant.py.
ENTRIES = {
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "appearance_style": 90,
    "temporal_style": 100,
    "overall_consistency": 93,
}
DIMENSIONS = tuple(ENTRIES)
FLICKERING = "temporal_flickering"
# Videos of a prompt that VBench reads.
INDICES = 5
INFO = "VBench_full_info.json"
INSTALL = "pip install --no-deps vbench==0.1.5"
# Bytes of a file name on every usual file system.
_LONGEST = 255


@dataclass(frozen=True)
class SuiteVideo:
    """A file that VBench looks for."""

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
        """Whether the counts of entries equal those of VBench's file."""
        counts = {name: self.count(name) for name in DIMENSIONS}
        return len(self.entries) == 946 and counts == ENTRIES

    def count(self, dimension: str) -> int:
        """Return the number of entries of a dimension."""
        return sum(dimension in dimensions for _, dimensions in self.entries)

    def prompts(self, dimensions: Collection[str] = DIMENSIONS) -> list[str]:
        """Return the prompts of any of these dimensions, without repeats."""
        wanted = set(dimensions)
        found = [prompt for prompt, own in self.entries if wanted.intersection(own)]
        return list(dict.fromkeys(found))

    def videos(
        self, prompts: Iterable[str], *, each: int, flickering: int
    ) -> list[SuiteVideo]:
        """Return the videos of these prompts, prompt by prompt.

        A prompt of temporal_flickering has ``flickering`` videos, any other has ``each``.
        """
        flickering_prompts = set(self.prompts([FLICKERING]))
        videos = []
        for prompt in prompts:
            count = flickering if prompt in flickering_prompts else each
            for index in range(count):
                videos.append(SuiteVideo(prompt, index))
        return videos


def read_suite(path: str | Path | None) -> Suite:
    """Read an info file, or with None that of the installed `vbench`.

    Raises ValueError for a file or prompt that VBench could not use.
    """
    path = installed_info() if path is None else Path(path)
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"info: {path} cannot be read: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"info: {path} must hold a list of prompts, as {INFO} does")
    entries = [
        _read_entry(f"info: {path}, entry {number}", entry)
        for number, entry in enumerate(content)
    ]
    return Suite(path, tuple(entries))


def installed_info() -> Path:
    """Return the info file of the installed `vbench` without importing the package.

    Raises ValueError if `vbench` is not installed.
    """
    spec = importlib.util.find_spec("vbench")
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            path = Path(folder) / INFO
            if path.is_file():
                return path
    raise ValueError(
        f"info: no vbench is installed here; {INSTALL}, or name its {INFO}: info=PATH"
    )


def read_rewritten(path: str | Path, prompts: Iterable[str]) -> dict[str, str]:
    """Return {prompt: rewritten prompt} from lines of {"prompt": ..., "augmented": ...}.

    Each of ``prompts`` needs a line; lines of other prompts are left out. Raises ValueError, with
    the line's number, for a line of another form and for two lines that disagree.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"augmented: {path} cannot be read: {error}") from error
    rewritten: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"augmented: {path}:{number}"
        prompt, text = _read_rewritten_line(where, line)
        # A prompt that appears twice must have the same text.
        if rewritten.setdefault(prompt, text) != text:
            raise ValueError(
                f"{where}: an earlier line has another text for {prompt!r}"
            )

    # Every prompt of the run has a text.
    prompts = list(prompts)
    missing = [prompt for prompt in prompts if prompt not in rewritten]
    if missing:
        raise ValueError(
            f"augmented: {path} lacks {len(missing)} of {len(prompts)} prompts, "
            f"first {missing[0]!r}"
        )
    return {prompt: rewritten[prompt] for prompt in prompts}


def strangers(folder: Path) -> str | None:
    """Return a problem if the folder holds a file that is no video, or None."""
    for path in sorted(folder.iterdir()):
        if path.suffix != ".mp4":
            return (
                f"{folder} holds {path.name!r}: VBench might look for videos of that "
                "extension; remove it"
            )
    return None


def _read_entry(where: str, entry: object) -> tuple[str, tuple[str, ...]]:
    fields = entry if isinstance(entry, dict) else {}
    prompt = fields.get("prompt_en")
    dimensions = fields.get("dimension")
    if not isinstance(prompt, str) or not prompt or not isinstance(dimensions, list):
        raise ValueError(f'{where}: needs "prompt_en" and "dimension"')
    for name in dimensions:
        if name not in DIMENSIONS:
            raise ValueError(f"{where}: VBench has no dimension {name!r}")

    # The prompt becomes a file name.
    if "/" in prompt or "\0" in prompt:
        raise ValueError(f"{where}: no file can be called {prompt!r}")
    if len(f"{prompt}-99.mp4".encode()) > _LONGEST:
        raise ValueError(
            f"{where}: the file name of {prompt!r} has more than {_LONGEST} bytes"
        )
    check_text(prompt, f"{where}: {prompt!r:.60}")
    return prompt, tuple(dimensions)


def _read_rewritten_line(where: str, line: str) -> tuple[str, str]:
    try:
        row = parse_json_line(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    fields = row if isinstance(row, dict) else {}
    for key in ("prompt", "augmented"):
        text = fields.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where}: needs texts under "prompt" and "augmented"')
        check_text(text, f"{where}: {key}")
    return fields["prompt"], fields["augmented"].strip()
