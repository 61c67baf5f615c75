"""The reward server: authorisation, limits, errors, batching. Its client is in test_remote.py."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from alignment.config import RewardConfig
from alignment.rewards import wire
from alignment.rewards.brightness import Brightness
from common.config import ConfigError, load
from common.types import Score
from common.video_io import write_mp4
from launch.schemas.server import ServeRun
from launch.server.app import create_app
from launch.server.batching import Batcher, QueueFullError
from tests.alignment.rewards.test_remote import Scripted
from tests.launch.processes import run

VIDEO = torch.randint(
    0,
    256,
    (3, 2, 4, 6, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)
PROMPTS = ["a", "b", "c"]


class Picky(Brightness):
    """Cannot stand the prompt "bad"; remembers how many videos came together."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(
        self, video_BTYXC: torch.Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        self.batches.append(len(prompts))
        if "bad" in prompts:
            raise ValueError("bad prompt")
        return super().score(video_BTYXC, prompts, fps=fps)


def config(**changes: Any) -> ServeRun:
    return ServeRun(
        **{"rewards": {"bright": RewardConfig(kind="brightness")}, **changes}
    )


@contextmanager
def client_of(
    reward: Any, *, token: str | None = None, **changes: Any
) -> Iterator[TestClient]:
    app = create_app({"bright": reward}, config(**changes), token=token)
    with TestClient(
        app, base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        yield client


def body(
    video: torch.Tensor = VIDEO, prompts: Sequence[str] = PROMPTS, model: str = "bright"
) -> dict[str, Any]:
    content = wire.encode_request(video, prompts, fps=8.0, model=model, id="1")
    return {"content": content, "headers": {"Content-Type": wire.SAFETENSORS}}


# ------------------------------------------------------------------ the server


def test_served_scores_equal_direct_scores() -> None:
    with client_of(Brightness()) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json() == {"models": ["bright"]}
        reply = client.post("/v1/score", **body())
    got = wire.decode_reply(
        reply.content, videos=3, model="bright", id="1"
    ).score.value_B
    assert torch.equal(got, Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B)


def test_bad_video_or_prompt_is_null_with_its_error() -> None:
    frames = {
        "frames": base64.b64encode(VIDEO[0].numpy().tobytes()).decode(),
        "shape": [2, 4, 6, 3],
        "fps": 8,
    }
    asked = {
        "model": "bright",
        "prompts": ["a", "b"],
        "videos": [frames, {"mp4": "AAAA"}],
    }
    with client_of(Picky()) as client:
        said = client.post("/v1/score", json=asked).json()
        refused = client.post("/v1/score", **body(prompts=["a", "bad", "c"])).json()
    assert said["values"][0] == float(
        Brightness().score(VIDEO[:1], ["a"], fps=8.0).value_B
    )
    assert said["values"][1] is None
    assert said["errors"][0] is None
    assert "decoded" in said["errors"][1]
    assert refused["values"] == [None] * 3
    assert refused["errors"] == ["bad prompt"] * 3


def test_token_and_host_are_required() -> None:
    with client_of(Brightness(), token="secret") as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert (
                client.get(path, headers={"Authorization": "Bearer secreT"}).status_code
                == 401
            )
            assert (
                client.get(path, headers={"Authorization": "Bearer secret"}).status_code
                == 200
            )
        assert client.post("/v1/score", **body()).status_code == 401
    with client_of(Brightness()) as client:
        # a page that made a name of its own point at 127.0.0.1
        assert (
            client.get("/v1/models", headers={"Host": "evil.example"}).status_code
            == 400
        )
        for path in ("/docs", "/openapi.json", "/redoc", "/"):
            assert client.get(path).status_code == 404


def test_addresses_and_paths_in_requests_are_never_read(tmp_path: Path) -> None:
    """An address or a path is a bad video; existing and missing files give equal errors."""
    canary = Scripted(200)
    there, not_there = tmp_path / "there.mp4", tmp_path / "not-there.mp4"
    write_mp4(there, VIDEO.repeat(1, 1, 4, 4, 1)[0], 8.0)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{canary.url}/a.ts\n#EXT-X-ENDLIST\n"
    entries: list[dict[str, str]] = [
        {"url": canary.url},
        {"video": canary.url},
        {"mp4": canary.url},
    ]
    entries += [
        {"mp4": base64.b64encode(text.encode()).decode()}
        for text in (playlist, f"ffconcat version 1.0\nfile {there}\n")
    ]
    entries += [
        {key: str(path)}
        for path in (there, not_there)
        for key in ("path", "video_path", "mp4")
    ]
    entries += [
        {"mp4": base64.b64encode(str(path).encode()).decode()}
        for path in (there, not_there)
    ]
    with client_of(Brightness(), max_videos=32) as client:
        asked = {"model": "bright", "prompts": ["a"] * len(entries), "videos": entries}
        said = client.post("/v1/score", json=asked).json()
    assert said["values"] == [None] * len(entries)
    assert canary.connections == 0
    errors = said["errors"]
    assert errors[5:8] == errors[8:11]
    assert errors[11] == errors[12]
    assert not any("there" in error or "127.0.0.1" in error for error in errors)


def test_limits_of_body_frames_and_videos() -> None:
    with client_of(Brightness(), max_body_mb=1, max_frames=4, max_videos=4) as client:
        large = torch.zeros(1, 1, 700, 700, 3, dtype=torch.uint8)
        assert client.post("/v1/score", **body(large, ["a"])).status_code == 413

        def unannounced() -> Iterator[bytes]:
            yield from [b"x" * 100_000] * 20

        kind = {"Content-Type": wire.SAFETENSORS}
        assert (
            client.post("/v1/score", content=unannounced(), headers=kind).status_code
            == 413
        )
        many = client.post("/v1/score", **body(VIDEO.repeat(1, 3, 1, 1, 1)))
        assert many.status_code == 422
        assert "6" in many.json()["error"]
        assert (
            client.post(
                "/v1/score", **body(VIDEO.repeat(2, 1, 1, 1, 1), PROMPTS * 2)
            ).status_code
            == 422
        )
        assert client.post("/v1/score", **body(model="bricht")).status_code == 404
        assert client.post("/v1/score", content=b"x").status_code == 422


def test_metrics_count_requests() -> None:
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


def test_host_beyond_loopback_without_token_exits_2() -> None:
    words = [
        sys.executable,
        "launch/serve.py",
        "rewards.brightness.weight=1",
        "host=0.0.0.0",
    ]
    done = run(*words, expect=2)
    assert "REWARD_SERVER_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="max_frames"):
        load(ServeRun, None, ["max_frames=0", "rewards.brightness.weight=1"])


# ------------------------------------------------------------------ batching


def batched(
    reward: Any,
    requests: Sequence[tuple[torch.Tensor, list[str], float]],
    **options: Any,
) -> list[Any]:
    """Answers, or exceptions, of requests that come at once."""

    async def all_of_them() -> list[Any]:
        settings = {"max_videos": 8, "max_waiting": 16, "wait_s": 0.05, **options}
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(reward, executor=executor, **settings)
            asked = [
                asyncio.create_task(batcher.score(v, p, fps=fps))
                for v, p, fps in requests
            ]
            await asyncio.sleep(0)
            worker = asyncio.create_task(batcher.run())
            answers = await asyncio.gather(*asked, return_exceptions=True)
            worker.cancel()
            return answers

    return asyncio.run(all_of_them())


def test_equal_requests_share_a_batch_and_keep_their_scores() -> None:
    reward = Picky()
    answers = batched(
        reward,
        [
            (VIDEO, PROMPTS, 8.0),
            (VIDEO[:2] // 2, ["a", "b"], 8.0),
            (VIDEO[1:], ["b", "c"], 8.0),
        ],
    )
    assert reward.batches == [7]
    whole = Brightness().score(VIDEO, PROMPTS, fps=8.0).value_B
    torch.testing.assert_close(answers[0].value_B, whole)
    torch.testing.assert_close(answers[2].value_B, whole[1:])
    assert bool((answers[1].value_B < whole[:2]).all())


def test_requests_of_other_size_or_rate_are_separate_batches() -> None:
    reward = Picky()
    small = VIDEO[:, :, :2]
    batched(
        reward,
        [
            (VIDEO, PROMPTS, 8.0),
            (small, PROMPTS, 8.0),
            (small, PROMPTS, 4.0),
            (small, PROMPTS, 4.0),
        ],
    )
    assert reward.batches == [3, 3, 6]
    reward = Picky()
    batched(reward, [(VIDEO, PROMPTS, 8.0)] * 3)
    assert reward.batches == [6, 3]


def test_bad_request_fails_alone() -> None:
    reward = Picky()
    answers = batched(
        reward,
        [(VIDEO, PROMPTS, 8.0), (VIDEO[:1], ["bad"], 8.0), (VIDEO[:1], ["a"], 8.0)],
    )
    assert reward.batches == [5, 3, 1, 1]
    assert isinstance(answers[1], ValueError)
    assert [len(answers[i].value_B) for i in (0, 2)] == [3, 1]


def test_full_queue_raises() -> None:
    answers = batched(Picky(), [(VIDEO, PROMPTS, 8.0)] * 5, max_waiting=2)
    assert sum(isinstance(answer, QueueFullError) for answer in answers) == 3
