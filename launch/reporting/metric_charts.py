"""Which metrics of a training run a report draws, by kind of run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.reporting import data
from launch.reporting.charts import COLORS, Chart, Series, line_chart


@dataclass(frozen=True)
class MetricChart:
    """A chart of metrics.

    curves       Metric -> its name in the legend. "metric*" stands for all metrics that begin so.
    description  A line under the title.
    log          Whether the axis is logarithmic.
    unless_zero  Whether the chart is left out where no value is above 0.
    """

    title: str
    curves: Mapping[str, str]
    description: str = ""
    log: bool = False
    unless_zero: bool = False


_ACCURACY = {
    "heldout/accuracy": "held-out pairs",
    "train/accuracy": "training step",
}
_GRADIENT = MetricChart("Gradient norm", {"train/grad_norm": ""}, "before clipping")
_LOSS = MetricChart("Loss", {"train/loss": ""})
_PREFERENCE = MetricChart("Preference accuracy", _ACCURACY, "ties left out")
_COIN = "log 2 = 0.693 is a coin"

# Charts of a kind of run, in the order of the page.
CHARTS = {
    "grpo": [
        # Signs of a healthy or a broken run.
        MetricChart("KL to the reference", {"train/kl": ""}),
        _GRADIENT,
        MetricChart(
            "Largest |ratio − 1|",
            {"train/ratio_max_dev": ""},
            "0 up to rounding on the first pass",
            log=True,
        ),
        _LOSS,
        MetricChart("Seconds per step", {"seconds/step": ""}),
    ],
    "dpo": [
        MetricChart("Loss", {"train/loss": ""}, "Flow-DPO starts at log 2 = 0.693"),
        MetricChart(
            "Implicit accuracy",
            _ACCURACY,
            "pairs whose chosen video gained on the rejected one",
        ),
        # The loss does not show these two apart.
        MetricChart(
            "Change against the reference",
            {
                "train/chosen_change": "chosen: error",
                "train/rejected_change": "rejected: error",
            },
            "both rising: the policy leaves the rejected video and the chosen one too",
        ),
        MetricChart(
            "Size of the logit",
            {"train/dpo_logit_abs": ""},
            "|β / 2 (chosen − rejected change)|, healthy from 0.05 to 3",
        ),
        MetricChart("Loss by noise level", {"train/loss_sigma_*": "sigma "}),
        _GRADIENT,
    ],
    "cold_start": [
        MetricChart("Bradley-Terry loss", {"train/loss": ""}, _COIN),
        _PREFERENCE,
        MetricChart("Margin", {"train/margin": ""}, "reward of chosen minus rejected"),
        _GRADIENT,
    ],
    "dual_rl": [
        _LOSS,
        MetricChart("Bradley-Terry loss", {"train/bt": ""}, _COIN),
        _PREFERENCE,
        MetricChart("KL to the first stage", {"train/kl": ""}),
    ],
}
# Charts of each reward of GRPO; {} stands for its name.
REWARD_CHARTS = [
    MetricChart("Reward: {}", {"reward/{}": ""}, "mean over the step's rollouts"),
    MetricChart(
        "Held-out prompts: {}",
        {
            "eval/{}": "the training grid",
            "eval_stock/{}": "the stock scheduler",
        },
        "the same seeds each time",
    ),
    MetricChart("Parts of {}", {"reward/{}.*": ""}),
]
# Further charts of a reward that is trained.
SPREAD_CHARTS = [
    MetricChart(
        "Spread of {}",
        {
            "reward/{}_group_std_max": "largest group",
            "reward/{}_group_std_median": "median group",
            "reward/{}_std": "all rollouts",
        },
        "standard deviation",
    ),
    MetricChart(
        "Share of groups without spread: {}",
        {"reward/{}_zero_spread": ""},
        unless_zero=True,
    ),
    MetricChart(
        "Videos not scored: {}",
        {"reward/{}_unscored": ""},
        unless_zero=True,
    ),
]
# A chart of each reward of the chains of thought in dual RL.
COT_CHART = MetricChart("Chains of thought: {}", {"reward/{}": ""})


def metric_charts(kind: str, folder: Path | None) -> list[Chart]:
    """Draw the metrics of a training run; those of an evaluation are none."""
    rows = data.metrics(folder)
    metrics = sorted({name for row in rows for name in row})
    rewards = [
        name.removeprefix("reward/") for name in metrics if name.startswith("reward/")
    ]
    # What to draw: a chart, and for some the reward and its title.
    wanted = []

    # Every reward of GRPO logs its mean, and its spread with _std after its name.
    if kind == "grpo":
        for name in rewards:
            if f"reward/{name}_std" not in metrics:
                continue
            # A reward of weight 0 is measured and not trained on.
            weight = data.weight_of(folder, name)
            title = name
            if weight is not None:
                role = f"trained, weight {weight:g}" if weight else "watched only"
                title = f"{name} ({role})"
            specs = REWARD_CHARTS if weight == 0 else [*REWARD_CHARTS, *SPREAD_CHARTS]
            wanted += [(spec, name, title) for spec in specs]
    # What every run of the kind has.
    wanted += [(spec, "", "") for spec in CHARTS.get(kind, ())]
    if kind == "dual_rl":
        wanted += [(COT_CHART, name, name) for name in rewards]
    charts = [_draw(rows, metrics, *item) for item in wanted]
    return [chart for chart in charts if chart is not None]


def _draw(
    rows: Sequence[Mapping[str, float]],
    metrics: Sequence[str],
    spec: MetricChart,
    reward: str,
    title: str,
) -> Chart | None:
    """Draw a chart of a ``reward``, if it is that of a reward; None without values."""
    # Metrics and their names in the legend.
    names = {}
    for pattern, label in spec.curves.items():
        metric = pattern.replace("{}", reward)
        start = metric.removesuffix("*")
        if start == metric:
            names[metric] = label
            continue
        for name in metrics:
            if name.startswith(start):
                names[name] = label + name.removeprefix(start)

    # The values of every curve, over the logged steps that have them.
    curves: list[Series] = []
    for metric, name in names.items():
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        if points:
            x, y = zip(*points, strict=True)
            color = COLORS[len(curves) % len(COLORS)]
            curves.append(Series(name, y, x, color))
    # Charts of failures that did not happen.
    if spec.unless_zero and not any(y > 0 for curve in curves for y in curve.y):
        return None
    title = spec.title.replace("{}", title)
    return line_chart(title, curves, note=spec.description, log=spec.log)
