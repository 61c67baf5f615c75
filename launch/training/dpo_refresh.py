"""Online pairs of a DPO run: every so many steps the policy makes a new set of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignment.pair_store import MANIFEST, PairSet
from alignment.prompts import read_image_prompts
from common.distributed import derive_seed
from common.log import say
from common.schedule import IndexSchedule
from launch.compose import build_rewards
from launch.training.pair_making import PairOutput, make_pairs

if TYPE_CHECKING:
    from alignment.dpo import DpoLoop
    from launch.schemas.pairs import DpoRun


class Refresher:
    """Replaces the pairs before steps every, 2 every, ... by a round that the policy makes.

    Round n is in run_dir/pairs/round-n. A round without a pair is left out.
    """

    def __init__(self, run: DpoRun, loop: DpoLoop) -> None:
        self.loop = loop
        self.refresh = run.refresh
        self.seed = run.seed
        self.folder = Path(run.run_dir) / "pairs"
        self.rewards = build_rewards(run.refresh.rewards)
        self.is_first_call = True

    def before(self, step: int) -> None:
        """Make the round that is due, or find the current one. All ranks call it before a step."""
        # Round 0 is the set that the run starts with.
        number = step // self.refresh.every
        if number and step % self.refresh.every == 0:
            self._make_round(number)
        elif number and self.is_first_call:
            self._find_round(number)
        self.is_first_call = False

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}"

    def _find_round(self, number: int) -> None:
        """After a resume, use the newest whole round that this step may know."""
        for earlier in range(number, 0, -1):
            folder = self._folder_of(earlier)
            if (folder / MANIFEST).exists():
                self.loop.use(PairSet(folder))
                return

    def _make_round(self, number: int) -> None:
        # Each round takes the next prompts of a shuffled schedule.
        prompts = read_image_prompts(self.refresh.prompts)
        schedule = IndexSchedule(
            len(prompts), seed=self.seed, per_step=self.refresh.limit, name="refresh"
        )
        # From the beginning: candidates of an interrupted round come from other weights.
        output = PairOutput(
            self._folder_of(number), identity={"round": number}, resume="none"
        )
        try:
            make_pairs(
                output,
                [prompts[i] for i in schedule.at(number - 1)],
                self.loop.generator,
                self.rewards,
                {name: reward.weight for name, reward in self.refresh.rewards.items()},
                how=self.refresh.pairs,
                seed=derive_seed(self.seed, "refresh", number),
            )
            self.loop.use(PairSet(output.folder))
        except ValueError as error:
            say(
                f"round {number} of online pairs is left out, earlier pairs stay: {error}"
            )
