"""Load a reward server with sixteen clients, with batches and with a video at a time.

    python experiments/bench/serve_load.py --checkpoint runs/demo/descore/final

Each client sends its video again and again and checks that the answer stays the same, so no answer
reaches another client.
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

import torch

from alignment.rewards.remote import RemoteReward
from experiments.bench.bench_io import bench_parser, write_record
from experiments.runner import ROOT
from launch.compose import quiet
from toy.world import caption, random_scenes, render

FPS = 8.0
DEADLINE_S = 120.0


@contextmanager
def served(checkpoint: str, batch_videos: int) -> Iterator[str]:
    """Start a server; yield its address."""
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
        yield f"http://127.0.0.1:{port}"
    finally:
        # Stop it as a user does, by Ctrl-C.
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def client_waits(
    url: str, video: torch.Tensor, prompt: str, seconds: float
) -> list[float]:
    """Send requests for so many seconds; return the waiting time of each.

    Raises AssertionError for an answer that is not finite or differs from the first.
    """
    reward = RemoteReward(url, deadline_s=DEADLINE_S)
    videos = video[None]

    # The first answer warms up and is the expected one.
    first = reward.score(videos, [prompt], fps=FPS).value_B
    waits = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        again = reward.score(videos, [prompt], fps=FPS).value_B
        waits.append(time.monotonic() - began)
        # NaN is not close to NaN.
        if not torch.allclose(again, first, atol=1e-3):
            raise AssertionError(f"{prompt!r} got {float(again)} after {float(first)}")
    return waits


def load_server(url: str, clients: int, seconds: float) -> dict[str, float]:
    """Run all clients for so many seconds and return the figures."""
    scenes = random_scenes(clients, random.Random(0))
    videos = render(scenes)
    prompts = [caption(scene.attributes, wording=0) for scene in scenes]
    with ThreadPoolExecutor(clients) as pool:
        running = []
        for video, prompt in zip(videos, prompts, strict=True):
            running.append(pool.submit(client_waits, url, video, prompt, seconds))
    waits = sorted(wait for client in running for wait in client.result())
    return {
        "answers": len(waits),
        "videos_per_second": round(len(waits) / seconds, 2),
        "p50_seconds": round(statistics.median(waits), 3),
        "p95_seconds": round(waits[int(0.95 * len(waits))], 3),
    }


def main() -> None:
    """Load both servers and write the JSON."""
    parser = bench_parser(__doc__, "serve_load")
    parser.add_argument("--checkpoint", default="runs/demo/descore/final")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    quiet()

    # Throughput and waiting time.
    figures = {}
    for name, batch in (("one at a time", 1), ("batched", 64)):
        with served(args.checkpoint, batch) as url:
            # This client waits until the server is up.
            RemoteReward(url, deadline_s=DEADLINE_S)
            figures[name] = load_server(url, args.clients, args.seconds)
    speed = {name: row["videos_per_second"] for name, row in figures.items()}

    record = {
        "clients": args.clients,
        "seconds": args.seconds,
        **figures,
        "batching": round(speed["batched"] / speed["one at a time"], 2),
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
