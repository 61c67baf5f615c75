"""Compare runs that are peers: their settings, results, curves and videos."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.reporting import data
from launch.reporting.charts import COLORS, Chart, means_of_ends
from launch.reporting.data import EVALUATIONS, Row, Runs
from launch.reporting.films import (
    Card,
    Slide,
    Videos,
    evaluated_videos,
    same_seed_slides,
)
from launch.reporting.find_runs import STAGES, discover
from launch.reporting.metric_charts import overlaid_charts
from launch.reporting.status import Status, status_of
from launch.reporting.texts import distinct_names, hide_folders

# Where a run writes to is no setting that explains a result.
_PLACES = ("run_dir", "out")
# Prefixes of the metrics of a GRPO run's held-out prompts.
HELDOUT = ("eval", "eval_stock", "eval_usual")
# Of an environment.json: what may change a result.
_CODE = ("git", "packages", "python")
# For a setting that a run does not have, and how settings say that nothing is asked for.
NOTHING = "\N{EN DASH}"
_UNSET = {NOTHING, "null", "{}", "[]"}


@dataclass(frozen=True)
class Peer:
    """A folder that is compared with others: a run, or a folder of runs of several kinds."""

    name: str
    color: str
    runs: Runs

    def folder(self, kind: str) -> Path | None:
        """Folder of the first run of a kind; None without one."""
        found = [folder for other, folder in self.runs.all() if other == kind]
        return found[0] if found else None

    def statuses(self) -> list[Status]:
        """Describe the runs of the peer."""
        statuses = []
        for kind, folder in self.runs.all():
            statuses.append(status_of(kind, folder, folder.name))
        return statuses


@dataclass(frozen=True)
class Table:
    """Rows with a value of each peer; ``title`` says what they are of."""

    title: str
    rows: Sequence[tuple[str, Sequence[Any]]]


def find_peers(folders: Sequence[Path]) -> list[Peer]:
    """Find what each folder holds.

    Raises ValueError for a folder without a run, one that is there twice, and too many.
    """
    if len(folders) > len(COLORS):
        raise ValueError(
            f"at most {len(COLORS)} runs can be compared, got {len(folders)}"
        )
    peers = []
    for folder, name, color in zip(
        folders, distinct_names(folders), COLORS, strict=False
    ):
        peers.append(Peer(name, color, discover(folder)))
    return peers


# ------------------------------------------------------------------ settings


def setting_tables(peers: Sequence[Peer]) -> list[Table]:
    """List the settings that differ, from the resolved config.yaml of each run.

    A peer without the setting, or without the run, has a dash.
    """
    tables = []
    for title, folders in _matched(peers):
        settings = [_settings(folder) for folder in folders]
        rows = _differing(settings)
        tables.append(Table(title, rows))
    return tables


def _matched(peers: Sequence[Peer]) -> list[tuple[str, list[Path | None]]]:
    """Folders of the peers that belong beside each other."""
    # Single runs are compared whatever their kinds, folders of runs kind by kind.
    runs = [peer.runs.all() for peer in peers]
    if all(len(found) == 1 for found in runs):
        return [("", [folder for ((_, folder),) in runs])]
    matched = []
    for kind in (*STAGES, *EVALUATIONS):
        folders = [peer.folder(kind) for peer in peers]
        if sum(folder is not None for folder in folders) > 1:
            matched.append((kind, folders))
    return matched


def _settings(folder: Path | None) -> dict[str, str]:
    """Settings of a run by their keys with dots, and the code that it ran."""
    settings = flat_settings(data.config(folder))
    for place in _PLACES:
        settings.pop(place, None)
    # Packages and commit.
    text = data.text_of(folder, "environment.json")
    if text:
        environment = data.json_object(text, f"{folder}/environment.json")
        code = {name: environment.get(name) for name in _CODE}
        settings |= flat_settings(code)
    return settings


def flat_settings(value: Any, key: str = "") -> dict[str, str]:
    """Flatten nested mappings; a list is one value, and so is an empty mapping."""
    if not isinstance(value, dict) or not value:
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
        return {key: hide_folders(text)}
    flat = {}
    for name, inner in value.items():
        flat |= flat_settings(inner, f"{key}.{name}" if key else str(name))
    return flat


def _differing(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    # Keys in the order of the first run that has them.
    keys = {key: None for values in settings for key in values}
    rows = []
    for key in keys:
        found = [values.get(key, NOTHING) for values in settings]
        # A section that a run lacks is shown by what the others set in it.
        if len(set(found)) > 1 and not _UNSET.issuperset(found):
            rows.append((key, found))
    return rows


# ------------------------------------------------------------------ results


def reward_table(peers: Sequence[Peer]) -> Table:
    """MEAN of every reward and held-out reward over the last tenth of each GRPO run's steps."""
    ends = []
    for peer in peers:
        rows_of_run = data.metrics(peer.folder("grpo"))
        columns = data.columns(rows_of_run)
        last = {name: means_of_ends(values)[1] for name, values in columns.items()}
        ends.append(last)

    # Rewards of any of the runs.
    names = sorted({name for values in ends for name in values})
    rows = []
    for name in names:
        kind, _, reward = name.partition("/")
        # A reward logs its spread, a part of it and a share of failures do not.
        is_reward = kind == "reward" and f"{name}_std" in names
        is_heldout = kind in HELDOUT and "." not in reward
        if is_reward or is_heldout:
            means = [values.get(name, math.nan) for values in ends]
            rows.append((name, means))
    return Table("", rows)


def evaluation_tables(peers: Sequence[Peer]) -> list[Table]:
    """Means of the evaluations with their intervals, and the change against the first peer.

    A value is (the quantity, its difference from the first peer's at the same prompts and seeds).
    """
    tables = []
    for title, folders in _matched(peers):
        summaries = [data.intervals(folder) for folder in folders]
        names = {name: None for means in summaries for name in means}
        first = folders[0]
        rows = []
        for name in names:
            cells: list[tuple[Row | None, Row | None]] = []
            for folder, means in zip(
                folders,
                summaries,
                strict=True,
            ):
                # The first has nothing to be compared with.
                change = None
                if folder != first and name in means and name in summaries[0]:
                    change = _change(folder, first, name)
                cells.append((means.get(name), change))
            rows.append((name, cells))
        if rows:
            tables.append(Table(title, rows))
    return tables


def _change(folder: Path, first: Path, name: str) -> Row | None:
    # The rows of a reward model's evaluation are pairs.
    rows = data.results(folder)
    if not rows or "rewards" not in rows[0]:
        return None
    return data.difference(folder, first, name)


# ------------------------------------------------------------------ curves and videos


def peer_charts(peers: Sequence[Peer]) -> list[tuple[str, list[Chart]]]:
    """Draw the training runs of each kind over each other."""
    groups = []
    for kind in STAGES:
        # Every peer keeps its colour, so a peer without the run has an empty place.
        folders = {peer.name: peer.folder(kind) for peer in peers}
        charts = overlaid_charts(kind, folders)
        if charts:
            groups.append((kind, charts))
    return groups


def peer_videos(
    peers: Sequence[Peer],
    videos: Videos,
    count: int,
) -> tuple[list[Card], list[Slide], list[Slide]]:
    """Show evaluations, held-out prompts and rollouts of the peers at the same seeds."""
    evaluations = {}
    for peer in peers:
        # What a peer is about: the tuned generator, else the only one that it has.
        for kind in ("base", "dpo_tuned", "tuned"):
            folder = peer.folder(kind)
            if folder is not None:
                evaluations[peer.name] = folder
    # A video alone is beside nothing.
    cards = []
    if len(evaluations) > 1:
        cards = evaluated_videos(evaluations, videos, count)
    heldout = _slides(peers, "evaluation", videos, count)
    rollouts = _slides(peers, "samples", videos, min(count, 4))
    return cards, heldout, rollouts


def _slides(
    peers: Sequence[Peer],
    place: str,
    videos: Videos,
    count: int,
) -> list[Slide]:
    steps = {}
    for peer in peers:
        sampled = data.sampled_steps(peer.folder("grpo"), place)
        if sampled:
            steps[peer.name] = sampled
    # A run alone is beside nothing.
    if len(steps) < 2:
        return []
    return same_seed_slides(steps, videos, count)
