"""The process of `rm.video_check` that decodes files, and may die of it.

It imports no torch, so that it starts quickly.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

from common.film import Film, VideoError


def problem_of(path: str, frames: int) -> str:
    """Decode up to ``frames`` evenly spaced frames of a file; "" if nothing is wrong."""
    try:
        Film(path).check(frames)
    except VideoError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def serve(connection: Connection) -> None:
    """Answer (path, frames) with the problem of the file until the other side hangs up.

    The answers are bytes and no objects: a file may take over the process that decodes it.
    """
    connection.send_bytes(b"ready")
    while True:
        try:
            path, frames = connection.recv()
        except EOFError:
            return
        connection.send_bytes(problem_of(path, frames).encode())
