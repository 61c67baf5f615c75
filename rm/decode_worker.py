"""Worker process of `rm.video_check`: decodes files, and may die of it.

    {"path": FILE, "frames": N} -> {"frames": in the file, "problem": "" or a description}

Requests and answers are a line of JSON each. The worker imports nothing of this project and
no torch, so that it starts quickly.
"""

from __future__ import annotations

import json
import sys

# Pixels. A header may claim any size, and a frame of that size is allocated.
MAX_SIDE = 16_384


def check_video(path: str, frames: int) -> tuple[int, str]:
    """Decode up to ``frames`` evenly spaced frames; (frames in the file, problem)."""
    import decord

    try:
        reader = decord.VideoReader(path, num_threads=1)
        count = len(reader)
        fps = float(reader.get_avg_fps())
        if count < 1 or not fps > 0:
            return count, f"{count} frames at {fps} fps"

        # The first and the last frame are included.
        steps = max(1, min(frames, count) - 1)
        indices = {round(k * (count - 1) / steps) for k in range(steps + 1)}
        for index in sorted(indices):
            height, width = reader[index].shape[:2]
            if max(height, width) > MAX_SIDE:
                return count, f"frames of {height} x {width} pixels"
    except (
        RuntimeError,
        decord.DECORDError,
        MemoryError,
        ValueError,
        IndexError,
    ) as error:
        text = str(error).strip() or type(error).__name__
        return 0, f"cannot be decoded ({text.splitlines()[0]:.160})"
    return count, ""


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        count, problem = check_video(request["path"], request["frames"])
        sys.stdout.write(json.dumps({"frames": count, "problem": problem}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
