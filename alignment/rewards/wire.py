"""The HTTP format of a reward server: a request of videos and prompts, a reply of numbers.

A request has one of two bodies; neither holds a pickle or an address to fetch:

application/x-safetensors  Tensor ``video`` uint8 (B, T, Y, X, 3) at a common rate, and in the
                           header's metadata under ``request`` the JSON {"id", "model",
                           "prompts", "fps"}. Training runs send this.
application/json           {"model", "prompts", "videos": [{"mp4": base64} or {"frames":
                           base64, "shape": [T, Y, X, 3], "fps": 8}, ...], "id"}. People write
                           this by hand.

The reply is JSON: {"id", "model", "values": [number or null, ...], "parts": {name: [...]},
"texts": [...], "reasons": [text, ...], "errors": [null or text, ...], "failed": number of
errors} with an entry per video; null means "could not be scored", and its reason says why. Errors
are of videos that could not be read, and of rewards that raised one. The status is 200 when no
video has an error, 207 when some have, 422 when all have.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.film import Film, VideoError
from common.types import Score, json_number

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
# (2 - 2^-23) 2^127
_LARGEST_FP32 = 3.4028234663852886e38


# Frame rates outside these bounds are mistakes, and overflow in arithmetic.
SLOWEST_FPS = 0.01
FASTEST_FPS = 1000.0


class WireError(ValueError):
    """A request or a reply breaks the format."""


@dataclass(frozen=True)
class RequestLimits:
    """How large a request may be.

    max_frames  Frames of a video.
    max_videos  Videos of a request.
    max_bytes   Bytes of all decoded frames of a request: a small mp4 can hold very large frames.
    """

    max_frames: int
    max_videos: int
    max_bytes: int = 1 << 32


@dataclass(frozen=True)
class VideoItem:
    """A video with its frame rate, or the error of a video that cannot be read."""

    video_TYXC: Tensor | None
    fps: float
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """A decoded request: an item per prompt."""

    id: str
    model: str
    prompts: tuple[str, ...]
    items: tuple[VideoItem, ...]


def encode_request(
    video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float, model: str, id: str
) -> bytes:
    """Encode the body of a safetensors request."""
    from safetensors.torch import save

    request = {"id": id, "model": model, "prompts": list(prompts), "fps": float(fps)}
    return save(
        {"video": video_BTYXC.contiguous()},
        metadata={"request": json.dumps(request, ensure_ascii=False)},
    )


@dataclass(frozen=True)
class Reply:
    """A decoded reply: the scores, and for each video its error or None."""

    score: Score
    errors: tuple[str | None, ...]


def decode_request(body: bytes, content_type: str, limits: RequestLimits) -> Request:
    """Decode a request of either body.

    Raises WireError for any other body, and for a request over its limits. In a JSON request, a
    video that cannot be decoded or is too large becomes an item with an error; the others stay.
    """
    # parameters such as charset do not matter
    kind = content_type.partition(";")[0].strip().lower()
    if kind == SAFETENSORS:
        return _from_safetensors(body, limits)
    if kind == JSON:
        return _from_json(body, limits)
    raise WireError(
        f"the content type must be {SAFETENSORS} or {JSON}, got {kind or 'none'!r}"
    )


def _from_safetensors(body: bytes, limits: RequestLimits) -> Request:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    # the header's length, the header with the request, then the tensors
    try:
        length = int.from_bytes(body[:8], "little")
        if not 2 <= length <= len(body) - 8:
            raise WireError("the body is no safetensors file")
        header = json.loads(body[8 : 8 + length])
        request = json.loads(header["__metadata__"]["request"])
        tensors = load(body)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WireError(
            "the body is no safetensors file with a request in its metadata: "
            f"{error!r:.200}"
        ) from error

    # the videos
    video_BTYXC = tensors.get("video")
    if (
        video_BTYXC is None
        or video_BTYXC.dtype != torch.uint8
        or video_BTYXC.dim() != 5
        or video_BTYXC.shape[-1] != 3
    ):
        raise WireError("tensor video must be uint8 (B, T, Y, X, 3)")
    _check_videos(len(video_BTYXC), limits)
    _check_frames(tuple(video_BTYXC.shape[1:]), limits)
    fps = _rate(request.get("fps") if isinstance(request, dict) else None)
    return _request(request, [VideoItem(video_TYXC, fps) for video_TYXC in video_BTYXC])


def _from_json(body: bytes, limits: RequestLimits) -> Request:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is no JSON: {error!s:.200}") from error
    # each video is read separately, so that a broken one does not spoil the others
    videos = request.get("videos") if isinstance(request, dict) else None
    if not isinstance(videos, list) or not videos:
        raise WireError("videos must be a list with at least one entry")
    _check_videos(len(videos), limits)
    items = []
    left = limits
    for entry in videos:
        item = _item(entry, left)
        items.append(item)
        # the limit of bytes is for all videos together
        if item.video_TYXC is not None:
            left = replace(left, max_bytes=left.max_bytes - item.video_TYXC.nbytes)
    return _request(request, items)


def _item(entry: Any, limits: RequestLimits) -> VideoItem:
    try:
        if not isinstance(entry, dict) or ("mp4" in entry) == ("frames" in entry):
            raise WireError(
                "a video is {mp4: base64} or {frames: base64, shape: [T, Y, X, 3], fps: number}"
            )
        if "mp4" in entry:
            return _read_mp4(_bytes(entry["mp4"]), limits)
        return _read_frames(entry, limits)
    except WireError as error:
        return VideoItem(None, 1.0, str(error))


def _read_frames(entry: Mapping[str, Any], limits: RequestLimits) -> VideoItem:
    import torch

    # raw frames: their bytes and their shape
    shape = entry.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 4
        and all(type(n) is int and n > 0 for n in shape)
        and shape[3] == 3
    ):
        raise WireError(f"shape must be [T, Y, X, 3], got {shape!r:.80}")
    _check_frames(tuple(shape), limits)
    raw = bytearray(_bytes(entry["frames"]))
    if len(raw) != math.prod(shape):
        raise WireError(f"{len(raw)} bytes for a shape of {math.prod(shape)}")
    return VideoItem(
        torch.frombuffer(raw, dtype=torch.uint8).view(shape), _rate(entry.get("fps"))
    )


def _read_mp4(content: bytes, limits: RequestLimits) -> VideoItem:
    # frames of any size fit into a small file
    try:
        film = Film(content, max_frames=limits.max_frames, max_bytes=limits.max_bytes)
        return VideoItem(film.frames(range(film.count)), _rate(film.fps))
    except VideoError as error:
        raise WireError(str(error)) from error


def _request(request: Any, items: Sequence[VideoItem]) -> Request:
    """Check everything but the videos."""
    if not isinstance(request, dict):
        raise WireError("a request is a JSON object")
    prompts = request.get("prompts")
    model = request.get("model")
    request_id = request.get("id", "")
    if not _is_list_of_text(prompts):
        raise WireError("prompts must be a list of texts")
    if len(prompts) != len(items):
        raise WireError(f"{len(prompts)} prompts for {len(items)} videos")
    if not isinstance(model, str) or not isinstance(request_id, str):
        raise WireError("model and id must be texts")
    return Request(request_id, model, tuple(prompts), tuple(items))


def _check_videos(videos: int, limits: RequestLimits) -> None:
    if not 1 <= videos <= limits.max_videos:
        raise WireError(
            f"{videos} videos in a request, 1 to {limits.max_videos} are allowed"
        )


def _check_frames(shape: tuple[int, ...], limits: RequestLimits) -> None:
    """Check the shape (T, Y, X, 3) of a video. The limit of bytes counts decoded frames."""
    if shape[0] > limits.max_frames:
        raise WireError(f"{shape[0]} frames, at most {limits.max_frames} are allowed")
    size = math.prod(shape)
    if size == 0:
        raise WireError(f"a video of shape {list(shape)} has no pixels")
    if size > limits.max_bytes:
        raise WireError(
            f"{size >> 20} MB of decoded frames, {max(0, limits.max_bytes) >> 20} MB are left "
            "for this request: send fewer or smaller videos"
        )


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise WireError("a video's content must be base64") from error


def _rate(fps: Any) -> float:
    if not _is_finite_number(fps) or not SLOWEST_FPS <= fps <= FASTEST_FPS:
        raise WireError(
            f"fps must be a number from {SLOWEST_FPS:g} to {FASTEST_FPS:g}, got {fps!r:.40}"
        )
    return float(fps)


def _is_finite_number(value: Any) -> bool:
    """True for an int or float that fp32 can hold, but not for a bool, which is an int too."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # comparing works for integers that are too large for a float, and is False for NaN
    return is_number and -_LARGEST_FP32 <= value <= _LARGEST_FP32


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


# ------------------------------------------------------------------ reply


def encode_reply(
    request: Request, score: Score, errors: Sequence[str | None]
) -> dict[str, Any]:
    """Encode a reply as JSON: fp32 numbers written out in full come back bit for bit."""
    parts = {}
    for name, part_B in score.parts.items():
        parts[name] = [json_number(value) for value in part_B]
    return {
        "id": request.id,
        "model": request.model,
        "values": [json_number(value) for value in score.value_B],
        "parts": parts,
        "texts": list(score.texts),
        "reasons": [score.reason(i) for i in range(len(score.value_B))],
        "errors": list(errors),
        "failed": sum(error is not None for error in errors),
    }


def decode_reply(body: bytes, *, videos: int, model: str, id: str) -> Reply:
    """Decode the reply to a request.

    Raises WireError unless it has exactly a number or null for each video of this very request.
    """
    # is it the reply to this request?
    reply = read_json(body)
    if not isinstance(reply, dict) or reply.get("model") != model:
        raise WireError(f"the reply is not of model {model!r}")
    if reply.get("id") != id:
        raise WireError(
            f"the reply is to request {reply.get('id')!r:.80}, not to {id!r}"
        )

    # its numbers and texts
    value = _column(reply.get("values"), videos)
    columns = reply.get("parts") or {}
    if not isinstance(columns, dict):
        raise WireError("parts must be a mapping of lists of numbers")
    parts = {name: _column(values, videos) for name, values in columns.items()}
    texts = _texts(reply, "texts", videos)
    reasons = _texts(reply, "reasons", videos)
    # a reply of another server may lack the errors
    errors = reply.get("errors") or [None] * videos
    if not isinstance(errors, list) or len(errors) != videos:
        raise WireError("errors must be a list with an entry per video")
    return Reply(
        Score(value, parts, texts, reasons),
        tuple(None if error is None else str(error) for error in errors),
    )


def _texts(reply: Mapping[str, Any], name: str, videos: int) -> list[str]:
    """A text per video; empty where the reply has none."""
    texts = reply.get(name) or []
    if not _is_list_of_text(texts):
        raise WireError(f"{name} must be a list of texts")
    if texts and len(texts) != videos:
        raise WireError(f"the reply has {len(texts)} {name} for {videos} videos")
    return texts


def read_json(body: bytes) -> Any:
    """Parse a reply. Raises WireError for anything that is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the reply is no JSON: {body[:80]!r}") from error


def _column(values: Any, videos: int) -> Tensor:
    """Numbers or nulls as fp32 (B,), null as NaN."""
    import torch

    if not isinstance(values, list) or len(values) != videos:
        got = len(values) if isinstance(values, list) else "none"
        raise WireError(f"the reply has {got} numbers for {videos} videos")
    numbers = []
    for value in values:
        if value is not None and not _is_finite_number(value):
            raise WireError(
                f"a score must be a finite number or null, got {value!r:.40}"
            )
        numbers.append(math.nan if value is None else float(value))
    return torch.tensor(numbers, dtype=torch.float32)
