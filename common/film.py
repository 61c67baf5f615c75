"""Film: the frames of a video file as a player shows them. Every command reads files with it.

Shown are the frames of the stream that a player puts on the screen: those that an edit list keeps,
upright (rotated and mirrored), with square pixels, in the order of their timestamps. Time counts
from the first of them. A film with a variable frame rate is read as if it had been recorded at its
mean rate: frame k is the one on the screen k / fps seconds after the first.

Damage is an error that names the file, never a short film and never a frame that was not decoded.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from common.packets import read_packets
from common.timeline import measure

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream
    from torch import Tensor

# Pixels. A header may claim any size, and a frame of that size is allocated.
MAX_SIDE = 16_384
# The sine of an angle that nobody sees.
_DEGREE = 0.0175


class VideoError(ValueError):
    """A video that cannot be read; the message names the file."""


class Film:
    """A video file, measured when it is opened, decoded when its frames are read.

    source      a path, or the content of an mp4: content comes from strangers, and other formats
                may name further files to open
    max_frames  a film with more of them is an error, found before they are decoded
    max_bytes   frames that take more together are an error, found before they are decoded
    count       number of frames
    fps         their mean rate
    duration    how long they are shown, in seconds

    Raises VideoError, naming the file, if it is missing, damaged, too long or has no picture.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        max_frames: float = math.inf,
        max_bytes: float = math.inf,
    ) -> None:
        self.source = source
        self.max_frames = max_frames
        self.max_bytes = max_bytes
        self.name = "the mp4" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise VideoError(f"{self.name}: no such video file")
        with _named_errors(self.name):
            self._measure()
        self.count = self.timeline.count
        self.fps = self.timeline.fps
        self.duration = self.timeline.duration

    def frames(self, indices: Iterable[int]) -> Tensor:
        """Frames by their numbers at the mean rate, uint8 RGB (T, Y, X, 3)."""
        return self._read([self.timeline.place_of(index) for index in indices])

    def frames_at(self, seconds: Iterable[float]) -> Tensor:
        """The frames on the screen at some times, uint8 RGB (T, Y, X, 3)."""
        return self._read([self.timeline.place_at(second) for second in seconds])

    def check(self, number: int) -> None:
        """Decode up to ``number`` evenly spaced frames, the first and the last included.

        Raises VideoError as `frames` would.
        """
        # A film that had to be decoded to be measured has been.
        if self._ticks is None:
            number = 1
        steps = max(1, min(number, self.count) - 1)
        places = {round(k * (self.count - 1) / steps) for k in range(steps + 1)}
        screen = None
        with _named_errors(self.name):
            for _, frame in self._decode(places):
                screen = screen or _Screen(frame, self._pixel_aspect)

    def _measure(self) -> None:
        """Find out which frames there are, and when they are shown."""
        # Look at every packet.
        with self._opened() as (container, stream):
            self._packets = read_packets(container, stream)
            self._pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
            tick = float(stream.time_base)
            claims = []
            for rate in (stream.average_rate, stream.guessed_rate):
                claims.append(float(rate or 0))
        last = self._packets.last

        # Where that does not tell the frames, decode all of them, and keep none.
        self._ticks = self._packets.shown_ticks()
        ticks = self._ticks
        if ticks is None:
            ticks = []
            for frame in self._decode_all():
                ticks.append(frame.pts)
                last = frame.duration or 0
                self._check_count(len(ticks))
        self._check_count(len(ticks))
        if not ticks:
            raise ValueError("has no frames")
        self.timeline = measure(ticks, last=last, tick=tick, claims=claims)

    def _check_count(self, count: int) -> None:
        if count > self.max_frames:
            raise ValueError(f"more than the {self.max_frames} frames that are allowed")

    def _check_bytes(self, size: int) -> None:
        if size > self.max_bytes:
            raise ValueError(
                f"its frames take {size >> 20} MB, {int(self.max_bytes) >> 20} MB are allowed"
            )

    def _read(self, places: Sequence[int]) -> Tensor:
        """Put frames on the screen; each is decoded once, however often it is shown."""
        import torch

        # The first frame of the film tells how all of them are shown.
        screen = None
        pixels = {}
        wanted = set(places)
        with _named_errors(self.name):
            for place, frame in self._decode({0, *wanted}):
                if screen is None:
                    screen = _Screen(frame, self._pixel_aspect)
                    self._check_bytes(len(places) * screen.bytes)
                if place in wanted:
                    pixels[place] = screen.pixels(frame)
        return torch.stack([pixels[place] for place in places])

    def _decode(self, places: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Yield the chosen frames with their numbers, in their order.

        Raises ValueError if one of them does not come.
        """
        chosen: Iterable[tuple[int, VideoFrame]]
        if self._ticks is None:
            chosen = enumerate(self._decode_all())
        else:
            chosen = self._decode_parts(places)
        missing = set(places)
        for place, frame in chosen:
            if place in missing:
                missing.discard(place)
                yield place, frame
            # What follows the last of them need not be decoded.
            if not missing:
                return
        raise ValueError(f"{len(missing)} frames cannot be decoded")

    def _decode_all(self) -> Iterator[VideoFrame]:
        with self._opened() as (container, stream):
            for number, packet in _numbered(container, stream):
                if number >= self._packets.first:
                    yield from _frames_of(packet)

    def _decode_parts(self, places: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Decode from the last entry before each chosen frame until it comes, and no more."""
        place_of = {self._ticks[place]: place for place in places}
        plan = self._packets.plan(place_of)
        missing: set[int] = set()
        with self._opened() as (container, stream):
            for number, packet in _numbered(container, stream):
                if number in plan:
                    # After a gap the decoder must forget what it had.
                    if not missing:
                        stream.codec_context.flush_buffers()
                    missing |= plan[number]
                if not missing:
                    continue
                for frame in _frames_of(packet):
                    if frame.pts in missing:
                        missing.discard(frame.pts)
                        yield place_of[frame.pts], frame

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        import av

        # Without the prefix, what precedes a colon in a name would be a protocol.
        source = f"file:{self.source}"
        kind = None
        if isinstance(self.source, bytes):
            source = io.BytesIO(self.source)
            kind = "mp4"
        with av.open(source, format=kind, metadata_errors="replace") as container:
            stream = _shown_stream(container)
            # With several threads a decoder gives its frames later.
            stream.codec_context.thread_count = 1
            yield container, stream


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a VideoError that names it."""
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        reason = str(error).strip() or type(error).__name__
        reason = reason.splitlines()[0]
        raise VideoError(f"{name}: cannot be decoded ({reason:.160})") from error
    except ValueError as error:
        raise VideoError(f"{name}: {error}") from error


def _shown_stream(container: InputContainer) -> VideoStream:
    """The stream that a player chooses: the default one, then the largest, then the first."""
    from av.stream import Disposition

    # Covers and thumbnails are no films, and a codec may be unknown.
    stills = Disposition.attached_pic | Disposition.timed_thumbnails
    films = []
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & stills:
            films.append(stream)
    if not films:
        raise ValueError("has no video stream that can be decoded")

    def rank(stream: VideoStream) -> tuple[bool, int]:
        is_default = bool(stream.disposition & Disposition.default)
        return is_default, stream.width * stream.height

    return max(films, key=rank)


def _numbered(
    container: InputContainer, stream: VideoStream
) -> Iterator[tuple[int, Packet]]:
    """Yield the packets as `read_packets` counts them, and the empty one that ends the stream."""
    number = 0
    for packet in container.demux(stream):
        # An empty packet on the way (the frame before it stays) would end the decoder.
        is_end = packet.dts is None
        if packet.size or is_end:
            yield number, packet
            number += 1


def _frames_of(packet: Packet) -> Iterator[VideoFrame]:
    """Decode a packet. Raises ValueError for a frame that the decoder had to guess."""
    for frame in packet.decode():
        if frame.is_corrupt:
            raise ValueError("a frame is damaged")
        if max(frame.height, frame.width) > MAX_SIDE:
            raise ValueError(f"frames of {frame.height} x {frame.width} pixels")
        yield frame


# ------------------------------------------------------------------ from a frame to the screen


class _Screen:
    """Puts decoded frames on the screen with ffmpeg's filters, as ffmpeg itself does.

    frame         the first of the film; all are shown in its way and in its size
    pixel_aspect  width / height of a pixel

    Raises ValueError for a film that is turned by other than quarter turns.
    """

    def __init__(self, frame: VideoFrame, pixel_aspect: Fraction) -> None:
        self.filters = []
        width = frame.width
        height = frame.height

        # Turn and mirror. A point (x, y) is shown at (a x + c y, b x + d y).
        a, b, c, d = _display_matrix(frame)
        if abs(b) > abs(a):
            self.filters.append(("transpose", "cclock_flip"))
            a, b, c, d = c, d, a, b
            width, height = height, width
            pixel_aspect = 1 / pixel_aspect
        if max(abs(b), abs(c)) > _DEGREE * min(abs(a), abs(d)):
            raise ValueError("is turned by no multiple of 90 degrees")
        if a < 0:
            self.filters.append(("hflip", ""))
        if d < 0:
            self.filters.append(("vflip", ""))

        # Make the pixels square: the width changes.
        width = max(1, int(width * pixel_aspect))
        if width > MAX_SIDE:
            raise ValueError(f"is shown {width} pixels wide")
        self.bytes = 3 * width * height
        self.filters.append(("scale", f"{width}:{height}"))
        self.filters.append(("format", "rgb24"))
        self._graphs: dict[tuple[int, int, str], Graph] = {}

    def pixels(self, frame: VideoFrame) -> Tensor:
        """Convert a frame to uint8 RGB (Y, X, 3)."""
        import torch

        # Films may change their size and colour format on the way.
        kind = (frame.width, frame.height, frame.format.name)
        if kind not in self._graphs:
            self._graphs[kind] = self._graph(*kind)
        graph = self._graphs[kind]
        graph.push(frame)
        return torch.from_numpy(graph.pull().to_ndarray())

    def _graph(self, width: int, height: int, pixel_format: str) -> Graph:
        from av.filter import Graph

        # Readers in many processes share the machine.
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=width,
            height=height,
            format=pixel_format,
            time_base=Fraction(1),
        )
        nodes = [source]
        for name, options in self.filters:
            nodes.append(graph.add(name, options))
        nodes.append(graph.add("buffersink"))
        graph.link_nodes(*nodes)
        graph.configure()
        return graph


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The four numbers that turn and mirror a frame, in 16.16 fixed point."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return a, b, c, d
