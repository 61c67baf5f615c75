"""Select what a report shows: videos, pairs, distributions, further runs and files."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.diagnosis.evidence import Diagnosis
from launch.diagnosis.report import SURE
from launch.diagnosis.rules import diagnose
from launch.diagnosis.run_files import read_run
from launch.reporting import data
from launch.reporting.charts import COLORS, Chart, Series, histogram
from launch.reporting.data import EVALUATIONS, KINDS, Row, Runs
from launch.reporting.metric_charts import metric_charts

# Videos up to this width are shown enlarged, with hard edges.
PIXEL_ART = 128
_GREY = COLORS[-1]
# Characters that HTML cannot hold; a new line and a tab are not among them.
# Control characters, surrogates, and marks that turn the direction of the text after them.
_BAD_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LABELS = {
    1: "A preferred",
    -1: "B preferred",
    0: "tie",
}


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


# ------------------------------------------------------------------ videos


def evaluated_videos(
    runs: Runs,
    videos: Videos,
    count: int,
) -> list[Card]:
    """Show the first ``count`` prompts and seeds whose videos every evaluation saved."""
    labels = {
        "base": "base",
        "tuned": "tuned",
        "dpo_tuned": "Flow-DPO",
    }
    # Rows of each evaluation by prompt and seed.
    tables = {}
    for kind, label in labels.items():
        if kind in runs.shown:
            folder = runs.shown[kind]
            tables[label] = (folder, data.by_video(data.results(folder)))
    # Prompts in the order of the first evaluation.
    cards = []
    _, first = next(iter(tables.values()), (None, {}))
    for prompt, seed in first:
        rows = {
            label: (folder, table[prompt, seed])
            for label, (folder, table) in tables.items()
            if table.get((prompt, seed), {}).get("video")
        }
        if len(rows) < len(tables) or len(cards) == count:
            continue
        sides = [
            videos.side(
                label,
                folder / row["video"],
                row["rewards"],
                row["texts"],
            )
            for label, (folder, row) in rows.items()
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
    for (prompt, _), group in list(groups.items())[:2]:
        group.sort(key=lambda row: -(row.get("advantage") or 0.0))
        sides = [
            videos.side(
                f"member {row['member']}",
                row["path"],
                {"advantage": row.get("advantage"), **row.get("rewards", {})},
                row.get("texts", {}),
            )
            for row in group[:8]
        ]
        cards.append(Card(prompt, sides))
    return cards


def pair_cards(folder: Path | None, videos: Videos) -> list[Card]:
    """Show pairs of a reward model's evaluation: the first two, and its two worst errors."""
    # The sign of margin x label tells a right order from a wrong order.
    rows = _scored_pairs(folder)
    remarks = [(row, "one of the first pairs") for row in rows[:2]]
    for row in sorted(rows, key=lambda row: _margin(row) * row["label"])[:2]:
        if row not in rows[:2] and _margin(row) * row["label"] < 0:
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
        label = _LABELS[row["label"]]
        cards.append(Card(row["prompt"], sides, f"label: {label}; {remark}"))
    return cards


def _scored_pairs(folder: Path | None) -> list[Row]:
    rows = data.results(folder)
    return [
        row for row in rows if None not in (row.get("reward_A"), row.get("reward_B"))
    ]


def _margin(row: Row) -> float:
    return float(row["reward_A"] - row["reward_B"])


# ------------------------------------------------------------------ distributions


def distributions(runs: Runs) -> list[Chart]:
    """Draw rewards of base and tuned videos, advantages of rollouts, and margins by label."""
    # Rewards.
    base = data.results(runs.shown.get("base"))
    tuned = data.results(runs.shown.get("tuned"))
    charts = []
    for name in dict.fromkeys(name for row in base + tuned for name in row["rewards"]):
        series = [
            Series("base", [data.value_of(row, name) for row in base], color=_GREY),
            Series("tuned", [data.value_of(row, name) for row in tuned]),
        ]
        title = f"Reward of {name}"
        charts.append(histogram(title, series, note="over the held-out prompts"))

    # Advantages.
    steps = data.sampled_steps(runs.shown.get("grpo")).values()
    advantages = [row.get("advantage") or 0.0 for rows in steps for row in rows]
    note = f"{len(advantages)} sampled rollouts"
    charts.append(histogram("Advantages", [Series("", advantages)], note=note))

    # Margins.
    pairs = _scored_pairs(runs.shown.get("rm"))
    series = []
    for (label, name), color in zip(_LABELS.items(), COLORS, strict=False):
        margins = [_margin(row) for row in pairs if row["label"] == label]
        series.append(Series(name, margins, color=color))
    title = "Margin by label: reward A − reward B"
    charts.append(histogram(title, series, note="held-out pairs"))
    return [chart for chart in charts if chart is not None]


# ------------------------------------------------------------------ diagnosis


def diagnoses_of(folder: Path | None) -> list[tuple[str, Diagnosis]] | None:
    """How sure and what the diagnosis of a GRPO run is; None without steps to judge by."""
    if folder is None or not data.metrics(folder) or not data.config(folder):
        return None
    found = diagnose(read_run(folder))
    return [(SURE[diagnosis.certainty], diagnosis) for diagnosis in found]


# ------------------------------------------------------------------ further runs and files


def further_runs(runs: Runs) -> list[tuple[str, Path, Sequence[Chart], Row]]:
    """Kind, folder, charts of a training run and means of an evaluation, of `Runs.more`."""
    further = []
    for kind, folder in runs.more:
        # Counts and thresholds are no intervals.
        means = {
            name: value
            for name, value in data.summary(folder).items()
            if isinstance(value, dict) and "mean" in value
        }
        further.append((kind, folder, metric_charts(kind, folder), means))
    return further


def files_of(runs: Runs) -> list[tuple[str, str]]:
    """Return path and content of every config.yaml and environment.json."""
    files = []
    # Whoever reads the page can repeat the run.
    for _, folder in runs.all():
        for name in ("config.yaml", "environment.json"):
            text = data.text_of(folder, name)
            if text is not None:
                files.append((str(folder / name), text))
    return files


def missing(runs: Runs) -> list[str]:
    """Say what the report would show if it had more runs."""
    shown = runs.shown
    notes = [
        f"no run of the kind {kind}: {text}"
        for kind, text in KINDS.items()
        if kind not in shown
    ]
    # Evaluations that cannot be compared, or have not finished.
    if "base" in shown and "tuned" in shown:
        base = data.by_video(data.results(shown["base"]))
        tuned = data.by_video(data.results(shown["tuned"]))
        if base.keys().isdisjoint(tuned):
            notes.append(
                "base and tuned share no prompt and seed, so their videos are not compared"
            )
    for kind, folder in runs.all():
        if kind in EVALUATIONS and not data.summary(folder):
            notes.append(
                f"the evaluation {folder} has no summary.json: it has not finished"
            )
    return notes


# ------------------------------------------------------------------ filters of the template


def number(value: float | None, digits: int = 4) -> str:
    """Format with four significant digits; a dash for what is missing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.3e}"


def clean(text: object) -> str:
    """Replace control characters and surrogates; the template escapes the rest."""
    return _BAD_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", str(text))
