"""What a reward server stands: sixteen clients at once on the tiny DeScore, batched and one request at a time.

    python experiments/bench/serve_load.py --checkpoint runs/demo/descore/final

Every client asks for one video after the other and compares each answer with the reward's own in
this process: nothing may be lost, and nothing may reach another client. Both servers run after each
other with the same clients.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from alignment.rewards.descore import DeScoreReward
from alignment.rewards.remote import RemoteReward
from common.log import say
from launch.compose import quiet
from toy.world import caption, random_attributes, random_scene, render

ROOT = Path(__file__).resolve().parents[2]
FPS = 8.0


@contextmanager
def served(
    checkpoint: str, batch_videos: int
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "launch/serve.py",
        f"port={port}",
        f"rewards.descore.checkpoint={checkpoint}",
    ]
    words += [f"batch_videos={batch_videos}", "wait_ms=20"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def examples(count: int) -> tuple[torch.Tensor, list[str]]:
    """Videos of the embedded world with their captions."""
    import random

    rng = random.Random(0)
    attributes = [random_attributes(rng) for _ in range(count)]
    return render([random_scene(one, rng) for one in attributes]), [
        caption(one, wording=0) for one in attributes
    ]


def load_test(
    url: str, process: subprocess.Popen[bytes], *, clients: int, seconds: float
) -> dict[str, float]:
    """Figures of one server; raises AssertionError for an answer that is not this client's."""
    import psutil

    video, prompts = examples(clients)
    waits: list[list[float]] = [[] for _ in range(clients)]
    end = [0.0]

    def client(i: int) -> int:
        reward = RemoteReward(url, name=f"client-{i}", deadline_s=120.0)
        first = reward.score(video[i : i + 1], [prompts[i]], fps=FPS).value_B
        while time.monotonic() < end[0]:
            began = time.monotonic()
            again = reward.score(video[i : i + 1], [prompts[i]], fps=FPS).value_B
            waits[i].append(time.monotonic() - began)
            if not torch.allclose(again, first, atol=1e-3):
                raise AssertionError(
                    f"client {i} got {float(again)}, and {float(first)} before"
                )
        return int(torch.isfinite(first).all())

    RemoteReward(url, deadline_s=120.0)  # until it is up
    server = psutil.Process(process.pid)
    memory: list[tuple[float, float]] = []  # minutes, MB

    def watch() -> None:
        while (now := time.monotonic()) < end[0]:
            memory.append(
                ((now - end[0] + seconds) / 60, server.memory_info().rss / 2**20)
            )
            time.sleep(0.5)

    end[0] = time.monotonic() + seconds
    with ThreadPoolExecutor(clients + 1) as pool:
        watching = pool.submit(watch)
        judged = sum(pool.map(client, range(clients)))
        watching.result()
    late = memory[len(memory) // 3 :]  # caches fill in the first third
    every = sorted(wait for one in waits for wait in one)
    return {
        "answers": len(every),
        "judged_clients": judged,
        "videos_per_second": round(len(every) / seconds, 2),
        "p50_seconds": round(statistics.median(every), 3),
        "p95_seconds": round(every[int(0.95 * len(every))], 3),
        "memory_growth_mb": round(memory[-1][1] - memory[0][1], 1),
        "memory_mb_per_minute_later": round(
            statistics.linear_regression(*zip(*late, strict=True)).slope, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/demo/descore/final")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/serve_load.json")
    )
    args = parser.parse_args()
    quiet()
    found = {}
    for name, batch in (("one at a time", 1), ("batched", 64)):
        with served(args.checkpoint, batch) as (url, process):
            found[name] = load_test(
                url, process, clients=args.clients, seconds=args.seconds
            )
    video, prompts = examples(4)
    own = DeScoreReward(args.checkpoint).score(video, prompts, fps=FPS).value_B
    with served(args.checkpoint, 64) as (url, _):
        same = torch.equal(
            RemoteReward(url, deadline_s=120.0).score(video, prompts, fps=FPS).value_B,
            own,
        )
    result = {
        "command": " ".join(["python experiments/bench/serve_load.py", *sys.argv[1:]]),
        "clients": args.clients,
        "seconds": args.seconds,
        **found,
        "batching": round(
            found["batched"]["videos_per_second"]
            / found["one at a time"]["videos_per_second"],
            2,
        ),
        "same_bits_as_in_process": same,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result))


if __name__ == "__main__":
    main()
