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
from fastapi import HTTPException
from safetensors.torch import save as save_tensors
from starlette.testclient import TestClient

from alignment.config import RewardConfig
from alignment.rewards import wire
from alignment.rewards.brightness import Brightness
from common.config import ConfigError, load
from common.types import Score
from common.video_io import write_mp4
from launch.schemas.server import ServeRun
from launch.server.app import (
    MemoryAccount,
    MemoryBudget,
    create_app,
    read_body,
    unless_gone,
)
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
            missing = client.get(path)
            assert (missing.status_code, missing.json()) == (
                404,
                {"error": "Not Found"},
            )


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


@pytest.mark.parametrize(
    ("prompts", "status", "failed"),
    [(["a", "a"], 200, 0), (["a", "bad"], 207, 1), (["bad", "bad"], 422, 2)],
)
def test_status_counts_videos_without_a_score(
    prompts: list[str], status: int, failed: int
) -> None:
    # other sizes, so that each video is scored in a call of its own
    entries = [as_frames(VIDEO[0]), as_frames(VIDEO[1, :, :2])]
    request = {"model": "bright", "prompts": prompts, "videos": entries}
    with client_of(Picky()) as client:
        reply = client.post("/v1/score", json=request)
        text = client.get("/metrics").text
    assert reply.status_code == status
    assert reply.json()["failed"] == failed
    assert f'reward_failed_videos_total{{model="bright"}} {failed}' in text


def as_frames(video_TYXC: torch.Tensor) -> dict[str, Any]:
    """The JSON form of a video's frames."""
    return {
        "frames": base64.b64encode(video_TYXC.contiguous().numpy().tobytes()).decode(),
        "shape": list(video_TYXC.shape),
        "fps": 8,
    }


def test_small_mp4_of_large_frames_is_refused(tmp_path: Path) -> None:
    # 20 black frames of 512 x 512 are 15 MB, and a few kB as mp4
    write_mp4(
        tmp_path / "bomb.mp4", torch.zeros(20, 512, 512, 3, dtype=torch.uint8), 8.0
    )
    content = (tmp_path / "bomb.mp4").read_bytes()
    assert len(content) < 20_000
    entry = {"mp4": base64.b64encode(content).decode()}
    request = {"model": "bright", "prompts": ["a"] * 2, "videos": [entry] * 2}
    with client_of(Brightness(), max_decoded_mb=10) as client:
        reply = client.post("/v1/score", json=request)
    assert reply.status_code == 422
    assert all("MB" in error for error in reply.json()["errors"])
    # the first one fits, the limit is for both together
    with client_of(Brightness(), max_decoded_mb=20) as client:
        reply = client.post("/v1/score", json=request)
    assert [error is None for error in reply.json()["errors"]] == [True, False]


def test_requests_beyond_the_memory_get_429() -> None:
    budget = MemoryBudget(1000)
    with budget.account() as first:
        first.add(600)
        with budget.account() as second, pytest.raises(HTTPException) as error:
            second.add(600)
        assert error.value.status_code == 429
        first.settle(100)
        with budget.account() as third:
            third.add(600)
            third.at_least(900)
        assert budget.held == 100
    assert budget.held == 0


def test_body_that_stalls_gets_408() -> None:
    class Stalled:
        def __init__(self) -> None:
            self.headers = {"Content-Length": "10"}

        async def stream(self) -> Any:
            yield b"x"
            await asyncio.sleep(60)

    account = MemoryAccount(MemoryBudget(100))
    with pytest.raises(HTTPException) as error:
        asyncio.run(read_body(Stalled(), account, limit=100, timeout_s=0.1))
    assert error.value.status_code == 408


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        len(DEEP).to_bytes(8, "little") + DEEP,
        save_tensors({"video": VIDEO}, metadata={"request": DEEP.decode()}),
        save_tensors(
            {"video": VIDEO},
            metadata={
                "request": '{"model": "bright", "prompts": ["a", "b", "c"], "fps": 1%s}'
                % ("0" * 400)
            },
        ),
        wire.encode_request(VIDEO, PROMPTS, fps=1e308, model="bright", id="1"),
        wire.encode_request(VIDEO, PROMPTS, fps=1e-320, model="bright", id="1"),
        wire.encode_request(VIDEO[:, :0], PROMPTS, fps=8, model="bright", id="1"),
        wire.encode_request(VIDEO[:, :, :0], PROMPTS, fps=8, model="bright", id="1"),
    ],
)
def test_odd_request_gets_422(content: bytes) -> None:
    with client_of(Brightness()) as client:
        headers = {"Content-Type": wire.SAFETENSORS}
        assert (
            client.post("/v1/score", content=content, headers=headers).status_code
            == 422
        )


def test_reward_that_exits_or_breaks_does_not_end_the_server() -> None:
    class Exits(Brightness):
        def score(self, video_BTYXC: Any, prompts: Any, *, fps: float) -> Score:
            if "exit" in prompts:
                sys.exit(0)
            if "break" in prompts:
                raise RuntimeError("no more memory")
            return super().score(video_BTYXC, prompts, fps=fps)

    with client_of(Exits()) as client:
        for prompt in ("exit", "break"):
            assert (
                client.post("/v1/score", **body(prompts=[prompt] * 3)).status_code
                == 500
            )
        assert client.post("/v1/score", **body()).status_code == 200
    # in a batch, the others keep their scores
    requests = [(VIDEO, PROMPTS, 8.0), (VIDEO[:1], ["break"], 8.0)]
    sound, broken = batched(Exits(), requests)
    assert len(sound.value_B) == 3
    assert isinstance(broken, RuntimeError)


def test_group_level_reward_is_not_served() -> None:
    reward = Brightness()
    reward.group_level = True
    with pytest.raises(ValueError, match=r"rewards\.bright"):
        create_app({"bright": reward}, config(), token=None)


class Compares(Picky):
    """Counts the videos of a call, and compares those of a prompt."""

    group_level = True
    groups_by_prompt = True


def test_reward_that_compares_the_videos_of_a_prompt_gets_each_request_alone() -> None:
    reward = Compares()
    with client_of(reward, wait_ms=300) as client:
        reply = client.get("/v1/models").json()
        # three clients at the same time, whose videos would else share a batch of 9
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: client.post("/v1/score", **body()), range(3)))
    assert reply == {"models": ["bright"], "by_prompt": ["bright"]}
    assert reward.batches == [3, 3, 3]


def test_openapi_is_served_behind_a_flag() -> None:
    with client_of(Brightness(), openapi=True) as client:
        described = client.get("/openapi.json").json()
        assert client.get("/docs").status_code == 404
    content = described["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(content) == {wire.JSON, wire.SAFETENSORS}


def test_request_of_a_client_that_has_gone_is_not_scored() -> None:
    reward = Picky()

    class Gone:
        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(
                reward, executor=executor, max_videos=8, max_waiting=8, wait_s=0.05
            )
            with pytest.raises(HTTPException):
                await unless_gone(Gone(), batcher.score(VIDEO, PROMPTS, fps=8.0))
            worker = asyncio.create_task(batcher.run())
            await batcher.score(VIDEO[:1], ["a"], fps=8.0)
            worker.cancel()

    asyncio.run(scenario())
    assert reward.batches == [1]


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


@pytest.mark.parametrize("returned", ["stop", "sparse", "keyboard", "complex"])
def test_odd_reward_fails_its_request_and_the_next_is_answered(returned: str) -> None:
    class Odd(Brightness):
        def score(self, video_BTYXC: Any, prompts: Any, *, fps: float) -> Score:
            if "odd" not in prompts:
                return super().score(video_BTYXC, prompts, fps=fps)
            if returned == "stop":
                next(iter([]))
            if returned == "keyboard":
                raise KeyboardInterrupt
            if returned == "sparse":
                return Score(torch.zeros(3).to_sparse())
            return Score(torch.zeros(3, dtype=torch.complex64))

    with client_of(Odd()) as client:
        assert client.post("/v1/score", **body(prompts=["odd"] * 3)).status_code in (
            422,
            500,
        )
        assert client.post("/v1/score", **body()).status_code == 200
