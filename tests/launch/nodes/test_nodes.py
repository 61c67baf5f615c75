"""Runs on two nodes and a reward server on a third; the nodes are network namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from common.log import read_metrics
from engine.guard import STUCK
from tests.launch.nodes.namespaces import Nodes, cannot, codes, environment
from tests.launch.processes import ROOT, deepspeed
from tests.launch.test_grpo import SCRIPT, adapter_of, numbers

NODE, SBATCH, SERVER = (
    f"launch/nodes/{name}" for name in ("node.sh", "train.sbatch", "reward_server.sh")
)
TOKEN = "a secret of the tests"
STEPS = 8
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """configs/shapes/grpo.yaml, smaller, with a reward that needs no training."""
    values = yaml.safe_load((ROOT / "configs" / "shapes" / "grpo.yaml").read_text())
    values |= {
        "rewards": {"brightness": {}},
        "prompts_per_step": 4,
        "steps": STEPS,
        "save_every": 1,
        "keep": 2,
    }
    values |= {"video_every": 0, "self_checks": False, "evaluation": None}
    values["grpo"]["group_size"] = 4
    path = tmp_path_factory.mktemp("nodes") / "grpo.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def one_host(config: Path) -> Path:
    """Two ranks on this machine, in one go."""
    folder = config.parent / "one_host"
    deepspeed(2, SCRIPT, "--config", str(config), f"run_dir={folder}")
    return folder


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if problem := cannot():
        pytest.skip(problem)
    with Nodes("abc", tmp_path) as nodes:
        hosts = "".join(f"{nodes.address[name]} slots=1\n" for name in "ab")
        (tmp_path / "hostfile").write_text(f"# two nodes\n\n{hosts}")
        yield nodes


def start(
    nodes: Nodes,
    config: Path,
    run: Path,
    *words: str,
    of: Callable[[str], list[str]] = lambda _: [],
    **env: str,
) -> list[subprocess.Popen[bytes]]:
    """The run on nodes a and b; ``of`` are words for one of them."""
    shared = ["launch/grpo.py", "--config", str(config), f"run_dir={run}", *words]
    hostfile = str(nodes.folder / "hostfile")
    return [
        nodes.start(name, NODE, hostfile, str(i), *shared, *of(name), **env)
        for i, name in enumerate("ab")
    ]


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    while not any(
        (run / "checkpoints" / f"step-{n:06d}").exists() for n in range(count, STEPS)
    ):
        assert time.monotonic() < deadline, f"{run} did not come to {count} steps"
        time.sleep(0.02)
    assert not (run / "final").exists()


def assert_same(run: Path, other: Path) -> None:
    """The trained adapter to 1e-6, and all metrics but times."""
    ours, theirs = adapter_of(run), adapter_of(other)
    assert ours.keys() == theirs.keys()
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert apart < 1e-6
    assert (
        max(float(ours[name].abs().max()) for name in ours if "lora_B" in name) > 1e-4
    )  # something was learned
    assert len(numbers(run)) == STEPS
    for one, two in zip(numbers(run), numbers(other), strict=True):
        assert one == pytest.approx(two, abs=1e-6, nan_ok=True)


def test_two_nodes_match_two_ranks_of_one_node(
    nodes: Nodes, config: Path, one_host: Path, tmp_path: Path
) -> None:
    """The machine's name is 127.0.0.1 on both nodes; their interfaces differ in name."""
    assert codes(start(nodes, config, tmp_path / "run"), timeout=240) == [0, 0], (
        nodes.said("a") + nodes.said("b")
    )
    assert_same(tmp_path / "run", one_host)
    assert "updates" in nodes.said("a")
    assert "updates" not in nodes.said("b")  # rank 0 alone speaks
    assert not list((tmp_path / "run").glob(".seen*"))


def test_reward_server_on_a_third_host_gives_equal_scores(
    nodes: Nodes, config: Path, one_host: Path, tmp_path: Path
) -> None:
    place = {"REWARD_SERVER_HOST": nodes.address["c"], "REWARD_SERVER_TOKEN": TOKEN}
    nodes.start("c", SERVER, "rewards.brightness.weight=1", **place)
    url = f"http://{nodes.address['c']}:8900"
    deadline = time.monotonic() + 60
    while (said := status(nodes, f"{url}/health")) != "200":
        assert time.monotonic() < deadline, f"{said}\n{nodes.said('c')}"
        time.sleep(0.5)
    assert f"rewards.remote.url={url}" in nodes.said("c")
    assert status(nodes, f"{url}/v1/models") == "401"  # without the token
    words = [
        "rewards.brightness.weight=0",
        f"rewards.remote.url={url}",
        "rewards.remote.options.model=brightness",
    ]
    run = tmp_path / "run"
    done = codes(
        start(nodes, config, run, *words, REWARD_SERVER_TOKEN=TOKEN), timeout=240
    )
    assert done == [0, 0], nodes.said("a") + nodes.said("b")
    wanted = read_metrics(one_host / "metrics.jsonl")
    found = read_metrics(run / "metrics.jsonl")
    assert [row["reward/remote"] for row in found] == [
        row["reward/brightness"] for row in wanted
    ]
    assert [row["train/loss"] for row in found] == pytest.approx(
        [row["train/loss"] for row in wanted], abs=1e-6
    )
    ours, theirs = adapter_of(run), adapter_of(one_host)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6


def status(nodes: Nodes, url: str) -> str:
    """What a request from node b is answered."""
    program = (
        "import httpx, sys; print(httpx.get(sys.argv[1], trust_env=False).status_code)"
    )
    asked = [*nodes.inside("b"), "python", "-c", program, url]
    done = subprocess.run(
        asked, capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )
    return done.stdout.strip() or done.stderr[-300:]


def test_killed_node_ends_the_other_and_the_run_resumes(
    nodes: Nodes, config: Path, one_host: Path, tmp_path: Path
) -> None:
    """First the node of rank 1, later that of rank 0, which hosts the rendezvous."""
    run = tmp_path / "run"
    for steps, victim, other in ((2, 1, 0), (4, 0, 1)):
        both = start(nodes, config, run)
        wait_for_steps(run, steps)
        nodes.kill("ab"[victim])
        code, _ = codes([both[other], both[victim]], timeout=60)
        assert code not in (0, None)
        assert not (run / "final").exists()
        assert nodes.pids("ab"[other]) == []
    assert codes(start(nodes, config, run), timeout=240) == [0, 0], nodes.said("a")
    assert nodes.said("a").count(" after ") == 2
    assert_same(run, one_host)


def test_disconnected_node_ends_both_nodes(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    """Nobody is told that it is gone, as when a machine loses its power: the watchdog sees it."""
    run = tmp_path / "run"
    both = start(nodes, config, run, "watchdog_s=12")
    wait_for_steps(run, 2)
    nodes.link("b", "down")
    assert codes(both, timeout=60) == [STUCK, STUCK], nodes.said("a") + nodes.said("b")
    assert {path.name for path in run.glob("stacks-rank-*.txt")} == {
        "stacks-rank-0.txt",
        "stacks-rank-1.txt",
    }
    assert not (run / "final").exists()


def test_nodes_without_a_shared_folder_exit_2(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    """Node b has a file system of its own where the run's folder is."""
    run = tmp_path / "run"
    run.mkdir()
    words = ["launch/grpo.py", "--config", str(config), f"run_dir={run}"]
    own = [
        "unshare",
        "-m",
        "bash",
        "-c",
        'mount -t tmpfs none "$0" && exec "$@"',
        str(run),
    ]
    hostfile = str(tmp_path / "hostfile")
    both = [
        nodes.start("a", NODE, hostfile, "0", *words),
        nodes.start("b", *own, NODE, hostfile, "1", *words),
    ]
    assert codes(both, timeout=120) == [2, 2], nodes.said("a") + nodes.said("b")
    assert f"{run} " in nodes.said("a")
    assert "rank 1" in nodes.said("a")
    assert sorted(path.name for path in run.iterdir()) == ["lock.json"]


def test_nodes_with_different_options_exit_2(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = start(
        nodes, config, run, of=lambda name: ["optimizer.lr=1e-3"] if name == "b" else []
    )
    assert codes(both, timeout=120) == [2, 2], nodes.said("a") + nodes.said("b")
    assert "config.optimizer.lr: 0.002" in nodes.said("a")
    assert not run.exists()


def test_slurm_signal_saves_and_the_job_resumes(
    nodes: Nodes, config: Path, one_host: Path, tmp_path: Path
) -> None:
    """Run train.sbatch with a fake srun, which starts a task on each node, and a fake scontrol.

    The signal goes to the tasks only, as Slurm's proctrack/cgroup sends it.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    enter = [" ".join(nodes.inside(name)) for name in "ab"]
    begin = "".join(
        f'SLURM_NODEID={i} {words} "$@" & tasks+=($!)\n'
        for i, words in enumerate(enter)
    )
    wait = 'code=0; for task in "${tasks[@]}"; do wait "$task" || code=$?; done; exit $code\n'
    options = 'while [[ $1 == --* ]]; do shift; done\necho "${@:1:2}"; tasks=()\n'
    (tools / "srun").write_text(f"#!/usr/bin/env bash\n{options}{begin}{wait}")
    names = " ".join(nodes.address[name] for name in "ab")
    (tools / "scontrol").write_text(
        f'#!/usr/bin/env bash\n[[ "$*" == "show hostnames ab" ]] && printf "%s\\n" {names}\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = environment(
        SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="ab"
    )
    slurm["PATH"] = f"{tools}:{slurm['PATH']}"
    run = tmp_path / "run"

    def submit() -> subprocess.Popen[bytes]:
        words = [
            "bash",
            SBATCH,
            "launch/grpo.py",
            "--config",
            str(config),
            f"run_dir={run}",
        ]
        with nodes.log("job").open("ab") as out:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=slurm,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        nodes.started.append(process)
        return process

    job = submit()
    wait_for_steps(run, 2)
    tasks = [pid for name in "ab" for pid in nodes.pids(name) if is_task(pid)]
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGUSR1)
    assert codes([job], timeout=60) == [128 + signal.SIGUSR1], nodes.said("job")
    done = len(read_metrics(run / "metrics.jsonl"))
    assert 2 <= done < STEPS
    assert f"after {done} " in nodes.said("job")
    assert codes([submit()], timeout=240) == [0], nodes.said("job")
    assert nodes.said("job").count(f"after {done} ") == 2
    assert_same(run, one_host)
    assert not list(ROOT.glob("hostfile-*"))


def is_task(pid: int) -> bool:
    """True of what srun has started on a node."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1].endswith(NODE)
