"""The client of a reward server: retries, deadlines, and runs that lose their server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from alignment.config import RewardConfig
from alignment.rewards import build_rewards, wire
from alignment.rewards.brightness import Brightness
from alignment.rewards.remote import RemoteError, RemoteReward
from common.log import read_metrics
from common.types import Score
from tests.launch.processes import ROOT, deepspeed, run
from tests.launch.test_grpo import alone

VIDEO = torch.randint(
    0,
    256,
    (3, 2, 4, 6, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)
PROMPTS = ["a", "b", "c"]


class Scripted:
    """A server that gives a list of answers and repeats the last."""

    def __init__(self, *answers: Callable[[bytes], tuple[int, bytes]] | int) -> None:
        self.answers, self.asked, self.connections = list(answers), 0, 0
        self.models = {"models": ["bright"]}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_GET(self) -> None:
                self.reply(200, json.dumps(outer.models).encode())

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                answer = outer.answers[min(outer.asked, len(outer.answers) - 1)]
                outer.asked += 1
                self.reply(
                    *((answer, b"busy") if isinstance(answer, int) else answer(content))
                )

            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 429:
                    self.send_header("Retry-After", "7")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Not on the console."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, daemon=True).start()


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.time, self.pauses = 0.0, list[float]()

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.pauses.append(seconds)


def sound(content: bytes, **changes: Any) -> tuple[int, bytes]:
    request = wire.decode_request(content, wire.SAFETENSORS, wire.RequestLimits(99, 99))
    score = Score(torch.arange(len(request.prompts), dtype=torch.float32))
    return 200, json.dumps(
        {**wire.encode_reply(request, score, [None] * 3), **changes}
    ).encode()


def remote(server: Scripted, clock: Clock, **options: Any) -> RemoteReward:
    return RemoteReward(
        server.url, deadline_s=60.0, sleep=clock.sleep, now=clock.now, **options
    )


@pytest.mark.parametrize(
    "trouble",
    [
        503,
        500,
        408,
        lambda _: (200, b"<html>starting</html>"),
        lambda content: sound(content, values=[1.0]),
        lambda content: sound(content, id="an earlier one"),
        lambda content: sound(content, values=[1.0, "x", 2.0]),
    ],
)
def test_remote_trouble_that_may_pass_is_retried(trouble: Any) -> None:
    server, clock = Scripted(trouble, trouble, sound), Clock()
    assert remote(server, clock).score(VIDEO, PROMPTS, fps=8.0).value_B.tolist() == [
        0.0,
        1.0,
        2.0,
    ]
    assert server.asked == 3
    first, second = clock.pauses
    assert 0.25 <= first <= 0.75
    assert 0.5 <= second <= 1.5  # twice as long, jittered


def test_remote_waits_for_retry_after() -> None:
    server, clock = Scripted(429, sound), Clock()
    remote(server, clock).score(VIDEO, PROMPTS, fps=8.0)
    assert clock.pauses == [7.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_remote_4xx_is_not_retried(status: int) -> None:
    server, clock = Scripted(status), Clock()
    with pytest.raises(RemoteError, match=str(status)):
        remote(server, clock).score(VIDEO, PROMPTS, fps=8.0)
    assert server.asked == 1


def test_remote_deadline_covers_attempts_and_pauses() -> None:
    server, clock = Scripted(503), Clock()
    with pytest.raises(RemoteError, match="503"):
        remote(server, clock).score(VIDEO, PROMPTS, fps=8.0)
    assert clock.time <= 60.0
    assert 5 <= server.asked <= 12  # 0.5, 1, 2, 4, 8, 16, 20 seconds and jitter


def test_remote_skip_group_returns_nan() -> None:
    server, clock = Scripted(503), Clock()
    value = (
        remote(server, clock, on_failure="skip_group")
        .score(VIDEO, PROMPTS, fps=8.0)
        .value_B
    )
    assert bool(value.isnan().all())
    with pytest.raises(ValueError, match="zero"):
        remote(server, clock, on_failure="zero")


def test_remote_null_is_nan() -> None:
    server = Scripted(lambda content: sound(content, values=[1.0, None, 3.0]))
    value = remote(server, Clock()).score(VIDEO, PROMPTS, fps=8.0).value_B
    assert value.isnan().tolist() == [False, True, False]


def test_remote_server_that_is_absent_raises_at_construction(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RemoteError, match="ConnectError"):
        RemoteReward(
            f"http://127.0.0.1:{port}", deadline_s=5.0, sleep=clock.sleep, now=clock.now
        )
    with pytest.raises(RemoteError, match=r"\b60\b"):  # of 600
        RemoteReward(f"http://127.0.0.1:{port}", sleep=clock.sleep, now=clock.now)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[-2] for line in said] == [" ConnectError", " ConnectError"]
    assert f"http://127.0.0.1:{port}" in said[1]
    assert "60" in said[1]
    cfg = RewardConfig(
        url=f"http://127.0.0.1:{port}", options={"start_deadline_s": 0.1}
    )
    with pytest.raises(ValueError, match=r"rewards\.far"):
        build_rewards({"far": cfg})
    with pytest.raises(ValueError, match="dark"):
        remote(Scripted(sound), clock, model="dark")


class Raw:
    """A server that writes given bytes, ``pause_s`` apart, for every POST."""

    def __init__(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = json.dumps({"models": ["bright"]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.close_connection = True
                try:
                    for piece in pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                        time.sleep(pause_s)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *[b"x"] * 99],
        [b"HTTP/1.1 200 OK\r\n", *[b"A"] * 99],
    ],
    ids=["body", "headers"],
)
def test_remote_deadline_ends_a_reply_that_drips(pieces: list[bytes]) -> None:
    reward = RemoteReward(Raw(*pieces, pause_s=0.1).url, deadline_s=1.0)
    start = time.monotonic()
    with pytest.raises(RemoteError):
        reward.score(VIDEO, PROMPTS, fps=8.0)
    # all 99 bytes would take 10 seconds
    assert time.monotonic() - start < 4.0


@pytest.mark.parametrize(
    "answer",
    [
        lambda content: sound(content, values=[10**400, 1.0, 2.0]),
        lambda content: sound(content, values=[1e39, 1.0, 2.0]),
        lambda content: (200, b"\x1f\x8b" + b"broken gzip"),
        lambda content: (200, b"[" * 100_000),
        lambda content: (200, b"{}"),
        lambda content: sound(content, texts=["a text for three videos"]),
    ],
)
def test_remote_strange_reply_is_retried_and_skipped(answer: Any) -> None:
    server, clock = Scripted(answer), Clock()
    reward = remote(server, clock, on_failure="skip_group")
    value_B = reward.score(VIDEO, PROMPTS, fps=8.0).value_B
    assert bool(value_B.isnan().all())
    assert server.asked >= 5


def test_remote_reply_beyond_the_limit_is_not_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alignment.rewards.remote.MAX_REPLY_BYTES", 1000)
    server = Scripted(lambda content: (200, b"x" * 2000))
    with pytest.raises(RemoteError, match="MB"):
        remote(server, Clock()).score(VIDEO, PROMPTS, fps=8.0)


def test_part_named_values_does_not_replace_the_reward() -> None:
    parts = {"values": [99.0, 98.0, 97.0]}
    server = Scripted(lambda content: sound(content, parts=parts))
    score = remote(server, Clock()).score(VIDEO, PROMPTS, fps=8.0)
    assert score.value_B.tolist() == [0.0, 1.0, 2.0]
    assert score.parts["values"].tolist() == [99.0, 98.0, 97.0]


def test_remote_errors_of_videos_are_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def partly(content: bytes) -> tuple[int, bytes]:
        changes = {"values": [0.0, None, 2.0], "errors": [None, "too dark", None]}
        return 207, sound(content, **changes)[1]

    value_B = remote(Scripted(partly), Clock()).score(VIDEO, PROMPTS, fps=8.0).value_B
    assert value_B.isnan().tolist() == [False, True, False]
    said = capsys.readouterr().out
    assert "1 of 3" in said
    assert "too dark" in said


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secretword@127.0.0.1:1",
        "ftp://127.0.0.1",
        "http://",
        "http://host:99999",
        "http://a b:1",
        "127.0.0.1:8900",
        "http://h\u00f6st:1",
        "http://[::1",
    ],
)
def test_bad_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"rewards\.far\.url") as error:
        build_rewards({"far": RewardConfig(url=url)})
    assert "secretword" not in str(error.value)


@pytest.mark.parametrize("token", ["\u00e4\u00f6", "two\nlines", "tab\there"])
def test_token_that_no_header_can_hold_is_refused(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    with pytest.raises(ValueError, match="REWARD_SERVER_TOKEN") as error:
        RemoteReward("http://127.0.0.1:1")
    assert token not in str(error.value)


# ------------------------------------------------------------------ several servers


def test_servers_share_the_videos() -> None:
    first, second = Scripted(bright), Scripted(bright)
    reward = RemoteReward([first.url, second.url])
    value_B = reward.score(VIDEO, PROMPTS, fps=8.0).value_B
    assert torch.equal(value_B, Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B)
    assert (first.asked, second.asked) == (1, 1)


def test_videos_of_a_group_go_to_a_single_server_where_it_compares_them() -> None:
    first, second = Scripted(bright), Scripted(bright)
    first.models = {"models": ["bright"], "by_prompt": ["bright"]}
    reward = RemoteReward([first.url, second.url])
    # the loop of GRPO then sends one group per call
    assert reward.group_level
    reward.score(VIDEO, PROMPTS, fps=8.0)
    assert (first.asked, second.asked) == (1, 0)


def test_dead_server_is_left_out_and_asked_again_later() -> None:
    alive, dead, clock = Scripted(bright), Scripted(bright), Clock()
    reward = RemoteReward(
        [dead.url, alive.url], sleep=clock.sleep, now=clock.now, deadline_s=60.0
    )
    dead.server.shutdown()
    dead.server.server_close()
    want = Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B
    for _ in range(3):
        assert torch.equal(reward.score(VIDEO, PROMPTS, fps=8.0).value_B, want)
    # the first call in two shares, which both end here; the next two calls undivided
    assert alive.asked == 4
    assert clock.time == 0.0
    # 30 seconds later it gets a share again
    clock.time += 31.0
    reward.score(VIDEO, PROMPTS, fps=8.0)
    assert alive.asked == 6


def test_absent_server_is_left_out_at_the_start() -> None:
    clock = Clock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        absent = f"http://127.0.0.1:{probe.getsockname()[1]}"
    alive = Scripted(bright)
    cfg = RewardConfig(url=[absent, alive.url], options={"start_deadline_s": 0.5})
    reward = build_rewards({"far": cfg})["far"]
    assert reward.model == "bright"
    assert len(reward.score(VIDEO, PROMPTS, fps=8.0).value_B) == 3
    with pytest.raises(ValueError, match="dark"):
        RemoteReward([alive.url, alive.url], model="dark", sleep=clock.sleep)


def test_server_with_several_rewards_gives_the_one_of_the_same_name() -> None:
    server = Scripted(bright)
    server.models = {"models": ["dark", "bright"]}
    made = build_rewards({"bright": RewardConfig(url=server.url)})
    assert made["bright"].model == "bright"
    asked = RewardConfig(url=server.url, options={"model": "bright"})
    assert build_rewards({"dark": asked})["dark"].model == "bright"
    want = r"dark, bright: set rewards\.far\.options\.model to one of them$"
    with pytest.raises(ValueError, match=want):
        build_rewards({"far": RewardConfig(url=server.url)})


def test_remote_works_inside_a_running_event_loop() -> None:
    reward = RemoteReward(Scripted(bright).url)

    async def notebook() -> Score:
        return reward.score(VIDEO, PROMPTS, fps=8.0)

    assert len(asyncio.run(notebook()).value_B) == 3


# ------------------------------------------------------------------ both, for real


@contextmanager
def served(*overrides: str, **variables: str) -> Iterator[str]:
    """The address of launch/serve.py in another process."""
    with serving(*overrides, **variables) as (url, _):
        yield url


@contextmanager
def serving(
    *overrides: str, **variables: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of launch/serve.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "launch/serve.py", f"port={port}", *overrides]
    process = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **variables}
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@pytest.mark.long
def test_grpo_through_the_server_is_grpo_without_it(tiny: Path) -> None:
    """Bit for bit, on one rank and on two; with a token."""
    words = ["steps=2", "save_every=9", "self_checks=false"]
    alone(tiny, f"run_dir={tiny.parent / 'inside'}", *words)
    want = read_metrics(tiny.parent / "inside" / "metrics.jsonl")
    with served(
        "rewards.brightness.weight=1", REWARD_SERVER_TOKEN="tell nobody"
    ) as url:
        script = str(ROOT / "launch" / "grpo.py")
        for ranks in (1, 2):
            folder = tiny.parent / f"outside-{ranks}"
            overrides = [
                "--config",
                str(tiny),
                *words,
                f"run_dir={folder}",
                "rewards.brightness.weight=0",
            ]
            overrides += [
                f"rewards.remote.url={url}",
                "rewards.remote.options.model=brightness",
            ]
            start = [sys.executable, script] if ranks == 1 else None
            if start:
                run(*start, *overrides, REWARD_SERVER_TOKEN="tell nobody")
            else:
                deepspeed(2, script, *overrides, REWARD_SERVER_TOKEN="tell nobody")
            rows = read_metrics(folder / "metrics.jsonl")
            assert [row["reward/remote"] for row in rows] == [
                row["reward/brightness"] for row in rows
            ]
            assert rows[0]["reward/remote"] == want[0]["reward/brightness"]
            if ranks == 1:
                assert [row["reward/remote"] for row in rows] == [
                    row["reward/brightness"] for row in want
                ]
                assert [row["train/loss"] for row in rows] == [
                    row["train/loss"] for row in want
                ]


def bright(content: bytes) -> tuple[int, bytes]:
    """What `served` would say."""
    request = wire.decode_request(content, wire.SAFETENSORS, wire.RequestLimits(99, 99))
    video_BTYXC = torch.stack([item.video_TYXC for item in request.items])
    score = Brightness().score(video_BTYXC, request.prompts, fps=request.items[0].fps)
    return 200, json.dumps(
        wire.encode_reply(request, score, [None] * len(request.prompts))
    ).encode()


@pytest.mark.long
def test_lost_server_stops_all_ranks_with_a_checkpoint(tiny: Path) -> None:
    """The server refuses the sixth request, at step 2: both ranks stop and can resume."""
    script, folder = str(ROOT / "launch" / "grpo.py"), tiny.parent / "remote"
    words = [
        "--config",
        str(tiny),
        "steps=3",
        "save_every=9",
        "self_checks=false",
        "rewards.brightness.weight=0",
    ]
    words += [
        "rewards.remote.options.model=bright",
        "rewards.remote.options.deadline_s=20",
    ]
    gone = Scripted(*[bright] * 5, 403)
    done = deepspeed(
        2,
        script,
        *words,
        f"run_dir={folder}",
        f"rewards.remote.url={gone.url}",
        expect=1,
    )
    assert "after 2 steps" in done.stdout
    assert "403" in done.stdout
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    back = Scripted(bright)
    deepspeed(2, script, *words, f"run_dir={folder}", f"rewards.remote.url={back.url}")
    assert back.asked == 2  # one step's
    straight = tiny.parent / "straight"
    deepspeed(
        2, script, *words, f"run_dir={straight}", f"rewards.remote.url={back.url}"
    )
    wanted, found = (read_metrics(one / "metrics.jsonl") for one in (straight, folder))
    for name in ("reward/remote", "train/loss", "train/grad_norm"):
        assert [row[name] for row in found] == [row[name] for row in wanted]


@pytest.mark.long
def test_unscored_group_gives_no_update_and_is_counted(tiny: Path) -> None:
    script, folder = str(ROOT / "launch" / "grpo.py"), tiny.parent / "skipping"
    words = [
        "--config",
        str(tiny),
        "steps=2",
        "save_every=9",
        "self_checks=false",
        "rewards.brightness.weight=0",
    ]
    words += [
        "rewards.remote.options.model=bright",
        "rewards.remote.options.on_failure=skip_group",
    ]
    half = Scripted(
        bright, bright, 403, bright
    )  # at step 1 one of the two ranks is refused
    deepspeed(2, script, *words, f"run_dir={folder}", f"rewards.remote.url={half.url}")
    first, second = read_metrics(folder / "metrics.jsonl")
    asked = 2 * first["reward/remote_unscored"] + second["reward/remote_unscored"]
    assert asked == second["reward/remote_unscored"] > 0
    assert second["reward/remote"] > 0.1  # the mean of the scored videos, without zeros
    assert second["train/skipped"] == 0.0


@pytest.mark.slow
def test_server_killed_under_load_loses_no_request(tmp_path: Path) -> None:
    """Two servers, one of them killed: every score comes, with the bits of a direct call."""
    script = tmp_path / "slow_brightness.py"
    script.write_text(
        "import time\n"
        "from alignment.rewards.brightness import Brightness\n"
        "class Slow(Brightness):\n"
        "    def score(self, video_BTYXC, prompts, *, fps):\n"
        "        time.sleep(0.05)\n"
        "        return super().score(video_BTYXC, prompts, fps=fps)\n"
    )
    words = [f"rewards.slow.target={script}:Slow"]
    want = Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B
    with serving(*words) as (kept, _), serving(*words) as (lost, process):
        reward = RemoteReward([lost, kept], deadline_s=60.0)

        def client(i: int) -> list[torch.Tensor]:
            if i == 3:
                time.sleep(0.5)
                process.kill()
            values = []
            for _ in range(10):
                values.append(reward.score(VIDEO, PROMPTS, fps=8.0).value_B)
            return values

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(client, range(8)))
    assert sum(len(values) for values in answers) == 80
    assert all(torch.equal(value_B, want) for values in answers for value_B in values)
