"""The other side of `rm.video_check`: decodes the files it is told, one line of JSON each, and may die of it.

    {"path": FILE, "frames": at most so many} -> {"frames": in the file, "problem": "" or what is wrong}

Imports nothing of this project and no torch, so that it starts at once.
"""

from __future__ import annotations

import json
import sys

MAX_SIDE = 16_384  # pixels; a header may claim anything, and a frame of what it claims is allocated


def look(path: str, frames: int) -> tuple[int, str]:
    """(frames in the file, problem): decode up to ``frames`` of them, evenly spaced, first and last included."""
    import decord

    try:
        reader = decord.VideoReader(path, num_threads=1)
        count, fps = len(reader), float(reader.get_avg_fps())
        if count < 1 or not fps > 0:
            return count, f"{count} frames at {fps} fps"
        steps = max(1, min(frames, count) - 1)
        for i in sorted({round(k * (count - 1) / steps) for k in range(steps + 1)}):
            height, width = reader[i].shape[:2]
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
        asked = json.loads(line)
        count, problem = look(asked["path"], asked["frames"])
        sys.stdout.write(json.dumps({"frames": count, "problem": problem}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
