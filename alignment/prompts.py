"""Read prompts, and choose those of a step as a function of seed and step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.distributed import derive_seed
from common.files import check_text, parse_json_line, read_lines
from common.schedule import IndexSchedule
from common.types import ImagePrompt, Prompt


def read_prompts(path: str | Path) -> list[str]:
    """Read a .txt file (a prompt per line) or a .jsonl file ({"prompt": ...} per line).

    Blank lines are skipped. Raises ValueError, naming the file and the line, for anything
    else, for a prompt with an image, and for a file without prompts.
    """
    prompts = []
    for prompt in read_image_prompts(path):
        if isinstance(prompt, ImagePrompt):
            raise ValueError(
                f"{path}: this command takes texts alone, and a prompt has an image: "
                f"{prompt.text!r:.80}"
            )
        prompts.append(prompt)
    return prompts


def read_image_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts like `read_prompts`, and {"prompt": ..., "image": ...} as an ImagePrompt.

    A relative path of an image starts from the folder of the file.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts are read from .txt or .jsonl files")
    is_json = path.suffix == ".jsonl"
    prompts: list[Prompt] = []
    for number, line in enumerate(_lines_of(path), start=1):
        if line.strip():
            try:
                prompts.append(_parsed(line, path.parent if is_json else None))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def image_files(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Name the images of the prompts, whose content decides the videos."""
    files = {}
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, ImagePrompt):
            files[f"image of prompt {i}"] = prompt.image
    return files


def describe_shared_prompts(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> str:
    """Count the held-out prompts that are trained on as well, and name the first; "" for none."""
    trained = set(train)
    shared = [prompt for prompt in heldout if prompt in trained]
    if not shared:
        return ""
    return (
        f"{len(shared)} of {len(heldout)} held-out prompts are trained on as well: "
        f"{shared[0]!r:.80}"
    )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of a step, in global order. ``seeds[i]`` decides all randomness of ``prompts[i]``."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]

    def share(self, rank: int, world_size: int) -> PromptBatch:
        """Return the contiguous part of a rank. Raises ValueError when the parts are unequal."""
        # equal parts, or collectives would wait for missing groups
        size, rest = divmod(len(self.prompts), world_size)
        if rest:
            raise ValueError(
                f"{len(self.prompts)} prompts per step do not divide over {world_size} ranks"
            )
        part = slice(rank * size, (rank + 1) * size)
        return PromptBatch(self.prompts[part], self.seeds[part])

    def take(self, places: Iterable[int]) -> PromptBatch:
        """Select prompts, in the given order."""
        rows = list(places)
        prompts = tuple(self.prompts[i] for i in rows)
        return PromptBatch(prompts, tuple(self.seeds[i] for i in rows))

    def single_prompts(self) -> list[PromptBatch]:
        """Split into batches of a single prompt."""
        count = len(self.prompts)
        return [self.share(i, count) for i in range(count)]


class PromptSchedule:
    """Chooses the prompts of every step by `IndexSchedule`."""

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, prompts_per_step: int
    ) -> None:
        if not prompts or prompts_per_step < 1:
            raise ValueError(
                "PromptSchedule needs prompts and prompts_per_step >= 1, "
                f"got {len(prompts)} and {prompts_per_step}"
            )
        self.prompts = list(prompts)
        self.seed = seed
        self.prompts_per_step = prompts_per_step
        self._indices = IndexSchedule(
            len(self.prompts), seed=seed, per_step=prompts_per_step, name="prompts"
        )

    def at(self, step: int) -> PromptBatch:
        """Return all ranks' prompts of a step, counted from 0."""
        prompts = []
        seeds = []
        for position, index in enumerate(self._indices.at(step)):
            prompts.append(self.prompts[index])
            # the seed depends on the place in the step, not on the rank that samples it
            seeds.append(derive_seed(self.seed, "rollout", step, position))
        return PromptBatch(tuple(prompts), tuple(seeds))


def _lines_of(path: Path) -> list[str]:
    try:
        return read_lines(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _parsed(line: str, folder: Path | None) -> Prompt:
    """Parse a line of text, or with a folder a line of JSON whose image may lie there."""
    if folder is None:
        return check_text(line.strip(), "the prompt")
    text = check_text(_json_prompt(line), "the prompt")
    image = parse_json_line(line).get("image")
    if image is None:
        return text
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f'needs a file under "image", got {image!r:.60}')
    return ImagePrompt(text, str(folder / image))


def _json_prompt(line: str) -> str:
    row = parse_json_line(line)
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f'needs a non-empty text under "prompt", got {line.strip()[:60]}'
        )
    return prompt.strip()
