"""The HTTP format of a reward server: a request of videos and prompts, a reply of numbers.

A request has one of two bodies; neither holds a pickle or an address to fetch:

application/x-safetensors  Tensor ``video`` uint8 (B, T, Y, X, 3) at a common rate, and in the
                           header's metadata under ``request`` the JSON {"id", "model",
                           "prompts", "fps"}. Training runs send this.
application/json           {"model", "prompts", "videos": [{"mp4": base64} or {"frames":
                           base64, "shape": [T, Y, X, 3], "fps": 8}, ...], "id"}. People write
                           this by hand.

The reply is JSON: {"id", "model", "values": [number or null, ...], "parts": {name: [...]},
"texts": [...], "errors": [null or text, ...]} with an entry per video; null means "could not be
scored".
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.film import Film, VideoError
from common.types import Score, json_number

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"


class WireError(ValueError):
    """A request or a reply breaks the format."""


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


def decode_request(
    body: bytes, content_type: str, *, max_frames: int, max_videos: int
) -> Request:
    """Decode a request of either body.

    Raises WireError for any other body, and for more frames or videos than allowed. In a JSON
    request, a video that cannot be decoded becomes an item with an error; the others stay.
    """
    # parameters such as charset do not matter
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

    # the header's length, the header with the request, then the tensors
    try:
        length = int.from_bytes(body[:8], "little")
        if not 2 <= length <= len(body) - 8:
            raise WireError("the body is no safetensors file")
        header = json.loads(body[8 : 8 + length])
        request = json.loads(header["__metadata__"]["request"])
        tensors = load(body)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
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
    _check_size(
        len(video_BTYXC),
        video_BTYXC.shape[1],
        max_frames=max_frames,
        max_videos=max_videos,
    )
    fps = _rate(request.get("fps") if isinstance(request, dict) else None)
    return _request(request, [VideoItem(video_TYXC, fps) for video_TYXC in video_BTYXC])


def _from_json(body: bytes, *, max_frames: int, max_videos: int) -> Request:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is no JSON: {error!s:.200}") from error
    # each video is read separately, so that a broken one does not spoil the others
    videos = request.get("videos") if isinstance(request, dict) else None
    if not isinstance(videos, list) or not videos:
        raise WireError("videos must be a list with at least one entry")
    _check_size(len(videos), 0, max_frames=max_frames, max_videos=max_videos)
    return _request(request, [_item(entry, max_frames=max_frames) for entry in videos])


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

    # raw frames: their bytes and their shape
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
    try:
        film = Film(content, max_frames=max_frames)
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
    if not _is_finite_number(fps) or fps <= 0:
        raise WireError(f"fps must be a positive number, got {fps!r:.40}")
    return float(fps)


def _is_finite_number(value: Any) -> bool:
    """True for an int or float, but not for a bool, which Python counts as an int."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


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
        "errors": list(errors),
    }


def decode_reply(body: bytes, *, videos: int, model: str, id: str) -> Score:
    """Decode the reply to a request.

    Raises WireError unless it has exactly a number or null for each video of this very request.
    """
    # is it the reply to this request?
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the reply is no JSON: {body[:80]!r}") from error
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
    texts = reply.get("texts") or []
    if not _is_list_of_text(texts):
        raise WireError("texts must be a list of texts")
    return Score(value, parts, texts)


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
