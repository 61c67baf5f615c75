"""What vLLM is asked: frames, and a prompt that it expands to exactly our token ids.

vLLM takes the prompt with a single ``<|video_pad|>`` for the video and replaces it, for each
temporal patch, by the ids of "<{t:.1f} seconds>", vision start, pads and vision end. The ids that
it reports must be ours, else the answer is an error. It tokenises a time stamp separately, so the
template's ``before`` must end where no token joins it to a "<": in a newline, for example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rm.config import VideoSettings
from rm.model import DeScore
from rm.prompt import VISION_END, VISION_START, Encoded, encode_text, token_id
from rm.video import PreparedVideo


def request_arrays(
    model: DeScore,
    encoded: Sequence[Encoded],
    videos: Sequence[PreparedVideo],
    *,
    bare: bool,
) -> dict[str, Tensor]:
    """Return short_b, full_b, frames_b and stamps_b of every sequence b, see `rm.vllm.worker`.

    bare  As in `short_prompt`.
    """
    arrays = {}
    settings = model.settings
    for b, (item, video) in enumerate(zip(encoded, videos, strict=True)):
        short = short_prompt(model, item, video, bare=bare)
        arrays[f"short_{b}"] = torch.tensor(short)
        arrays[f"full_{b}"] = torch.tensor(item.prompt_ids)
        arrays[f"frames_{b}"] = frames_of(video, settings)
        # vLLM takes the mean over the frames of a temporal patch: equal times stay exact.
        times = torch.tensor(video.times, dtype=torch.float64)
        stamps = times.repeat_interleave(settings.temporal_patch_size)
        arrays[f"stamps_{b}"] = stamps
    return arrays


def short_prompt(
    model: DeScore, encoded: Encoded, video: PreparedVideo, *, bare: bool
) -> list[int]:
    """Return the prompt with one placeholder, which vLLM expands to ``prompt_ids``.

    bare  The placeholder is the video token alone; if not, it has the vision tokens around it.

    ValueError if it would expand to other ids.
    """
    # 1. Expand the video as vLLM does.
    tokenizer = model.tokenizer
    vision_start = token_id(tokenizer, VISION_START)
    vision_end = token_id(tokenizer, VISION_END)
    pad = model.video_pad_id
    ids = list(encoded.prompt_ids)
    _, height, width = video.grid
    pads = [pad] * (height * width // model.settings.merge_size**2)
    expanded: list[int] = []
    for time in video.times:
        expanded += encode_text(tokenizer, f"<{time:.1f} seconds>")
        expanded += [vision_start, *pads, vision_end]

    # 2. The prompt must hold exactly these ids.
    first = expanded.index(vision_start)
    start = ids.index(vision_start) - first
    end = start + len(expanded)
    if ids[start:end] != expanded:
        raise ValueError(f"vLLM would expand the prompt otherwise at token {start}")
    placeholder = [pad] if bare else [vision_start, pad, vision_end]
    return [*ids[:start], *placeholder, *ids[end:]]


def frames_of(video: PreparedVideo, settings: VideoSettings) -> Tensor:
    """Return the uint8 frames (T, Y, X, 3) that `rm.video.preprocess` cut up, exactly.

    They are resized, and the last is repeated where it fills a patch.
    """
    # Undo the cut.
    tp = settings.temporal_patch_size
    p = settings.patch_size
    m = settings.merge_size
    t, h, w = video.grid
    cut = video.patches.reshape(t, h // m, w // m, m, m, -1, tp, p, p)
    ordered = cut.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    frames = ordered.reshape(t * tp, h * p, w * p, -1)

    # Undo the normalisation.
    mean = torch.tensor(settings.mean) * 255.0
    std = torch.tensor(settings.std) * 255.0
    return (frames * std + mean).round().to(torch.uint8)


def check_model(model: DeScore) -> None:
    """Check what vLLM assumes about a model: its patch sizes, and tokens around a time stamp."""
    settings = model.settings
    if settings.temporal_patch_size != settings.merge_size:
        raise ValueError(
            f"temporal_patch_size={settings.temporal_patch_size} must equal "
            f"merge_size={settings.merge_size}: vLLM pairs the times of frames by the latter"
        )

    # vLLM tokenises a time stamp apart from the text before it.
    before = model.template.before
    stamp = "<0.5 seconds>"
    apart = encode_text(model.tokenizer, before) + encode_text(model.tokenizer, stamp)
    if apart != encode_text(model.tokenizer, before + stamp):
        raise ValueError(
            f"a token joins the template's `before`, {before[-12:]!r}, to the time stamp, which "
            "vLLM tokenises separately: end `before` with a newline"
        )
