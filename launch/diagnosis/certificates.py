"""Certificates: what the first updates of a recipe look like where it works.

configs/certificates.json has an entry for every GRPO recipe; `launch/diagnosis/certificate.py`
writes it from runs of the recipe with several seeds. A recipe that was never run has its settings
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import read_json
from common.run_record import value_at
from common.shipped import shipped
from launch.diagnosis.evidence import Diagnosis, Evidence

FILE = "configs/certificates.json"
# Bands hold for runs that agree in these settings.
DECISIVE = (
    "generator.lora",
    "generator.sampler.stochastic",
    "generator.sampler.initial_noise",
    "generator.sampler.kernel",
    "generator.sampler.guidance_scale",
    "grpo.reweight",
)
# Settings of a recipe that its certificate remembers.
REMEMBERED = (*DECISIVE, "generator.path", "generator.fps", "optimizer.lr")
# How a quantity's band is made of its smallest and largest value: a factor on both sides.
FACTORS = {
    "train/grad_norm": 5.0,
    "train/kl": 20.0,
    "train/ratio_max_dev": 10.0,
    "adapter/drift": 10.0,
}
# Or a number that is added on both sides.
MARGINS = {"train/loss": 0.05, "zero_spread": 0.25, "group_std_median": 0.15}
# A band's quantity must be outside in this share of the updates.
OUTSIDE = 0.7
NAMES = {
    "train/grad_norm": "the gradient's norm",
    "train/kl": "the KL to the reference",
    "train/loss": "the loss",
    "train/ratio_max_dev": "the largest |ratio - 1|",
    "adapter/drift": "the change of the velocity by training",
    "zero_spread": "the share of groups without spread",
    "group_std_median": "the median spread of a group",
}


def band(name: str, low: float, high: float) -> list[float]:
    """The band of a quantity whose smallest and largest values over seeds are these."""
    if name in FACTORS:
        factor = FACTORS[name]
        # A ratio that is exactly 1 may differ by rounding elsewhere.
        return [low / factor, high * factor + 1e-4 * (name == "train/ratio_max_dev")]
    return [low - MARGINS[name], high + MARGINS[name]]


def certificate_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate that fits a run's settings; {} without any.

    One of the same rewards is preferred. Where only the generator is the same, bands are left out.
    """
    file = Path(shipped(FILE))
    if not file.is_file():
        return {}
    rewards = value_at(settings, "rewards") or {}
    kinds = {identity(name, entry or {}) for name, entry in rewards.items()}
    nearest: dict[str, Any] = {}
    fitting = []
    for entry in read_json(file)["recipes"]:
        if not _same_folder(entry["settings"], settings):
            continue
        fits = all(_same(entry["settings"], settings, key) for key in DECISIVE)
        # All certificates are of the policy gradient.
        fits = fits and value_at(settings, "grpo.objective") in (None, "policy")
        if fits and entry["bands"]:
            fitting.append(entry)
        nearest = nearest or {**entry, "bands": {}}
    if not fitting:
        return nearest
    # The most rewards in common, and the fewest others.
    fitting.sort(key=lambda entry: len(kinds ^ set(entry["rewards"])))
    best = fitting[0]
    # How far an update moves, and the VAE, do not depend on the reward.
    bands = dict(best["bands"])
    for entry in fitting[1:]:
        if "adapter/drift" in entry["bands"]:
            bands.setdefault("adapter/drift", entry["bands"]["adapter/drift"])
    limit = min(entry["round_trip_limit"] for entry in fitting)
    return {**best, "bands": bands, "round_trip_limit": limit}


def identity(name: str, reward: Mapping[str, Any]) -> str:
    """What a reward is, since its name is the user's choice."""
    return str(reward.get("target") or reward.get("kind") or name)


def _same_folder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two runs have the same generator, by the end of its path."""
    names = []
    for settings in (one, other):
        names.append(Path(str(value_at(settings, "generator.path"))).parts[-2:])
    return names[0] == names[1]


def _same(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return value_at(one, key) == value_at(other, key)


def certificate_rules(evidence: Evidence) -> Iterator[Diagnosis]:
    """Name what lies outside of the certificate's bands; it is worth knowing, no accusation."""
    bands = evidence.certificate.get("bands", {})
    outside = []
    # Spreads are those of one reward.
    known = set(evidence.certificate.get("rewards", {}))
    trained = evidence.trained_rewards[:1]
    same = all(identity(name, evidence.rewards[name]) in known for name in trained)
    for name, rows in bands.items():
        if "/" not in name and not same:
            continue
        # The band of each update that the certificate knows.
        values = values_of(evidence, name)
        wrong = []
        compared = 0
        for step, (low, high) in enumerate(rows):
            if step not in values:
                continue
            compared += 1
            if not low <= values[step] <= high:
                wrong.append((values[step], low, high))
        if wrong and len(wrong) >= OUTSIDE * compared:
            value, low, high = wrong[-1]
            outside.append(
                f"{NAMES[name]} is {value:.2g}, usual {low:.2g} to {high:.2g}"
            )
    if outside:
        yield Diagnosis(
            "unlike-certificate",
            "possible",
            f"the first updates are unlike those of {evidence.certificate['recipe']}",
            "; ".join(outside),
            "compare the settings; a change on purpose explains it",
        )


def values_of(evidence: Evidence, name: str) -> dict[int, float]:
    """The finite values of a quantity by the number of the update."""
    # Later updates on one rollout move the ratio, as they should.
    if name == "train/ratio_max_dev" and evidence.setting("grpo.updates", 1) > 1:
        return {}
    rows = evidence.steps
    if name.startswith("adapter/"):
        rows = evidence.measured_updates
    key = name
    if "/" not in name:
        # Of the first reward that is trained on.
        trained = evidence.trained_rewards
        key = f"reward/{trained[0]}_{name}" if trained else name
    values = {}
    for row in rows:
        if math.isfinite(row.get(key, math.nan)):
            values[int(row["step"])] = row[key]
    return values
