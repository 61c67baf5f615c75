"""Measure the reader of video files against decord, which it replaced.

    python experiments/bench/film_reader.py

Each reader takes 16 evenly spaced frames of a film of 10 seconds and of a film of 10 minutes
(480 x 270, 24 a second, a key frame each 250 frames), in a fresh process that has read a small
film before. Medians of the rounds: "seconds" on the clock, "cpu_seconds" of the processor, and
"memory_mb", by how much the read raises the peak memory of the process. A format in which the
packets do not tell the frames (MPEG-TS) is decoded whole, once to count and once to read.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from experiments.bench.bench_io import bench_parser, write_record

FRAMES = 16
LENGTHS = {"10 s": 10, "10 minutes": 600}


def read_film(path: str) -> None:
    """Read the frames as every command does."""
    from common.film import Film

    film = Film(path)
    step = (film.count - 1) / (FRAMES - 1)
    film.frames([round(k * step) for k in range(FRAMES)])


def read_decord(path: str) -> None:
    """Read the frames with decord, one by one."""
    import decord
    import torch

    reader = decord.VideoReader(path, num_threads=1)
    step = (len(reader) - 1) / (FRAMES - 1)
    frames = []
    for k in range(FRAMES):
        frame = reader[round(k * step)].asnumpy()
        frames.append(torch.from_numpy(frame))
    torch.stack(frames)


READERS: dict[str, Callable[[str], None]] = {
    "film": read_film,
    "decord": read_decord,
}


def main() -> None:
    """Make the films, measure the readers, and write the JSON."""
    parser = bench_parser(__doc__, "film_reader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", nargs=3, metavar=("READER", "FILM", "SMALL"))
    args = parser.parse_args()
    if args.read:
        print(json.dumps(measure(*args.read)))
        return

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        small = encode(Path(folder, "small.mp4"), 1)
        for length, seconds in LENGTHS.items():
            # decord reads wrong frames of MPEG-TS, so its time there would mean nothing.
            mp4 = encode(Path(folder, f"{seconds}.mp4"), seconds)
            films = {
                f"{length}, mp4, film": ("film", mp4),
                f"{length}, mp4, decord": ("decord", mp4),
                f"{length}, MPEG-TS, film": ("film", remux(mp4)),
            }
            for name, (reader, path) in films.items():
                results[name] = medians(reader, path, small, args.rounds)
    write_record(args.out, {"frames": FRAMES, "rounds": args.rounds, **results})


def encode(path: Path, seconds: int) -> Path:
    """Encode a test picture."""
    source = f"testsrc2=size=480x270:rate=24:duration={seconds}"
    words = [
        "-f",
        "lavfi",
        "-i",
        source,
        "-c:v",
        "libx264",
        "-preset",
        "veryfast",
        "-g",
        "250",
    ]
    return run_ffmpeg(words, path)


def remux(path: Path) -> Path:
    """Copy a film into MPEG-TS."""
    words = ["-i", str(path), "-c", "copy"]
    return run_ffmpeg(words, path.with_suffix(".ts"))


def run_ffmpeg(words: list[str], path: Path) -> Path:
    """Write a file with ffmpeg."""
    import imageio_ffmpeg

    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-v", "error", *words, str(path)], check=True)
    return path


def medians(reader: str, path: Path, small: Path, rounds: int) -> dict[str, float]:
    """Read a film in fresh processes."""
    command = [sys.executable, __file__]
    command += ["--read", reader, str(path), str(small)]
    found = []
    for _ in range(rounds):
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
        )
        last_line = done.stdout.splitlines()[-1]
        found.append(json.loads(last_line))

    # Each figure by itself.
    result = {}
    for key in found[0]:
        result[key] = statistics.median(figures[key] for figures in found)
    return result


def measure(reader: str, path: str, small: str) -> dict[str, float]:
    """Measure a read of this process, after a small one that loads the libraries."""
    read = READERS[reader]
    read(small)

    # Read.
    memory_mb = peak_mb()
    seconds = time.perf_counter()
    cpu_seconds = time.process_time()
    read(path)

    # What it took.
    seconds = time.perf_counter() - seconds
    cpu_seconds = time.process_time() - cpu_seconds
    memory_mb = peak_mb() - memory_mb
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "memory_mb": round(memory_mb, 1),
    }


def peak_mb() -> float:
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
