"""What a reward's client and server say to each other over HTTP: videos and prompts there, numbers back.

A request is one of two bodies, and neither a pickle nor an address to fetch:

application/x-safetensors   tensor ``video`` uint8 (B, T, Y, X, 3) at one rate, and in the header's metadata under
                            ``request`` the JSON {"id", "model", "prompts", "fps"}: what a training run sends
application/json            {"model", "prompts", "videos": [{"mp4": base64} or {"frames": base64, "shape": [T, Y, X, 3],
                            "fps": 8}, ...], "id"}: what people write by hand

The reply is JSON: {"id", "model", "values": [number or null, ...], "parts": {name: [...]}, "texts": [...], "errors":
[null or text, ...]}, one entry per video; null is "could not judge".
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.types import Score, json_number

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS, JSON = "application/x-safetensors", "application/json"


class WireError(ValueError):
    """A request or a reply that is not what it should be."""


@dataclass(frozen=True)
class VideoItem:
    """One video with its rate, or what is wrong with it."""

    video_TYXC: Tensor | None
    fps: float
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """What was asked: one item per prompt."""

    id: str
    model: str
    prompts: tuple[str, ...]
    items: tuple[VideoItem, ...]


def encode_request(
    video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float, model: str, id: str
) -> bytes:
    """The body of a safetensors request."""
    from safetensors.torch import save

    asked = {"id": id, "model": model, "prompts": list(prompts), "fps": float(fps)}
    return save(
        {"video": video_BTYXC.contiguous()},
        metadata={"request": json.dumps(asked, ensure_ascii=False)},
    )


def decode_request(
    body: bytes, content_type: str, *, max_frames: int, max_videos: int
) -> Request:
    """Either body. Raises WireError for what is neither, and for more frames or videos than allowed.

    A JSON request's video that cannot be decoded becomes an item with an error, the others stay.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == SAFETENSORS:
        return _from_safetensors(body, max_frames=max_frames, max_videos=max_videos)
    if kind == JSON:
        return _from_json(body, max_frames=max_frames, max_videos=max_videos)
    raise WireError(
        f"the content type must be {SAFETENSORS} or {JSON}, got {kind or 'none'!r}"
    )


def _from_safetensors(body: bytes, *, max_frames: int, max_videos: int) -> Request:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(body[:8], "little")
        if not 2 <= length <= len(body) - 8:
            raise WireError("the body is no safetensors file")
        header = json.loads(body[8 : 8 + length])
        asked = json.loads(header["__metadata__"]["request"])
        tensors = load(body)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WireError(
            f"the body is no safetensors file with a request in its metadata: {error!r:.200}"
        ) from error
    video_BTYXC = tensors.get("video")
    if (
        video_BTYXC is None
        or video_BTYXC.dtype != torch.uint8
        or video_BTYXC.dim() != 5
        or video_BTYXC.shape[-1] != 3
    ):
        raise WireError("tensor video must be uint8 (B, T, Y, X, 3)")
    _check_size(
        len(video_BTYXC),
        video_BTYXC.shape[1],
        max_frames=max_frames,
        max_videos=max_videos,
    )
    fps = _rate(asked.get("fps") if isinstance(asked, dict) else None)
    return _request(asked, [VideoItem(video_TYXC, fps) for video_TYXC in video_BTYXC])


def _from_json(body: bytes, *, max_frames: int, max_videos: int) -> Request:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is no JSON: {error!s:.200}") from error
    videos = asked.get("videos") if isinstance(asked, dict) else None
    if not isinstance(videos, list) or not videos:
        raise WireError("videos must be a list with at least one entry")
    _check_size(len(videos), 0, max_frames=max_frames, max_videos=max_videos)
    return _request(asked, [_item(entry, max_frames=max_frames) for entry in videos])


def _item(entry: Any, *, max_frames: int) -> VideoItem:
    try:
        if not isinstance(entry, dict) or ("mp4" in entry) == ("frames" in entry):
            raise WireError(
                "a video is {mp4: base64} or {frames: base64, shape: [T, Y, X, 3], fps: number}"
            )
        if "mp4" in entry:
            return _read_mp4(_bytes(entry["mp4"]), max_frames=max_frames)
        return _read_frames(entry, max_frames=max_frames)
    except WireError as error:
        return VideoItem(None, 1.0, str(error))


def _read_frames(entry: Mapping[str, Any], *, max_frames: int) -> VideoItem:
    import torch

    shape = entry.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 4
        and all(type(n) is int and n > 0 for n in shape)
        and shape[3] == 3
    ):
        raise WireError(f"shape must be [T, Y, X, 3], got {shape!r:.80}")
    if shape[0] > max_frames:
        raise WireError(f"{shape[0]} frames, at most {max_frames} are allowed")
    raw = bytearray(_bytes(entry["frames"]))
    if len(raw) != math.prod(shape):
        raise WireError(f"{len(raw)} bytes for a shape of {math.prod(shape)}")
    return VideoItem(
        torch.frombuffer(raw, dtype=torch.uint8).view(shape), _rate(entry.get("fps"))
    )


def _read_mp4(content: bytes, *, max_frames: int) -> VideoItem:
    import io

    import av
    import torch

    frames = []
    try:
        with av.open(io.BytesIO(content), mode="r", format="mp4") as container:
            if not container.streams.video:
                raise WireError("the mp4 has no video")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                if len(frames) == max_frames:
                    raise WireError(f"more than {max_frames} frames")
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            fps = float(stream.average_rate or 0)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"the mp4 cannot be decoded: {error!s:.200}") from error
    if not frames:
        raise WireError("the mp4 has no frames")
    return VideoItem(torch.stack(frames), _rate(fps))


def _request(asked: Any, items: Sequence[VideoItem]) -> Request:
    if not isinstance(asked, dict):
        raise WireError("a request is a JSON object")
    prompts, model, name = asked.get("prompts"), asked.get("model"), asked.get("id", "")
    if not isinstance(prompts, list) or not all(
        isinstance(prompt, str) for prompt in prompts
    ):
        raise WireError("prompts must be a list of texts")
    if len(prompts) != len(items):
        raise WireError(f"{len(prompts)} prompts for {len(items)} videos")
    if not isinstance(model, str) or not isinstance(name, str):
        raise WireError("model and id must be texts")
    return Request(name, model, tuple(prompts), tuple(items))


def _check_size(videos: int, frames: int, *, max_frames: int, max_videos: int) -> None:
    if not 1 <= videos <= max_videos:
        raise WireError(f"{videos} videos in a request, 1 to {max_videos} are allowed")
    if frames > max_frames:
        raise WireError(f"{frames} frames, at most {max_frames} are allowed")


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise WireError("a video's content must be base64") from error


def _rate(fps: Any) -> float:
    if (
        isinstance(fps, bool)
        or not isinstance(fps, int | float)
        or not math.isfinite(fps)
        or fps <= 0
    ):
        raise WireError(f"fps must be a positive number, got {fps!r:.40}")
    return float(fps)


# ------------------------------------------------------------------ reply


def encode_reply(
    request: Request, score: Score, errors: Sequence[str | None]
) -> dict[str, Any]:
    """As JSON: fp32 numbers written out in full come back bit for bit."""
    return {
        "id": request.id,
        "model": request.model,
        "values": [json_number(value) for value in score.value_B],
        "parts": {
            name: [json_number(value) for value in part_B]
            for name, part_B in score.parts.items()
        },
        "texts": list(score.texts),
        "errors": list(errors),
    }


def decode_reply(body: bytes, *, videos: int, model: str, id: str) -> Score:
    """Raises WireError for anything but one number or null for each of the videos of this very request."""
    import torch

    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the reply is no JSON: {body[:80]!r}") from error
    if not isinstance(said, dict) or said.get("model") != model:
        raise WireError(f"the reply is not of model {model!r}")
    if said.get("id") != id:
        raise WireError(
            f"the reply is to request {said.get('id')!r:.80}, not to {id!r}"
        )
    parts, texts = said.get("parts") or {}, said.get("texts") or []
    columns = {
        name: _column(values, videos)
        for name, values in {"values": said.get("values"), **parts}.items()
    }
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise WireError("texts must be a list of texts")
    value = torch.tensor(columns.pop("values"), dtype=torch.float32)
    return Score(
        value,
        {n: torch.tensor(c, dtype=torch.float32) for n, c in columns.items()},
        texts,
    )


def _column(values: Any, videos: int) -> list[float]:
    if not isinstance(values, list) or len(values) != videos:
        got = len(values) if isinstance(values, list) else "none"
        raise WireError(f"the reply has {got} numbers for {videos} videos")
    for value in values:
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise WireError(
                f"a score must be a finite number or null, got {value!r:.40}"
            )
    return [math.nan if value is None else float(value) for value in values]
