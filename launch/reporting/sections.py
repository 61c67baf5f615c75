"""The sections of a report: which numbers, curves and videos a reader gets to see, in which order."""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.reporting import data
from launch.reporting.charts import Chart, Series, histogram, line_chart
from launch.reporting.data import Row, Runs

PIXEL_ART = 128  # videos up to this width are shown enlarged, with hard edges
_BASE, _TUNED = 5, 0  # colours
_EVALUATIONS = ("rm", "base", "tuned", "dpo_tuned")
_LABELS = {1: "A preferred", -1: "B preferred", 0: "tie"}


@dataclass(frozen=True)
class VideoSide:
    """One video with what was said about it. ``uri`` is None where there is no video to show."""

    label: str
    uri: str | None
    small: bool
    facts: Mapping[str, float | None]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """Videos of one prompt that belong next to each other."""

    prompt: str
    sides: Sequence[VideoSide]
    remark: str = ""


class Videos:
    """mp4 files as data URIs, until ``max_bytes`` of them are in the page; ``left_out`` counts the rest."""

    def __init__(self, max_bytes: int) -> None:
        self.room, self.left_out = max_bytes, 0

    def side(
        self,
        label: str,
        path: Path | None,
        facts: Mapping[str, Any],
        texts: Mapping[str, str],
    ) -> VideoSide:
        """A `VideoSide` with the video, if it is there and there is room."""
        uri = self._embed(path) if path is not None else None
        kept = {name: text for name, text in texts.items() if text}
        return VideoSide(
            label,
            uri,
            uri is not None and _is_small(path),
            {k: _number(v) for k, v in facts.items()},
            kept,
        )

    def _embed(self, path: Path) -> str | None:
        if (
            path.suffix != ".mp4" or not path.is_file()
        ):  # a row's text decides which file is read: videos only
            return None
        if path.stat().st_size > self.room:
            self.left_out += 1
            return None
        content = path.read_bytes()
        self.room -= len(content)
        return f"data:video/mp4;base64,{base64.b64encode(content).decode('ascii')}"


def _is_small(path: Path | None) -> bool:
    import av

    try:
        with av.open(str(path)) as container:
            return (
                bool(container.streams.video)
                and container.streams.video[0].width <= PIXEL_ART
            )
    except (av.FFmpegError, OSError):
        return False


# ------------------------------------------------------------------ videos


def side_by_side(runs: Runs, videos: Videos, count: int) -> list[Card]:
    """The first ``count`` prompts of which base and tuned videos were kept, and those after Flow-DPO with them; of one
    evaluation alone, its videos.
    """
    given = {"base": runs.base, "tuned": runs.tuned, "Flow-DPO": runs.dpo_tuned}
    folders = {label: folder for label, folder in given.items() if folder is not None}
    first, *others = folders or [""]
    if others:
        tables = [
            {(r["prompt"], r["seed"]): r for r in data.results(folders[label])}
            for label in others
        ]
        keyed = [
            ((row["prompt"], row["seed"]), row) for row in data.results(folders[first])
        ]
        rows = [
            ((row, *(table[key] for table in tables)), list(folders))
            for key, row in keyed
            if all(key in table for table in tables)
        ]
    else:
        rows = [
            ((row,), list(folders))
            for label in folders
            for row in data.results(folders[label])
        ]
    shown = [
        (part, labels) for part, labels in rows if all(row.get("video") for row in part)
    ][:count]
    return [
        Card(
            part[0]["prompt"],
            [
                videos.side(
                    label, folders[label] / row["video"], row["rewards"], row["texts"]
                )
                for label, row in zip(labels, part, strict=True)
            ],
            f"seed {part[0]['seed']}",
        )
        for part, labels in shown
    ]


def group_cards(
    rows: Sequence[Row], videos: Videos, *, groups: int = 2, members: int = 8
) -> list[Card]:
    """The groups of one sampled GRPO step: members of a prompt beside each other, the largest advantage first."""
    by_seed: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        by_seed.setdefault((row["prompt"], row["seed"]), []).append(row)
    cards = []
    for (prompt, _), group in list(by_seed.items())[:groups]:
        ranked = sorted(group, key=lambda row: -float(row.get("advantage") or 0.0))[
            :members
        ]
        sides = [
            videos.side(
                f"member {row['member']}",
                row["path"],
                {"advantage": row.get("advantage"), **row.get("rewards", {})},
                row.get("texts", {}),
            )
            for row in ranked
        ]
        cards.append(Card(prompt, sides))
    return cards


def pair_cards(folder: Path | None, videos: Videos, *, count: int = 2) -> list[Card]:
    """Pairs of a reward-model evaluation: the first ones, and the ones it is most wrong about."""
    rows = [row for row in data.results(folder) if _margin(row) is not None]
    wrong = sorted(
        (row for row in rows if row["label"] and _margin(row) * row["label"] < 0),
        key=_wrongness,
    )
    chosen = [(row, "one of the first pairs") for row in rows[:count]]
    chosen += [
        (row, "one of the pairs it is most wrong about")
        for row in wrong[:count]
        if row not in rows[:count]
    ]
    return [
        Card(
            row["prompt"],
            [
                videos.side(
                    f"video {side}",
                    folder / row[f"video_{side}"],
                    {"reward": row[f"reward_{side}"]},
                    {"chain of thought": row.get(f"cot_{side}") or ""},
                )
                for side in "AB"
            ],
            f"people: {_LABELS[row['label']]}; {remark}",
        )
        for row, remark in chosen
    ]


def _margin(row: Row) -> float | None:
    values = row.get("reward_A"), row.get("reward_B")
    return None if None in values else values[0] - values[1]


def _wrongness(row: Row) -> float:
    return -abs(_margin(row) or 0.0)


# ------------------------------------------------------------------ curves


def grpo_charts(folder: Path | None) -> list[Chart]:
    """Rewards first, those that are only watched marked so; then what tells a healthy run from a broken one."""
    rows = data.metrics(folder)
    names = data.reward_names(folder)
    charts = []
    for name in names:
        weight = data.weight_of(folder, name)
        role = (
            ""
            if weight is None
            else " (watched only)"
            if weight == 0
            else f" (trained, weight {weight:g})"
        )
        curve = _curve(rows, f"reward/{name}", name, color=2 if weight == 0 else 0)
        charts.append(
            line_chart(
                f"Reward: {name}{role}", [curve], note="mean over the step's rollouts"
            )
        )
        ways = [("eval", "the training grid"), ("eval_stock", "the stock scheduler")]
        curves = [
            _curve(rows, f"{key}/{name}", label, color=i)
            for i, (key, label) in enumerate(ways)
        ]
        charts.append(
            line_chart(
                f"Held-out prompts: {name}",
                [c for c in curves if c.y],
                note="the same seeds each time",
            )
        )
        parts = sorted(
            {key for row in rows for key in row if key.startswith(f"reward/{name}.")}
        )
        curves = [
            _curve(rows, key, key.rpartition(".")[2], color=i)
            for i, key in enumerate(parts)
        ]
        charts.append(line_chart(f"Parts of {name}{role}", curves))
    for name in (name for name in names if data.weight_of(folder, name) != 0):
        spread = [
            ("group_std_max", "largest group"),
            ("group_std_median", "median group"),
            ("std", "all rollouts"),
        ]
        curves = [
            _curve(rows, f"reward/{name}_{key}", label, color=i)
            for i, (key, label) in enumerate(spread)
        ]
        charts.append(
            line_chart(f"Spread of {name}", curves, note="standard deviation")
        )
        for key, title in (
            ("zero_spread", "Share of groups without spread"),
            ("unjudged", "Videos not judged"),
        ):
            curve = _curve(rows, f"reward/{name}_{key}", name)
            if any(value > 0 for value in curve.y):
                charts.append(line_chart(f"{title}: {name}", [curve]))
    for key, title, note, log in (
        ("train/kl", "KL to the reference", "", False),
        ("train/grad_norm", "Gradient norm", "before clipping", False),
        (
            "train/ratio_max_dev",
            "Largest |ratio − 1|",
            "0 up to rounding on the first pass",
            True,
        ),
        ("train/loss", "Loss", "", False),
        ("seconds/step", "Seconds per step", "", False),
    ):
        charts.append(line_chart(title, [_curve(rows, key, title)], note=note, log=log))
    return [chart for chart in charts if chart is not None]


def dpo_charts(folder: Path | None) -> list[Chart]:
    """Loss and accuracy, then winner and loser apart, which a loss does not show, then both by noise level."""
    rows = data.metrics(folder)
    names = {key for row in rows for key in row}
    bins = sorted(key for key in names if key.startswith("train/loss_sigma_"))
    where = [(key, key.removeprefix("train/loss_")) for key in bins]
    apart = [
        _curve(rows, "train/chosen_change", "winner's error", 0),
        _curve(rows, "train/rejected_change", "loser's error", 1),
    ]
    accuracy = [
        _curve(rows, "train/accuracy", "training step", 5),
        _curve(rows, "heldout/accuracy", "held-out pairs", 0),
    ]
    charts = [
        line_chart(
            "Loss",
            [_curve(rows, "train/loss", "loss")],
            note="Flow-DPO starts at log 2 = 0.693",
        ),
        line_chart(
            "Implicit accuracy", accuracy, note="pairs whose winner gained on its loser"
        ),
        line_chart(
            "Change against the reference",
            apart,
            note="both rising: the policy runs from the loser",
        ),
        line_chart(
            "Push",
            [_curve(rows, "train/dpo_logit_abs", "push")],
            note="|beta / 2 (d_w - d_l)|, healthy from 0.05 to 3",
        ),
        line_chart(
            "Loss by noise level",
            [_curve(rows, key, name, color=i) for i, (key, name) in enumerate(where)],
        ),
        line_chart(
            "Gradient norm",
            [_curve(rows, "train/grad_norm", "norm")],
            note="before clipping",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def cold_start_charts(folder: Path | None) -> list[Chart]:
    """Loss, accuracy in training and on held-out pairs, margin, gradient norm."""
    rows = data.metrics(folder)
    accuracy = [
        _curve(rows, "train/accuracy", "training step", 5),
        _curve(rows, "heldout/accuracy", "held-out pairs", 0),
    ]
    charts = [
        line_chart(
            "Bradley-Terry loss",
            [_curve(rows, "train/loss", "loss")],
            note="log 2 = 0.693 is a coin",
        ),
        line_chart("Preference accuracy", accuracy, note="ties left out"),
        line_chart(
            "Margin",
            [_curve(rows, "train/margin", "margin")],
            note="reward of the preferred video minus the other",
        ),
        line_chart(
            "Gradient norm",
            [_curve(rows, "train/grad_norm", "norm")],
            note="before clipping",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def dual_rl_charts(folder: Path | None) -> list[Chart]:
    """Loss and its parts, accuracy, and the rules' rewards of the chains of thought."""
    rows = data.metrics(folder)
    rules = sorted(
        key for key in {key for row in rows for key in row} if key.startswith("reward/")
    )
    accuracy = [
        _curve(rows, "train/accuracy", "training step", 5),
        _curve(rows, "heldout/accuracy", "held-out pairs", 0),
    ]
    charts = [
        line_chart("Loss", [_curve(rows, "train/loss", "loss")]),
        line_chart(
            "Bradley-Terry loss",
            [_curve(rows, "train/bt", "loss")],
            note="log 2 = 0.693 is a coin",
        ),
        line_chart("Preference accuracy", accuracy, note="ties left out"),
        line_chart("KL to the first stage", [_curve(rows, "train/kl", "KL")]),
        *(
            line_chart(
                f"Chains: {key.removeprefix('reward/')}", [_curve(rows, key, key)]
            )
            for key in rules
        ),
    ]
    return [chart for chart in charts if chart is not None]


@dataclass(frozen=True)
class Further:
    """A run beside the one of its kind that the page is about: curves of a training, means of an evaluation."""

    kind: str
    folder: str
    charts: Sequence[Chart]
    means: Sequence[tuple[str, Mapping[str, Any]]]


def further(runs: Runs) -> list[Further]:
    """All of `Runs.more`."""
    draw = {
        "grpo": grpo_charts,
        "dpo": dpo_charts,
        "cold_start": cold_start_charts,
        "dual_rl": dual_rl_charts,
    }
    return [
        Further(
            one.kind,
            str(one.folder),
            draw[one.kind](one.folder) if one.kind in draw else [],
            _means(one.folder),
        )
        for one in runs.more
    ]


def _means(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    found = data.summary(folder) or {}
    return [
        (name, value)
        for name, value in found.items()
        if isinstance(value, dict) and "mean" in value
    ]


def _curve(rows: Sequence[Row], key: str, name: str, color: int = 0) -> Series:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return Series(name, [y for _, y in points], [x for x, _ in points], color)


# ------------------------------------------------------------------ distributions


def distributions(runs: Runs) -> list[Chart]:
    """Rewards of base and tuned videos, advantages of sampled rollouts, and margins by what people said."""
    charts = []
    base, tuned = data.results(runs.base), data.results(runs.tuned)
    for name in dict.fromkeys(
        name for row in [*base, *tuned] for name in row["rewards"]
    ):
        series = [
            Series("base", _column(base, name), color=_BASE),
            Series("tuned", _column(tuned, name), color=_TUNED),
        ]
        charts.append(
            histogram(f"Reward of {name}", series, note="over the held-out prompts")
        )
    advantages = [
        float(row.get("advantage") or 0.0)
        for rows in data.sampled_steps(runs.grpo).values()
        for row in rows
    ]
    charts.append(
        histogram(
            "Advantages",
            [Series("", advantages)],
            note=f"{len(advantages)} sampled rollouts",
        )
    )
    pairs = [row for row in data.results(runs.rm) if _margin(row) is not None]
    series = [
        Series(
            said,
            [_margin(row) or 0.0 for row in pairs if row["label"] == label],
            color=color,
        )
        for color, (label, said) in zip((0, 1, 5), _LABELS.items(), strict=True)
    ]
    charts.append(
        histogram(
            "Margin reward A − reward B, by what people said",
            series,
            note="held-out pairs",
        )
    )
    return [chart for chart in charts if chart is not None]


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [data.value_of(row, name) for row in rows]


# ------------------------------------------------------------------ text


def files_of(runs: Runs) -> list[tuple[str, str, str]]:
    """(run, file name, content) of every config.yaml and environment.json."""
    found: Iterable[tuple[str, str, str | None]] = (
        (label, name, data.text_of(folder, name))
        for label, folder in [
            *(
                (kind.replace("_", " "), folder)
                for kind, folder in runs.named().items()
            ),
            *((str(one.folder), one.folder) for one in runs.more),
        ]
        for name in ("config.yaml", "environment.json")
    )
    return [(label, name, text) for label, name, text in found if text is not None]


def missing(runs: Runs) -> list[str]:
    """What the report would show if it had been given more."""
    notes = []
    absent = {
        "cold_start": "no cold-start run: the reward model's training is not shown",
        "rm": "no reward-model evaluation: its accuracy is not shown",
        "grpo": "no GRPO run: its curves and rollouts are not shown",
    }
    notes += [text for field, text in absent.items() if field not in runs.named()]
    if runs.base is None and runs.tuned is None:
        notes.append(
            "no evaluation of a generator: base and tuned videos are not compared"
        )
    elif runs.base is None or runs.tuned is None:
        notes.append(
            f"no evaluation of the {'base' if runs.base is None else 'tuned'} generator to compare with"
        )
    elif not data.matched(data.results(runs.base), data.results(runs.tuned)):
        notes.append(
            "base and tuned share no prompt and seed, so no videos stand side by side"
        )
    evaluated = [(field, getattr(runs, field)) for field in _EVALUATIONS]
    for field, folder in [
        *evaluated,
        *(
            (str(one.folder), one.folder)
            for one in runs.more
            if one.kind in _EVALUATIONS
        ),
    ]:
        if folder is not None and data.summary(folder) is None:
            notes.append(
                f"the evaluation {field} has no summary.json: it has not finished"
            )
    return notes


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits, or a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.3e}"


def clean(text: str) -> str:
    """Without control characters, which HTML has no place for; escaping is the template's."""
    bad = ("Cc", "Cs")  # control characters, lone surrogates
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in bad and c not in "\n\t"
        else c
        for c in text
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


FILTERS: dict[str, Callable[..., str]] = {"number": number, "clean": clean}
