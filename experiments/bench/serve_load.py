"""Load a reward server with sixteen clients, with batches and with a video at a time.

    python experiments/bench/serve_load.py --checkpoint runs/demo/descore/final

Each client sends its video again and again and checks that the answer stays the same, so no answer
reaches another client. The answers are also compared with a DeScore in this process.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from alignment.rewards.descore import DeScoreReward
from alignment.rewards.remote import RemoteReward
from experiments.bench.bench_io import bench_parser, write_record
from experiments.runner import ROOT
from launch.compose import quiet
from toy.world import caption, random_attributes, random_scene, render

FPS = 8.0
DEADLINE_S = 120.0


@contextmanager
def served(
    checkpoint: str, batch_videos: int
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server; yield its address and its process."""
    # The system picks a free port.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        sys.executable,
        "launch/serve.py",
        f"port={port}",
        f"rewards.descore.checkpoint={checkpoint}",
        f"batch_videos={batch_videos}",
        "wait_ms=20",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        # Stop it as a user does, by Ctrl-C.
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def examples(count: int) -> tuple[torch.Tensor, list[str]]:
    """Render videos of the embedded world, with their captions."""
    rng = random.Random(0)
    attributes = [random_attributes(rng) for _ in range(count)]
    scenes = [random_scene(wish, rng) for wish in attributes]
    return render(scenes), [caption(wish, wording=0) for wish in attributes]


class LoadTest:
    """Clients of a server that send requests for some seconds, and the server's memory."""

    def __init__(self, url: str, process: int, *, clients: int, seconds: float) -> None:
        import psutil

        self.url = url
        self.clients = clients
        self.seconds = seconds
        self.server = psutil.Process(process)
        self.videos, self.prompts = examples(clients)
        self.waits: list[float] = []
        # Rows of (minutes, MB).
        self.memory: list[tuple[float, float]] = []

    def run(self) -> dict[str, Any]:
        """Run all clients and return the figures."""
        # This client waits until the server is up.
        RemoteReward(self.url, deadline_s=DEADLINE_S)
        self.start = time.monotonic()
        with ThreadPoolExecutor(self.clients + 1) as pool:
            watching = pool.submit(self._watch_memory)
            scored = sum(pool.map(self._run_client, range(self.clients)))
            watching.result()

        # Caches fill in the first third, so memory is fitted on the rest.
        minutes, megabytes = zip(*self.memory[len(self.memory) // 3 :], strict=True)
        slope = statistics.linear_regression(minutes, megabytes).slope
        waits = sorted(self.waits)
        return {
            "answers": len(waits),
            "judged_clients": scored,
            "videos_per_second": round(len(waits) / self.seconds, 2),
            "p50_seconds": round(statistics.median(waits), 3),
            "p95_seconds": round(waits[int(0.95 * len(waits))], 3),
            "memory_growth_mb": round(self.memory[-1][1] - self.memory[0][1], 1),
            "memory_mb_per_minute_later": round(slope, 2),
        }

    def _elapsed(self) -> float:
        return time.monotonic() - self.start

    def _run_client(self, index: int) -> bool:
        """Send requests until time is up; return whether the first score was finite.

        Raises AssertionError for an answer that differs from the first.
        """
        reward = RemoteReward(
            self.url,
            name=f"client-{index}",
            deadline_s=DEADLINE_S,
        )
        video = self.videos[index : index + 1]
        prompts = [self.prompts[index]]

        # The first answer warms up and is the expected one.
        first = reward.score(video, prompts, fps=FPS).value_B
        while self._elapsed() < self.seconds:
            began = time.monotonic()
            again = reward.score(video, prompts, fps=FPS).value_B
            self.waits.append(time.monotonic() - began)
            if not torch.allclose(again, first, atol=1e-3):
                raise AssertionError(
                    f"client {index} got {float(again)} after {float(first)}"
                )
        return bool(torch.isfinite(first).all())

    def _watch_memory(self) -> None:
        while self._elapsed() < self.seconds:
            megabytes = self.server.memory_info().rss / 2**20
            self.memory.append((self._elapsed() / 60, megabytes))
            time.sleep(0.5)


def main() -> None:
    """Load both servers, compare with DeScore in this process, and write the JSON."""
    parser = bench_parser(__doc__, "serve_load")
    parser.add_argument("--checkpoint", default="runs/demo/descore/final")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    quiet()

    # Throughput and waiting time.
    figures = {}
    for name, batch in (("one at a time", 1), ("batched", 64)):
        with served(args.checkpoint, batch) as (url, process):
            test = LoadTest(
                url, process.pid, clients=args.clients, seconds=args.seconds
            )
            figures[name] = test.run()
    speed = {name: row["videos_per_second"] for name, row in figures.items()}

    # The same scores as in this process, to the last bit.
    videos, prompts = examples(4)
    expected = (
        DeScoreReward(args.checkpoint)
        .score(
            videos,
            prompts,
            fps=FPS,
        )
        .value_B
    )
    with served(args.checkpoint, 64) as (url, _):
        remote = RemoteReward(url, deadline_s=DEADLINE_S)
        actual = remote.score(videos, prompts, fps=FPS).value_B

    record = {
        "clients": args.clients,
        "seconds": args.seconds,
        **figures,
        "batching": round(speed["batched"] / speed["one at a time"], 2),
        "same_bits_as_in_process": torch.equal(actual, expected),
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
