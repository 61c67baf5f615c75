"""The reward server and its client: who is let in, how much, what goes wrong, and that scores are the very same."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from alignment.config import RewardConfig
from alignment.rewards.brightness import Brightness
from alignment.rewards.remote import RemoteError, RemoteReward
from common import reward_wire as wire
from common.config import ConfigError, load
from common.log import read_metrics
from common.types import Score
from common.video_io import write_mp4
from launch.batching import Batcher, QueueFullError
from launch.reward_server import create_app
from launch.serve import ServeRun
from tests.launch.processes import ROOT, deepspeed, run
from tests.launch.test_grpo import alone, tiny  # noqa: F401 - a fixture

VIDEO = torch.randint(0, 256, (3, 2, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


class Picky(Brightness):
    """Cannot stand the prompt "bad"; remembers how many videos came together."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float) -> Score:
        self.batches.append(len(prompts))
        if "bad" in prompts:
            raise ValueError("a prompt that nobody can judge")
        return super().score(video_BTYXC, prompts, fps=fps)


def config(**changes: Any) -> ServeRun:
    return ServeRun(**{"rewards": {"bright": RewardConfig(kind="brightness")}, **changes})


@contextmanager
def client_of(reward: Any, *, token: str | None = None, **changes: Any) -> Iterator[TestClient]:
    app = create_app({"bright": reward}, config(**changes), token=token)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def body(video: torch.Tensor = VIDEO, prompts: Sequence[str] = PROMPTS, model: str = "bright") -> dict[str, Any]:
    content = wire.encode_request(video, prompts, fps=8.0, model=model, id="1")
    return {"content": content, "headers": {"Content-Type": wire.SAFETENSORS}}


# ------------------------------------------------------------------ the server


def test_scores_are_the_rewards_own() -> None:
    with client_of(Brightness()) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json() == {"models": ["bright"]}
        reply = client.post("/v1/score", **body())
    got = wire.decode_reply(reply.content, videos=3, model="bright", id="1").value_B
    assert torch.equal(got, Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B)


def test_an_item_that_cannot_be_judged_is_null_and_says_why() -> None:
    frames = {"frames": base64.b64encode(VIDEO[0].numpy().tobytes()).decode(), "shape": [2, 4, 6, 3], "fps": 8}
    asked = {"model": "bright", "prompts": ["a", "b"], "videos": [frames, {"mp4": "AAAA"}]}
    with client_of(Picky()) as client:
        said = client.post("/v1/score", json=asked).json()
        refused = client.post("/v1/score", **body(prompts=["a", "bad", "c"])).json()
    assert said["values"][0] == float(Brightness().score(VIDEO[:1], ["a"], fps=8.0).value_B)
    assert said["values"][1] is None
    assert said["errors"][0] is None
    assert "cannot be decoded" in said["errors"][1]
    assert refused["values"] == [None] * 3
    assert refused["errors"] == ["a prompt that nobody can judge"] * 3


def test_who_is_let_in() -> None:
    with client_of(Brightness(), token="secret") as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secreT"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.post("/v1/score", **body()).status_code == 401
    with client_of(Brightness()) as client:
        # a page that made a name of its own point at 127.0.0.1
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
        for path in ("/docs", "/openapi.json", "/redoc", "/"):
            assert client.get(path).status_code == 404


def test_no_address_and_no_path_is_ever_looked_at(tmp_path: Path) -> None:
    """Whatever names one, in the request or inside a video, is a bad video; what exists reads like what does not."""
    canary = Scripted(200)
    there, not_there = tmp_path / "there.mp4", tmp_path / "not-there.mp4"
    write_mp4(there, VIDEO.repeat(1, 1, 4, 4, 1)[0], 8.0)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{canary.url}/a.ts\n#EXT-X-ENDLIST\n"
    entries: list[dict[str, str]] = [{"url": canary.url}, {"video": canary.url}, {"mp4": canary.url}]
    entries += [
        {"mp4": base64.b64encode(text.encode()).decode()}
        for text in (playlist, f"ffconcat version 1.0\nfile {there}\n")
    ]
    entries += [{key: str(path)} for path in (there, not_there) for key in ("path", "video_path", "mp4")]
    entries += [{"mp4": base64.b64encode(str(path).encode()).decode()} for path in (there, not_there)]
    with client_of(Brightness(), max_videos=32) as client:
        asked = {"model": "bright", "prompts": ["a"] * len(entries), "videos": entries}
        said = client.post("/v1/score", json=asked).json()
    assert said["values"] == [None] * len(entries)
    assert canary.connections == 0
    errors = said["errors"]
    assert errors[5:8] == errors[8:11]
    assert errors[11] == errors[12]
    assert not any("there" in error or "127.0.0.1" in error for error in errors)


def test_how_much_is_taken() -> None:
    with client_of(Brightness(), max_body_mb=1, max_frames=4, max_videos=4) as client:
        large = torch.zeros(1, 1, 700, 700, 3, dtype=torch.uint8)
        assert client.post("/v1/score", **body(large, ["a"])).status_code == 413

        def unannounced() -> Iterator[bytes]:
            yield from [b"x" * 100_000] * 20

        kind = {"Content-Type": wire.SAFETENSORS}
        assert client.post("/v1/score", content=unannounced(), headers=kind).status_code == 413
        many = client.post("/v1/score", **body(VIDEO.repeat(1, 3, 1, 1, 1)))
        assert (many.status_code, many.json()["error"]) == (422, "6 frames, at most 4 are allowed")
        assert client.post("/v1/score", **body(VIDEO.repeat(2, 1, 1, 1, 1), PROMPTS * 2)).status_code == 422
        assert client.post("/v1/score", **body(model="bricht")).status_code == 404
        assert client.post("/v1/score", content=b"x").status_code == 422


def test_what_the_metrics_say() -> None:
    with client_of(Picky()) as client:
        client.post("/v1/score", **body())
        client.post("/v1/score", **body(prompts=["bad"] * 3))
        text = client.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines())
    label = '{model="bright"}'
    assert found[f"reward_requests_total{label}"] == "2"
    assert found[f"reward_videos_total{label}"] == "6"
    assert found[f"reward_failed_total{label}"] == "1"
    assert float(found['reward_seconds{model="bright",quantile="0.95"}']) > 0


def test_any_other_host_than_loopback_needs_a_token() -> None:
    words = [sys.executable, "launch/serve.py", "rewards.brightness.weight=1", "host=0.0.0.0"]
    done = run(*words, expect=2)
    assert "set REWARD_SERVER_TOKEN to a token" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="max_frames must be at least 1, got 0"):
        load(ServeRun, None, ["max_frames=0", "rewards.brightness.weight=1"])


# ------------------------------------------------------------------ batching


def batched(reward: Any, requests: Sequence[tuple[torch.Tensor, list[str], float]], **options: Any) -> list[Any]:
    """Answers, or exceptions, of requests that come at once."""

    async def all_of_them() -> list[Any]:
        settings = {"max_videos": 8, "max_waiting": 16, "wait_s": 0.05, **options}
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(reward, executor=executor, **settings)
            asked = [asyncio.create_task(batcher.score(v, p, fps=fps)) for v, p, fps in requests]
            await asyncio.sleep(0)
            worker = asyncio.create_task(batcher.run())
            answers = await asyncio.gather(*asked, return_exceptions=True)
            worker.cancel()
            return answers

    return asyncio.run(all_of_them())


def test_requests_that_fit_go_together_and_get_their_own_answers() -> None:
    reward = Picky()
    answers = batched(reward, [(VIDEO, PROMPTS, 8.0), (VIDEO[:2] // 2, ["a", "b"], 8.0), (VIDEO[1:], ["b", "c"], 8.0)])
    assert reward.batches == [7]
    whole = Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B
    torch.testing.assert_close(answers[0].value_B, whole)
    torch.testing.assert_close(answers[2].value_B, whole[1:])
    assert bool((answers[1].value_B < whole[:2]).all())


def test_another_size_another_rate_or_too_many_go_alone() -> None:
    reward = Picky()
    small = VIDEO[:, :, :2]
    batched(reward, [(VIDEO, PROMPTS, 8.0), (small, PROMPTS, 8.0), (small, PROMPTS, 4.0), (small, PROMPTS, 4.0)])
    assert reward.batches == [3, 3, 6]
    reward = Picky()
    batched(reward, [(VIDEO, PROMPTS, 8.0)] * 3)
    assert reward.batches == [6, 3]


def test_one_bad_request_costs_no_other() -> None:
    reward = Picky()
    answers = batched(reward, [(VIDEO, PROMPTS, 8.0), (VIDEO[:1], ["bad"], 8.0), (VIDEO[:1], ["a"], 8.0)])
    assert reward.batches == [5, 3, 1, 1]
    assert isinstance(answers[1], ValueError)
    assert [len(answers[i].value_B) for i in (0, 2)] == [3, 1]


def test_a_full_queue_refuses_at_once() -> None:
    answers = batched(Picky(), [(VIDEO, PROMPTS, 8.0)] * 5, max_waiting=2)
    assert sum(isinstance(answer, QueueFullError) for answer in answers) == 3


# ------------------------------------------------------------------ the client


class Scripted:
    """A server that answers as it is told, one entry after the other; the last one for ever."""

    def __init__(self, *answers: Callable[[bytes], tuple[int, bytes]] | int) -> None:
        self.answers, self.asked, self.connections = list(answers), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_GET(self) -> None:
                self.reply(200, json.dumps({"models": ["bright"]}).encode())

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                answer = outer.answers[min(outer.asked, len(outer.answers) - 1)]
                outer.asked += 1
                self.reply(*((answer, b"busy") if isinstance(answer, int) else answer(content)))

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
    request = wire.decode_request(content, wire.SAFETENSORS, max_frames=99, max_videos=99)
    score = Score(torch.arange(len(request.prompts), dtype=torch.float32))
    return 200, json.dumps({**wire.encode_reply(request, score, [None] * 3), **changes}).encode()


def remote(server: Scripted, clock: Clock, **options: Any) -> RemoteReward:
    return RemoteReward(server.url, deadline_s=60.0, sleep=clock.sleep, now=clock.now, **options)


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
def test_what_may_pass_is_tried_again(trouble: Any) -> None:
    server, clock = Scripted(trouble, trouble, sound), Clock()
    assert remote(server, clock).score(VIDEO, PROMPTS, fps=8.0).value_B.tolist() == [0.0, 1.0, 2.0]
    assert server.asked == 3
    first, second = clock.pauses
    assert 0.25 <= first <= 0.75
    assert 0.5 <= second <= 1.5  # twice as long, jittered


def test_a_server_that_is_busy_says_when_to_come_again() -> None:
    server, clock = Scripted(429, sound), Clock()
    remote(server, clock).score(VIDEO, PROMPTS, fps=8.0)
    assert clock.pauses == [7.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_would_be_the_same_again_is_not(status: int) -> None:
    server, clock = Scripted(status), Clock()
    with pytest.raises(RemoteError, match=f"status {status}: busy"):
        remote(server, clock).score(VIDEO, PROMPTS, fps=8.0)
    assert server.asked == 1


def test_the_deadline_is_for_everything_together() -> None:
    server, clock = Scripted(503), Clock()
    with pytest.raises(RemoteError, match="gave up after 60 s: status 503"):
        remote(server, clock).score(VIDEO, PROMPTS, fps=8.0)
    assert clock.time <= 60.0
    assert 5 <= server.asked <= 12  # 0.5, 1, 2, 4, 8, 16, 20 seconds and jitter


def test_giving_up_says_not_judged_and_never_a_number() -> None:
    server, clock = Scripted(503), Clock()
    value = remote(server, clock, on_failure="skip_group").score(VIDEO, PROMPTS, fps=8.0).value_B
    assert bool(value.isnan().all())
    with pytest.raises(ValueError, match="on_failure must be fail or skip_group"):
        remote(server, clock, on_failure="zero")


def test_a_null_is_not_judged() -> None:
    server = Scripted(lambda content: sound(content, values=[1.0, None, 3.0]))
    value = remote(server, Clock()).score(VIDEO, PROMPTS, fps=8.0).value_B
    assert value.isnan().tolist() == [False, True, False]


def test_a_server_that_is_not_there_is_found_out_at_once() -> None:
    clock = Clock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RemoteError, match="gave up after 5 s: ConnectError"):
        RemoteReward(f"http://127.0.0.1:{port}", deadline_s=5.0, sleep=clock.sleep, now=clock.now)
    with pytest.raises(ValueError, match="the server has bright; model says 'dark'"):
        remote(Scripted(sound), clock, model="dark")


# ------------------------------------------------------------------ both, for real


@contextmanager
def served(*overrides: str, **variables: str) -> Iterator[str]:
    """launch/serve.py in a process of its own; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "launch/serve.py", f"port={port}", *overrides]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **variables})
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@pytest.mark.slow
def test_grpo_through_the_server_is_grpo_without_it(tiny: Path) -> None:  # noqa: F811 - the fixture
    """Bit for bit, on one rank and on two; with a token."""
    words = ["steps=2", "save_every=9", "self_checks=false"]
    alone(tiny, f"run_dir={tiny.parent / 'inside'}", *words)
    want = read_metrics(tiny.parent / "inside" / "metrics.jsonl")
    with served("rewards.brightness.weight=1", REWARD_SERVER_TOKEN="tell nobody") as url:
        script = str(ROOT / "launch" / "grpo.py")
        for ranks in (1, 2):
            folder = tiny.parent / f"outside-{ranks}"
            overrides = ["--config", str(tiny), *words, f"run_dir={folder}", "rewards.brightness.weight=0"]
            overrides += [f"rewards.remote.url={url}", "rewards.remote.options.model=brightness"]
            start = [sys.executable, script] if ranks == 1 else None
            if start:
                run(*start, *overrides, REWARD_SERVER_TOKEN="tell nobody")
            else:
                deepspeed(2, script, *overrides, REWARD_SERVER_TOKEN="tell nobody")
            rows = read_metrics(folder / "metrics.jsonl")
            assert [row["reward/remote"] for row in rows] == [row["reward/brightness"] for row in rows]
            assert rows[0]["reward/remote"] == want[0]["reward/brightness"]
            if ranks == 1:
                assert [row["reward/remote"] for row in rows] == [row["reward/brightness"] for row in want]
                assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in want]


def bright(content: bytes) -> tuple[int, bytes]:
    """What `served` would say."""
    request = wire.decode_request(content, wire.SAFETENSORS, max_frames=99, max_videos=99)
    video_BTYXC = torch.stack([item.video_TYXC for item in request.items])
    score = Brightness().score(video_BTYXC, request.prompts, fps=request.items[0].fps)
    return 200, json.dumps(wire.encode_reply(request, score, [None] * len(request.prompts))).encode()


@pytest.mark.slow
def test_a_server_that_goes_away_stops_all_ranks_with_a_checkpoint(tiny: Path) -> None:  # noqa: F811 - the fixture
    """It refuses the sixth request, which is one rank's at step 2: both end, what was done is kept, and goes on."""
    script, folder = str(ROOT / "launch" / "grpo.py"), tiny.parent / "remote"
    words = ["--config", str(tiny), "steps=3", "save_every=9", "self_checks=false", "rewards.brightness.weight=0"]
    words += ["rewards.remote.options.model=bright", "rewards.remote.options.deadline_s=20"]
    gone = Scripted(*[bright] * 5, 403)
    done = deepspeed(2, script, *words, f"run_dir={folder}", f"rewards.remote.url={gone.url}", expect=1)
    assert "stopped after 2 steps, which are saved: " in done.stdout
    assert "status 403: busy" in done.stdout
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    back = Scripted(bright)
    deepspeed(2, script, *words, f"run_dir={folder}", f"rewards.remote.url={back.url}")
    assert back.asked == 2  # one step's
    straight = tiny.parent / "straight"
    deepspeed(2, script, *words, f"run_dir={straight}", f"rewards.remote.url={back.url}")
    wanted, found = (read_metrics(one / "metrics.jsonl") for one in (straight, folder))
    for name in ("reward/remote", "train/loss", "train/grad_norm"):
        assert [row[name] for row in found] == [row[name] for row in wanted]


@pytest.mark.slow
def test_a_group_that_nobody_judged_teaches_nothing_and_is_counted(tiny: Path) -> None:  # noqa: F811 - the fixture
    script, folder = str(ROOT / "launch" / "grpo.py"), tiny.parent / "skipping"
    words = ["--config", str(tiny), "steps=2", "save_every=9", "self_checks=false", "rewards.brightness.weight=0"]
    words += ["rewards.remote.options.model=bright", "rewards.remote.options.on_failure=skip_group"]
    half = Scripted(bright, bright, 403, bright)  # at step 1 one of the two ranks is refused
    deepspeed(2, script, *words, f"run_dir={folder}", f"rewards.remote.url={half.url}")
    first, second = read_metrics(folder / "metrics.jsonl")
    asked = 2 * first["reward/remote_unjudged"] + second["reward/remote_unjudged"]
    assert asked == second["reward/remote_unjudged"] > 0
    assert second["reward/remote"] > 0.1  # the mean of those that were judged, not of zeros
    assert second["train/skipped"] == 0.0
