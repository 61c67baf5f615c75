"""The training loop of GRPO, DPO and both stages of DeScore.

A command calls `run_training` with a function that builds its model and its engine and
describes its differences from the other commands in a `TrainingTask`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import checkpoint, faults, progress
from common.cli import user_errors
from common.distributed import from_main, is_main
from common.input_record import changed_inputs, write_inputs
from common.log import RunLog, say
from common.log import progress as log_progress
from common.memory import peak_memory
from common.run_record import SETTINGS, changed_settings, dump, write_settings
from common.types import RewardUnavailableError
from engine.guard import end_run, guarded
from engine.state import load_engine, save_engine

if TYPE_CHECKING:
    from engine.config import TrainingRun
    from engine.ema import Ema
    from engine.guard import Guard
    from engine.skip_nonfinite import SkipNonFinite


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimizer step.

    result  whatever `TrainingTask.after_log` needs of the step
    stop    ends the run after this step, as if it were the last
    """

    metrics: dict[str, float]
    result: Any = None
    stop: bool = False


def do_nothing(*_: object) -> None:
    """Stand in for a part that a task does not have."""


def no_metrics(*_: object) -> dict[str, float]:
    """Stand in for a measurement that a task does not have."""
    return {}


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """The parts in which the training commands differ. All ranks call every function.

    label           names the progress bar
    steps           is the number of optimizer steps of the whole run
    step            makes optimizer step n, counted from 0
    export          writes the trained weights after the last step
    ema             averages the trained weights after every step
    prepare         runs before the first step of this process, with that step's number
    measure_before  measures before step n, and with n = steps after the last; {} if not due
    measure_after   measures after every ``measure_every`` steps (0 for never) and the last
    take_forwards   returns and resets the number of forwards, a metric of each step
    after_log       runs after a step is logged
    watch           looks at a logged step, with its metrics; its forwards count for no step
    write_extra     writes files into a checkpoint, besides those of engine and average
    state           returns JSON for a checkpoint, besides the number of steps
    restore         reads a checkpoint's folder when a run resumes
    inputs          the files that the run reads, as `common.input_record.record_inputs` gives
                    them on rank 0; a resumed run names those that changed
    close           runs at the end of the process, after errors too
    next_command    is printed at the end of the run: what people do with its result
    explain_unavailable  prints the cause of a RewardUnavailableError; the run then saves
                    and exits with code 1. Without it the error travels
    """

    label: str
    steps: int
    engine: SkipNonFinite
    step: Callable[[int], StepReport]
    export: Callable[[], None]
    ema: Ema | None = None
    prepare: Callable[[int], None] = do_nothing
    measure_before: Callable[[int], dict[str, float]] = no_metrics
    measure_after: Callable[[], dict[str, float]] = no_metrics
    measure_every: int = 0
    take_forwards: Callable[[], dict[str, float]] = no_metrics
    after_log: Callable[[int, StepReport, RunLog], None] = do_nothing
    watch: Callable[[int, StepReport, Mapping[str, float]], None] = do_nothing
    write_extra: Callable[[Path], None] = do_nothing
    state: Callable[[], Mapping[str, Any]] = dict
    restore: Callable[[Path], None] = do_nothing
    inputs: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = do_nothing
    next_command: str = ""
    explain_unavailable: Callable[[RewardUnavailableError], None] | None = None


def run_training(
    run: TrainingRun, build_task: Callable[[], TrainingTask], *, resume: str
) -> None:
    """Join the other ranks, hold the run's folder, build the task and train it.

    resume  "auto", "none" or a folder, see `common.checkpoint.resolve_resume`
    """
    with guarded(run) as guard, closing(build_task()) as task:
        _train(run, task, guard, resume)


def _train(
    run: TrainingRun,
    task: TrainingTask,
    guard: Guard,
    resume: str,
) -> None:
    """Train from the checkpoint to resume from to the last step, then export."""
    # 1. Resume. Forwards of the preparation count for no step.
    start = _begin(run, task, resume)
    task.prepare(start)
    task.take_forwards()
    log = RunLog(
        run.run_dir,
        start=start,
        wandb=run.wandb,
        tensorboard=run.tensorboard,
        total=task.steps,
    )

    # From here on a signal lets the current step finish.
    guard.begin(start)
    clock = StepClock(run)
    steps = range(start, task.steps)
    for step in log_progress(steps, len(steps), task.label, describe=progress.describe):
        # 2. Measure if it is due before the step, then make the step.
        progress.begin_step(step, task.steps)
        with _stopping_if_unavailable(run, task, guard, log, step):
            measured = _measure_before(task, step)
            report = task.step(step)
        # The average follows every step, skipped ones included.
        if task.ema is not None:
            task.ema.update()
        faults.point("step")
        is_last = report.stop or step + 1 == task.steps

        # 3. Log the step, with measurements that are due after it.
        metrics = {
            **report.metrics,
            "train/nonfinite_updates": task.engine.pop_skipped_count(),
            **task.take_forwards(),
            **peak_memory(),
            **measured,
        }
        if is_last or _is_due(step + 1, task.measure_every):
            progress.enter("evaluation")
            metrics |= task.measure_after()
            task.take_forwards()
        # Measured before the step, or after it.
        log.log(step, metrics, measured_after=step if measured else step + 1)
        faults.point("logged")
        task.watch(step, report, metrics)
        task.take_forwards()

        # 4. Save if it is due, at the end, and when the run is to stop.
        stop_requested = guard.step_done(step + 1, clock.step_done())
        task.after_log(step, report, log)
        is_due = _is_due(step + 1, run.save_every) or clock.save_is_due()
        if is_last or stop_requested or is_due:
            _save(run, task, guard, step + 1)
            clock.saved()
        if stop_requested:
            guard.leave(log, step + 1)
        if report.stop:
            break

    # 5. Measure the trained weights and export them.
    with _stopping_if_unavailable(run, task, guard, log, task.steps):
        measured = _measure_before(task, task.steps)
    if measured:
        log.log(task.steps, measured, measured_after=task.steps)
    task.export()
    log.close()
    if task.next_command:
        say(f"next: {task.next_command}")


class StepClock:
    """Measures steps, and how long ago the last checkpoint was written."""

    def __init__(self, run: TrainingRun) -> None:
        self.save_s = 60 * run.save_minutes
        # Some steps have an evaluation or a checkpoint.
        self._seconds: deque[float] = deque(maxlen=5)
        self._step_began = time.monotonic()
        self._saved = self._step_began

    def step_done(self) -> float:
        """Return the seconds of the longest of the last steps, from end to end."""
        now = time.monotonic()
        self._seconds.append(now - self._step_began)
        self._step_began = now
        return max(self._seconds)

    def save_is_due(self) -> bool:
        """Return True on all ranks when the checkpoint is too old on rank 0."""
        age = time.monotonic() - self._saved
        return from_main(self.save_s > 0 and age >= self.save_s)

    def saved(self) -> None:
        """Start the time to the next checkpoint."""
        self._saved = time.monotonic()


def _begin(run: TrainingRun, task: TrainingTask, resume: str) -> int:
    """Resume, then write config.yaml, and return the number of finished steps.

    A checkpoint that does not fit ends the process with exit code 2, and config.yaml of the
    previous run stays.
    """
    with user_errors():
        # A mistake of the user's, such as another adapter rank, ends the run here.
        folder = checkpoint.resolve_resume(resume, Path(run.run_dir) / "checkpoints")
        done = 0 if folder is None else _resume(run, task, folder)
    # Rank 0 records the run once nothing can fail any more.
    if is_main():
        checkpoint.set_aside(Path(run.run_dir) / "checkpoints", folder)
        dump(run, run.run_dir)
        write_inputs(Path(run.run_dir), task.inputs)
    return done


def _resume(run: TrainingRun, task: TrainingTask, folder: Path) -> int:
    """Load the checkpoint to resume from, and return its number of steps."""
    # Changed settings may be meant or a mistake: the user decides.
    settings = folder / SETTINGS
    changed = changed_settings(settings, run) if settings.is_file() else []
    if changed:
        changes = "; ".join(changed)
        say(f"other settings than {folder.name} was saved with: {changes}")
    for change in changed_inputs(folder, task.inputs):
        say(f"another input than {folder.name} was saved with: {change}")

    # The engine checks names and shapes before it overwrites anything.
    load_engine(task.engine.engine, folder)
    if task.ema is not None:
        task.ema.load(folder)
    task.restore(folder)
    done = int(checkpoint.load_state(folder)["steps_done"])
    say(f"going on after {done} steps from {folder}")
    return done


def _save(run: TrainingRun, task: TrainingTask, guard: Guard, steps_done: int) -> None:
    """Write checkpoints/step-N with the engine, the average, the settings and the task's files."""

    def write(folder: Path) -> None:
        save_engine(task.engine.engine, folder)
        if task.ema is not None:
            task.ema.save(folder)
        task.write_extra(folder)
        if is_main():
            write_settings(run, folder / SETTINGS)
            write_inputs(folder, task.inputs)

    # The number of steps lies next to the state of the task.
    progress.enter("save")
    checkpoint.save(
        Path(run.run_dir) / "checkpoints",
        steps_done,
        write,
        keep=run.keep,
        state={"steps_done": steps_done, **task.state()},
    )
    guard.saved(steps_done)


def _measure_before(task: TrainingTask, step: int) -> dict[str, float]:
    """Measure if it is due; the forwards of a measurement count for no step."""
    progress.enter("evaluation")
    measured = task.measure_before(step)
    progress.enter("")
    if measured:
        task.take_forwards()
    return measured


def _is_due(steps_done: int, every: int) -> bool:
    return every > 0 and steps_done % every == 0


@contextmanager
def _stopping_if_unavailable(
    run: TrainingRun,
    task: TrainingTask,
    guard: Guard,
    log: RunLog,
    step: int,
) -> Iterator[None]:
    """Save and exit with code 1, on all ranks, if a reward cannot be had inside.

    Every rank must raise RewardUnavailableError. A run that is started again resumes there.
    """
    try:
        yield
    except RewardUnavailableError as error:
        if task.explain_unavailable is None:
            raise
        task.explain_unavailable(error)
        # The failed step has changed no weights, so the steps before it are saved.
        if guard.request.steps_saved < step:
            _save(run, task, guard, step)
        done = "before the first step was done"
        if step:
            done = f"after {step} steps, which are saved"
        end_run(log, f"stopped {done}: {error}", 1)
