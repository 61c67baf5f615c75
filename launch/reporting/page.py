"""Render a report as one HTML page that needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.reporting import data, films, peers, rollouts, sections, texts
from launch.reporting.data import Runs
from launch.reporting.diagnoses import diagnoses_of
from launch.reporting.metric_charts import metric_charts
from launch.reporting.status import Status, status_of, utc

if TYPE_CHECKING:
    from launch.reporting.peers import Peer

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
# Scripts and styles of the page, in their order. uPlot 1.6.32 draws curves with values and zoom.
SCRIPTS = ("uPlot.min.js", "report.js")
STYLES = ("uPlot.min.css", "report.css")


@dataclass(frozen=True)
class PageOptions:
    """What a page shows.

    title    Its heading.
    videos   Prompts whose videos are shown.
    max_mb   Largest size of all videos.
    refresh  Seconds after which the page loads itself again; 0 for never.
    """

    title: str
    videos: int = 12
    max_mb: float = 64.0
    refresh: float = 0.0


def render(runs: Runs, options: PageOptions, root: Path | None = None) -> str:
    """Render the page of runs. Names of folders begin at ``root``, see `texts.folder_names`."""
    names = texts.folder_names([folder for _, folder in runs.all()], root)

    grpo = runs.shown.get("grpo")

    # Columns of the comparison: rewards, and their parts as "reward.part".
    shown = runs.shown
    columns = data.summary(shown.get("base")) | data.summary(shown.get("tuned"))
    rewards = [name for name in columns if "." not in name]
    parts = [name for name in columns if "." in name]
    after_dpo = columns if "dpo_tuned" in shown else ()

    # Videos enter in the order of the page until there is no room.
    store = films.Videos(int(options.max_mb * 1e6))
    labels = {"base": "base", "tuned": "tuned", "dpo_tuned": "Flow-DPO"}
    evaluations = {
        label: shown[kind] for kind, label in labels.items() if kind in shown
    }
    cards = films.evaluated_videos(evaluations, store, options.videos)
    heldout = data.sampled_steps(grpo, "evaluation")
    same_prompts = films.same_seed_slides({"": heldout}, store, options.videos)
    # The rollouts are read once for everything that shows them.
    sampled = data.sampled_steps(grpo)
    samples = films.rollout_slides(sampled, store)
    pairs = films.pair_cards(shown.get("rm"), store)
    # The template leaves out empty sections.
    return _page(
        "report.html",
        options,
        [status_of(kind, folder, names[folder]) for kind, folder in runs.all()],
        runs=shown,
        accuracy=data.summary(shown.get("rm")),
        rewards=data.compare(runs, rewards),
        dpo_rewards=data.compare(runs, after_dpo, tuned="dpo_tuned"),
        parts=data.compare(runs, parts),
        cards=cards,
        same_prompts=same_prompts,
        samples=samples,
        rollouts=rollouts.rollout_table(sampled),
        part_table=rollouts.part_table(grpo),
        judged=rollouts.judged_charts(grpo, evaluations, sampled),
        pairs=pairs,
        grpo_charts=metric_charts("grpo", grpo),
        diagnoses=diagnoses_of(grpo),
        dpo_charts=metric_charts("dpo", shown.get("dpo")),
        cold_start_charts=metric_charts("cold_start", shown.get("cold_start")),
        seconds=data.mean_seconds(data.metrics(grpo)),
        distributions=sections.distributions(runs, sampled),
        further=sections.further_runs(runs, names),
        files=sections.environments(runs, names),
        missing=sections.missing(runs, names),
        left_out=store.left_out,
    )


def render_peers(compared: Sequence[Peer], options: PageOptions) -> str:
    """Render the page that compares runs."""
    store = films.Videos(int(options.max_mb * 1e6))
    cards, heldout, sampled = peers.peer_videos(compared, store, options.videos)
    statuses = [status for peer in compared for status in peer.statuses()]
    return _page(
        "report_peers.html",
        options,
        statuses,
        peers=compared,
        settings=peers.setting_tables(compared),
        rewards=peers.reward_table(compared),
        evaluations=peers.evaluation_tables(compared),
        charts=peers.peer_charts(compared),
        cards=cards,
        heldout=heldout,
        rollouts=sampled,
        left_out=store.left_out,
    )


def _page(
    template: str,
    options: PageOptions,
    statuses: Sequence[Status],
    **values: Any,
) -> str:
    """Render a template. Texts of a run are escaped; only the SVG of a chart enters as it is."""
    import jinja2

    # Missing values in the template are errors, not empty texts.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=sections.number,
        clean=texts.clean,
        hide_folders=texts.hide_folders,
    )
    script = _joined(SCRIPTS)
    page = environment.get_template(template).render(
        **values,
        options=options,
        statuses=statuses,
        now=utc(datetime.now(UTC)),
        style=_joined(STYLES),
        script=script,
        # The browser runs this script and no other.
        script_hash=_hash(script),
    )
    # Names of rewards and parts are a user's texts too.
    return texts.clean(page)


def _joined(names: Sequence[str]) -> str:
    """Text of the files, which are this project's and enter the page as they are."""
    contents = [(TEMPLATES / name).read_text(encoding="utf-8") for name in names]
    return texts.clean("\n".join(contents))


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return base64.b64encode(digest).decode("ascii")
