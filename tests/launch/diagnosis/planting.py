"""How faults are planted: functions are replaced in the process of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def nothing() -> None:
    """The fault is in the settings, or there is none."""


@dataclass(frozen=True)
class PlantedFault:
    """How a fault is planted, and what a diagnosis must call it.

    causes     any of them is the right name
    plant      replaces functions, before the run starts
    overrides  of the run's settings
    ranks      of the run
    """

    causes: tuple[str, ...]
    plant: Callable[[], None] = nothing
    overrides: tuple[str, ...] = ()
    ranks: int = 1


def replace_in(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def of_oracle(change: Callable[[Any, Any, Any, float], Any]) -> None:
    from alignment.rewards.errors import NamedReward

    def make(score: Any) -> Any:
        def changed(self: Any, video: Any, prompts: Any, *, fps: float) -> Any:
            oracle = type(self.reward)
            # the class of the user's reward, whatever module it was loaded as
            if not hasattr(oracle, "planted"):
                inner = getattr(self.reward, "reward", self.reward)
                kind = type(inner)
                plain = kind.score
                if not hasattr(kind, "planted"):
                    kind.score = lambda me, v, p, *, fps: change(
                        lambda a, b, c: plain(me, a, b, fps=c), v, p, fps
                    )
                    kind.planted = True
            return score(self, video, prompts, fps=fps)

        return changed

    replace_in(NamedReward, "score", make)


def change_value(score: Any, change: Callable[[Any], Any]) -> Any:
    from dataclasses import replace

    return replace(score, value_B=change(score.value_B))
