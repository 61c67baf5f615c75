"""What goes over the wire comes back bit for bit, and what is not of the wire is named."""

from __future__ import annotations

import base64
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from alignment.rewards import wire
from common.types import Score
from common.video_io import write_mp4

VIDEO = torch.randint(
    0,
    256,
    (3, 2, 4, 6, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)
PROMPTS = ["a", "ünï", "c"]
LIMITS = {"max_frames": 16, "max_videos": 4}


def asked(body: bytes, kind: str = wire.SAFETENSORS, **limits: int) -> wire.Request:
    return wire.decode_request(body, kind, wire.RequestLimits(**{**LIMITS, **limits}))


def test_frames_round_trip_unchanged() -> None:
    body = wire.encode_request(VIDEO, PROMPTS, fps=8.5, model="m", id="7")
    request = asked(body)
    assert (request.id, request.model, request.prompts) == ("7", "m", tuple(PROMPTS))
    assert torch.equal(torch.stack([item.video_TYXC for item in request.items]), VIDEO)
    assert {item.fps for item in request.items} == {8.5}


def test_scores_come_back_bit_for_bit() -> None:
    value = torch.randn(
        1000, generator=torch.Generator().manual_seed(1)
    ) * torch.logspace(-30, 30, 1000)
    value[3] = math.nan
    request = wire.Request("7", "m", ("p",) * 1000, ())
    parts = {"style": value.flip(0)}
    text = json.dumps(
        wire.encode_reply(request, Score(value, parts, ["t"] * 1000), [None] * 1000)
    ).encode()
    back = wire.decode_reply(text, videos=1000, model="m", id="7").score
    assert torch.equal(back.value_B.nan_to_num(9.0), value.nan_to_num(9.0))
    assert torch.equal(
        back.parts["style"].nan_to_num(9.0), parts["style"].nan_to_num(9.0)
    )
    assert back.texts == ["t"] * 1000


def by_hand(*videos: Any, **changes: Any) -> bytes:
    return json.dumps(
        {"model": "m", "prompts": ["p"] * len(videos), "videos": videos, **changes}
    ).encode()


def test_json_request_decodes_frames_and_mp4(tmp_path: Path) -> None:
    write_mp4(
        tmp_path / "a.mp4", torch.full((5, 16, 16, 3), 100, dtype=torch.uint8), 8.0
    )
    mp4 = base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    frames = base64.b64encode(VIDEO[0].numpy().tobytes()).decode()
    body = by_hand({"mp4": mp4}, {"frames": frames, "shape": [2, 4, 6, 3], "fps": 4})
    one, two = asked(body, "application/json; charset=utf-8").items
    assert tuple(one.video_TYXC.shape) == (5, 16, 16, 3)
    assert one.fps == 8.0
    assert abs(float(one.video_TYXC.float().mean()) - 100) < 3
    assert torch.equal(two.video_TYXC, VIDEO[0])
    assert two.fps == 4.0


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"mp4": base64.b64encode(b"nothing").decode()}, "cannot be decoded"),
        ({"mp4": "***"}, "must be base64"),
        ({"url": "http://169.254.169.254/"}, "a video is"),
        (
            {"frames": "AAAA", "shape": [1, 1, 1, 3], "fps": 0},
            "fps",
        ),
        (
            {"frames": "AAAA", "shape": [1, 1, 2, 3], "fps": 8},
            "3 bytes for a shape of 6",
        ),
        ({"frames": "AAAA", "shape": [17, 1, 1, 3], "fps": 8}, "17 frames, at most 16"),
        ({"frames": "AAAA", "shape": [1, 1, 1, 4], "fps": 8}, "shape must be"),
        ("a string", "a video is"),
    ],
)
def test_bad_video_in_request_affects_no_other(video: Any, message: str) -> None:
    sound = {"frames": "AAAA", "shape": [1, 1, 1, 3], "fps": 8}
    one, two = asked(by_hand(sound, video), wire.JSON).items
    assert one.error is None
    assert two.video_TYXC is None
    assert message in two.error


def test_mp4_with_too_many_frames_stops_decoding(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", torch.zeros(40, 16, 16, 3, dtype=torch.uint8), 8.0)
    mp4 = base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    (item,) = asked(by_hand({"mp4": mp4}), wire.JSON).items
    assert "16" in item.error


def metadata(text: str, tensor: torch.Tensor = VIDEO) -> bytes:
    return save({"video": tensor}, metadata={"request": text})


GOOD = json.dumps({"id": "1", "model": "m", "prompts": PROMPTS, "fps": 8})


class Canary:
    """A pickle that would write a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/reward-wire-canary"),))


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"", wire.SAFETENSORS, "safetensors"),
        (b"\xff" * 64, wire.SAFETENSORS, "safetensors"),
        (pickle.dumps(Canary()), wire.SAFETENSORS, "safetensors"),
        (pickle.dumps(Canary()), wire.JSON, "JSON"),
        (
            pickle.dumps(Canary()),
            "application/octet-stream",
            "the content type must be",
        ),
        (save({"video": VIDEO}), wire.SAFETENSORS, "a request in its metadata"),
        (metadata(GOOD)[:-10], wire.SAFETENSORS, "safetensors"),
        (metadata(GOOD, VIDEO.float()), wire.SAFETENSORS, "uint8"),
        (metadata(GOOD, VIDEO[:2]), wire.SAFETENSORS, r"\b3\b"),
        (
            metadata(GOOD, VIDEO.repeat(2, 1, 1, 1, 1)),
            wire.SAFETENSORS,
            r"\b6\b",
        ),
        (
            metadata(GOOD, VIDEO.repeat(1, 9, 1, 1, 1)),
            wire.SAFETENSORS,
            r"\b18\b",
        ),
        (
            metadata(GOOD.replace("8}", "-1}")),
            wire.SAFETENSORS,
            "fps",
        ),
        (metadata("[1]"), wire.SAFETENSORS, "fps"),
        (b"[" * 100_000, wire.JSON, "JSON"),
        (b"[]", wire.JSON, "videos"),
        (
            by_hand({"mp4": ""}, prompts=[3]),
            wire.JSON,
            "prompts",
        ),
        (by_hand({"mp4": ""}, model=3), wire.JSON, "model"),
    ],
)
def test_malformed_request_is_refused(body: bytes, kind: str, message: str) -> None:
    with pytest.raises(wire.WireError, match=message):
        asked(body, kind)
    assert not Path("/tmp/reward-wire-canary").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [1.0]}, "numbers"),
        ({"values": None}, "numbers"),
        ({"values": [1.0, "2"]}, "finite"),
        ({"values": [1.0, True]}, "finite"),
        ({"values": [1.0, 1e999]}, "finite"),
        ({"model": "other"}, "'m'"),
        ({"id": "6"}, "'6'"),
        ({"parts": {"style": [1.0]}}, "numbers"),
        ({"texts": "ab"}, "texts"),
    ],
)
def test_malformed_reply_is_refused(change: dict[str, Any], message: str) -> None:
    sound = {"id": "7", "model": "m", "values": [1.0, None], "parts": {}, "texts": []}
    assert (
        wire.decode_reply(
            json.dumps(sound).encode(), videos=2, model="m", id="7"
        ).score.value_B[0]
        == 1.0
    )
    with pytest.raises(wire.WireError, match=message):
        wire.decode_reply(
            json.dumps({**sound, **change}).encode(), videos=2, model="m", id="7"
        )
    with pytest.raises(wire.WireError, match="JSON"):
        wire.decode_reply(b"<html>busy</html>", videos=2, model="m", id="7")
