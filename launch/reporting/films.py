"""Embed videos into a page: cards of a prompt, and slides of the steps of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.reporting import data
from launch.reporting.data import Row

# Videos up to this width are shown enlarged, with hard edges.
PIXEL_ART = 128
# Steps that a slider has, and groups and members of a step.
STEPS_SHOWN = 12
GROUPS_SHOWN = 2
MEMBERS_SHOWN = 8

# Sampled steps of a run and their rows, as `data.sampled_steps` reads them.
Steps = Mapping[int, Sequence[Row]]


@dataclass(frozen=True)
class VideoSide:
    """A video with its rewards and texts; ``uri`` is None where it cannot be shown."""

    label: str
    uri: str | None
    small: bool
    facts: Mapping[str, float | None]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """Videos of a prompt, to be shown next to each other."""

    prompt: str
    sides: Sequence[VideoSide]
    remark: str = ""

    @property
    def empty(self) -> bool:
        """Whether none of its videos can be shown."""
        return all(side.uri is None for side in self.sides)


@dataclass(frozen=True)
class Slide:
    """Videos of a step of a run; a slider shows one of several."""

    step: int
    cards: Sequence[Card]


class Videos:
    """Embed mp4 files into a page, up to ``room`` bytes; ``left_out`` counts the others."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.left_out = 0

    def side(
        self,
        label: str,
        path: Path,
        facts: Mapping[str, float | None],
        texts: Mapping[str, str | None],
    ) -> VideoSide:
        """Return a video with its rewards and its texts."""
        uri = self._embed(path)
        small = uri is not None and _is_small(path)
        # Empty texts are left out.
        present = {name: text for name, text in texts.items() if text}
        return VideoSide(label, uri, small, facts, present)

    def _embed(self, path: Path) -> str | None:
        # A row of a file names the path, so nothing but videos may be read.
        if path.suffix != ".mp4" or not path.is_file():
            return None
        if path.stat().st_size > self.room:
            self.left_out += 1
            return None
        # The page needs no other file.
        content = path.read_bytes()
        self.room -= len(content)
        return f"data:video/mp4;base64,{base64.b64encode(content).decode('ascii')}"


def _is_small(path: Path) -> bool:
    import av

    try:
        with av.open(str(path)) as container:
            streams = container.streams.video
            return bool(streams) and streams[0].width <= PIXEL_ART
    except (av.FFmpegError, OSError):
        return False


def evaluated_videos(
    evaluations: Mapping[str, Path],
    videos: Videos,
    count: int,
) -> list[Card]:
    """Show the first ``count`` prompts and seeds whose videos every evaluation saved.

    ``evaluations`` are the folders by their labels.
    """
    tables = {
        label: data.by_video(data.results(folder))
        for label, folder in evaluations.items()
    }
    # Prompts in the order of the first evaluation.
    cards = []
    first = next(iter(tables.values()), {})
    for prompt, seed in first:
        rows = {
            label: table[prompt, seed]
            for label, table in tables.items()
            if table.get((prompt, seed), {}).get("video")
        }
        if len(rows) < len(tables) or len(cards) == count:
            continue
        sides = [
            videos.side(
                label,
                evaluations[label] / row["video"],
                row["rewards"],
                row["texts"],
            )
            for label, row in rows.items()
        ]
        cards.append(Card(prompt, sides, f"seed {seed}"))
    return cards


def group_cards(rows: Sequence[Row], videos: Videos) -> list[Card]:
    """Show two groups of a sampled GRPO step: eight members, the largest advantage first."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["prompt"], row["seed"]), []).append(row)

    cards = []
    # Within a group, the order is that of the advantage.
    for (prompt, _), group in list(groups.items())[:GROUPS_SHOWN]:
        group.sort(key=lambda row: -(row.get("advantage") or 0.0))
        sides = [
            _rollout(f"member {row['member']}", row, videos)
            for row in group[:MEMBERS_SHOWN]
        ]
        cards.append(Card(prompt, sides))
    return cards


def rollout_slides(steps: Steps, videos: Videos) -> list[Slide]:
    """Show groups of the sampled steps, see `group_cards`."""
    slides = []
    for step in _in_order_of_room(steps):
        slides.append(Slide(step, group_cards(steps[step], videos)))
    return _shown(slides)


def same_seed_slides(
    runs: Mapping[str, Steps],
    videos: Videos,
    count: int,
) -> list[Slide]:
    """Show the same prompts, seeds and members of runs beside each other, ``count`` a step.

    The sampled steps are those that every run has. A single run is shown alone.
    """
    common = set.intersection(*(set(steps) for steps in runs.values()))
    slides = []
    for step in _in_order_of_room(common):
        # Rows of each run by what its video was sampled from.
        tables = {}
        for name, steps in runs.items():
            tables[name] = {_origin(row): row for row in steps[step]}
        first = next(iter(tables.values()))
        shared = [
            key for key in first if all(key in table for table in tables.values())
        ]
        cards = []
        for prompt, seed, member in shared[:count]:
            sides = [
                _rollout(name, table[prompt, seed, member], videos)
                for name, table in tables.items()
            ]
            remark = f"seed {seed}"
            if member is not None:
                remark += f", member {member}"
            cards.append(Card(prompt, sides, remark))
        if cards:
            slides.append(Slide(step, cards))
    return _shown(slides)


def _origin(row: Row) -> tuple[str, int, int | None]:
    return row["prompt"], row["seed"], row.get("member")


def _rollout(label: str, row: Row, videos: Videos) -> VideoSide:
    facts = dict(row.get("rewards", {}))
    # Held-out videos have no advantage.
    if "advantage" in row:
        facts = {"advantage": row["advantage"], **facts}
    return videos.side(label, row["path"], facts, row.get("texts", {}))


def _in_order_of_room(steps: Iterable[int]) -> list[int]:
    """Choose at most `STEPS_SHOWN` steps, evenly; the last comes first, then the first."""
    every = sorted(steps)
    last = len(every) - 1
    if last >= STEPS_SHOWN:
        # Both ends, and the nearest to even distances between them.
        places = [round(i * last / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)]
        every = [every[place] for place in places]
    return every[-1:] + every[:-1]


def _shown(slides: Iterable[Slide]) -> list[Slide]:
    """Sort by step; without the steps whose videos found no room, unless that is all."""
    ordered = sorted(slides, key=lambda slide: slide.step)
    full = [s for s in ordered if not all(card.empty for card in s.cards)]
    return full or ordered


def pair_cards(folder: Path | None, videos: Videos) -> list[Card]:
    """Show pairs of a reward model's evaluation: the first two, and its two worst errors."""
    # The sign of margin x label tells a right order from a wrong order.
    rows = data.scored_pairs(folder)
    remarks = [(row, "one of the first pairs") for row in rows[:2]]
    for row in sorted(rows, key=lambda row: data.margin(row) * row["label"])[:2]:
        if row not in rows[:2] and data.margin(row) * row["label"] < 0:
            remarks.append((row, "one of the pairs it is most wrong about"))

    cards = []
    for row, remark in remarks:
        sides = [
            videos.side(
                f"video {side}",
                folder / row[f"video_{side}"],
                {"reward": row[f"reward_{side}"]},
                {"chain of thought": row.get(f"cot_{side}")},
            )
            for side in "AB"
        ]
        label = data.PAIR_LABELS[row["label"]]
        cards.append(Card(row["prompt"], sides, f"label: {label}; {remark}"))
    return cards
