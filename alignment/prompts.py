"""Prompts: reading them, and which ones a step draws: a function of seed and step, so resuming needs no state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.distributed import derive_seed
from common.schedule import IndexSchedule


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt file (one a line, blank lines skipped) or a .jsonl file ({"prompt": ...} a line).

    Raises ValueError that names the file and the line for anything else, and for a file without prompts.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts are read from .txt or .jsonl files")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    parse = _json_prompt if path.suffix == ".jsonl" else str.strip
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(parse(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one step, in global order; ``seeds[i]`` decides everything random about ``prompts[i]``."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds):
            raise ValueError(
                f"PromptBatch has {len(self.prompts)} prompts and {len(self.seeds)} seeds"
            )

    def share(self, rank: int, world_size: int) -> PromptBatch:
        """The contiguous part of one rank. Raises ValueError when the ranks' parts would differ in size."""
        size, rest = divmod(len(self.prompts), world_size)
        if rest:
            raise ValueError(
                f"{len(self.prompts)} prompts per step do not divide over {world_size} ranks"
            )
        own = slice(rank * size, (rank + 1) * size)
        return PromptBatch(self.prompts[own], self.seeds[own])


class PromptSchedule:
    """Step -> prompts, by `IndexSchedule`."""

    def __init__(
        self, prompts: Sequence[str], *, seed: int, prompts_per_step: int
    ) -> None:
        if not prompts or prompts_per_step < 1:
            raise ValueError(
                f"need prompts and prompts_per_step >= 1, got {len(prompts)} and {prompts_per_step}"
            )
        self.prompts, self.seed, self.prompts_per_step = (
            list(prompts),
            seed,
            prompts_per_step,
        )
        self._indices = IndexSchedule(
            len(self.prompts), seed=seed, per_step=prompts_per_step, name="prompts"
        )

    def at(self, step: int) -> PromptBatch:
        """All ranks' prompts of one step, from 0."""
        prompts = tuple(self.prompts[i] for i in self._indices.at(step))
        seeds = tuple(
            derive_seed(self.seed, "rollout", step, i)
            for i in range(self.prompts_per_step)
        )
        return PromptBatch(prompts, seeds)


def _json_prompt(line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f'needs a non-empty text under "prompt", got {line.strip()[:60]}'
        )
    return prompt.strip()
