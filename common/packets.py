"""What the packets of a film tell before any is decoded, and where decoding may start.

A container marks key frames, but not every key frame is a fresh start: later frames may refer to
earlier ones. The packets themselves tell, by the rules of their codec.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream


# ------------------------------------------------------------------ where decoding may start


@dataclass(frozen=True)
class PacketRole:
    """is_entry: decoding can start here. has_parameters: later packets may need what it holds."""

    is_entry: bool
    has_parameters: bool = False


@dataclass(frozen=True)
class _NalRules:
    """How H.264 and HEVC mark the parts of a packet, their NAL units.

    place       the byte of the extradata with the width of a unit's length
    shift       the unit's kind is in its first byte, after so many bits
    mask        the bits of the kind
    entries     kinds that start anew: nothing shown after them refers to what precedes them
    parameters  kinds that hold parameters of the decoder
    """

    place: int
    shift: int
    mask: int
    entries: frozenset[int]
    parameters: frozenset[int]


# Tables 7-1 of both standards: IDR pictures of H.264, IRAP pictures of HEVC.
_NAL_RULES = {
    "h264": _NalRules(
        place=4,
        shift=0,
        mask=31,
        entries=frozenset({5}),
        parameters=frozenset({7, 8}),
    ),
    "hevc": _NalRules(
        place=21,
        shift=1,
        mask=63,
        entries=frozenset(range(16, 22)),
        parameters=frozenset({32, 33, 34}),
    ),
}
# Kinds of the parts of an AV1 packet.
_AV1_SEQUENCE_HEADER = 1
_AV1_FRAME_HEADERS = (3, 6)


def packet_roles(codec: str, extradata: bytes) -> Callable[[bytes], PacketRole] | None:
    """Return a function that reads the role of a packet; None where no role is certain."""
    if codec == "vp9":
        return _role_in_vp9
    if codec == "av1":
        return _role_in_av1
    # In mp4 and mkv each unit follows its length; elsewhere the extradata has another form.
    rules = _NAL_RULES.get(codec)
    if rules is None or len(extradata) <= rules.place or extradata[0] != 1:
        return None
    width = (extradata[rules.place] & 3) + 1
    return partial(_role_of_units, rules=rules, width=width)


def _role_of_units(content: bytes, *, rules: _NalRules, width: int) -> PacketRole:
    kinds = set()
    for header in _first_bytes(content, width):
        kinds.add(header >> rules.shift & rules.mask)
    return PacketRole(
        is_entry=not kinds.isdisjoint(rules.entries),
        has_parameters=not kinds.isdisjoint(rules.parameters),
    )


def _first_bytes(content: bytes, width: int) -> Iterator[int]:
    """The first byte of every unit of a packet, which follows the unit's length."""
    place = 0
    while place + width < len(content):
        length = int.from_bytes(content[place : place + width], "big")
        place += width
        yield content[place]
        place += length


def _role_in_vp9(content: bytes) -> PacketRole:
    """A shown key frame refreshes everything (VP9, 6.2)."""
    # Marker (2 bits), profile (2), in profile 3 a reserved bit, show_existing_frame, frame_type,
    # show_frame: 0, 0, 1 is a shown key frame.
    header = content[0]
    is_profile_3 = header >> 4 & 3 == 3
    flags = header >> (0 if is_profile_3 else 1) & 7
    return PacketRole(is_entry=header >> 6 == 2 and flags == 1)


def _role_in_av1(content: bytes) -> PacketRole:
    """A sequence header and a shown key frame are a random access point (AV1, 7.6)."""
    place = 0
    has_sequence = False
    while place < len(content):
        # The header of a part: its kind, whether an extension byte and the size follow.
        header = content[place]
        kind = header >> 3 & 15
        place += 2 if header & 4 else 1
        size = len(content) - place
        if header & 2:
            size, place = _leb128(content, place)
        if kind == _AV1_SEQUENCE_HEADER:
            has_sequence = True
        if kind in _AV1_FRAME_HEADERS and place < len(content):
            # show_existing_frame, frame_type (2 bits), show_frame: 0, 0, 1
            is_key = content[place] >> 4 == 1
            return PacketRole(is_entry=has_sequence and is_key)
        place += size
    return PacketRole(is_entry=False)


def _leb128(content: bytes, place: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte, and the place after it."""
    number = 0
    for shift in range(0, 56, 7):
        if place >= len(content):
            break
        byte = content[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            break
    return number, place


# ------------------------------------------------------------------ all packets of a film


@dataclass
class PacketTable:
    """The packets of a stream in their order; a tick is a timestamp in the file's unit.

    ticks       when the frame of each packet is shown
    hidden      packets whose frames an edit list leaves out
    key_frames  packets that the container marks as key frames
    entries     packets at which decoding can start
    certain     False if something speaks against reading the frames off the packets
    last        for how many ticks the frame with the last tick is shown
    """

    ticks: list[int | None] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    key_frames: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    certain: bool = True
    last: int = 0

    @property
    def first(self) -> int:
        """The packet that decoding starts with: nothing is shown before a key frame."""
        return self.key_frames[0] if self.key_frames else 0

    def shown_ticks(self) -> list[int] | None:
        """Ticks of the shown frames in their order; None if only decoding can tell."""
        if not self.certain or not self.entries or self.entries[0] != 0:
            return None
        if None in self.ticks or len(set(self.ticks)) < len(self.ticks):
            return None
        # Frames before the first entry would be left out by a decoder.
        starts = self._starts()
        if min(self.ticks) < starts[0] or starts != sorted(starts):
            return None
        shown = set(range(len(self.ticks))) - self.hidden
        return sorted(self.ticks[number] for number in shown)

    def plan(self, ticks: Iterable[int]) -> dict[int, set[int]]:
        """The entries to decode from, each with the ticks of the wanted frames after it."""
        starts = self._starts()
        found: dict[int, set[int]] = {}
        for tick in ticks:
            entry = self.entries[bisect_right(starts, tick) - 1]
            found.setdefault(entry, set()).add(tick)
        return found

    def _starts(self) -> list[int]:
        return [self.ticks[entry] for entry in self.entries]


def read_packets(container: InputContainer, stream: VideoStream) -> PacketTable:
    """Read the packets of a file. Raises ValueError if it is damaged or ends before its time."""
    table = PacketTable()
    context = stream.codec_context
    role_of = packet_roles(context.codec.canonical_name, context.extradata or b"")
    table.certain = role_of is not None
    parameters = []
    end = 0.0
    last_tick = None
    for packet in container.demux():
        # The last packet of each stream is empty.
        if not packet.size:
            continue
        end = max(end, _end_of(packet))
        if packet.stream_index != stream.index:
            continue
        number = len(table.ticks)
        tick = packet.pts
        table.ticks.append(tick)

        # What the container says.
        if packet.is_corrupt:
            raise ValueError(f"packet {number} is damaged")
        if packet.is_keyframe:
            table.key_frames.append(number)
        if packet.is_discard:
            table.hidden.add(number)
        elif tick is not None and (last_tick is None or tick > last_tick):
            last_tick = tick
            table.last = packet.duration or 0
        if packet.has_sidedata("new_extradata"):
            table.certain = False

        # What the codec says.
        if role_of is not None:
            role = role_of(bytes(packet))
            if role.is_entry:
                table.entries.append(number)
            if role.has_parameters:
                parameters.append(number)
    # Parameters must come with every entry or with none: then no packet is needed later.
    if parameters and parameters != table.entries:
        table.certain = False
    _check_end(container, stream, len(table.ticks), end)
    return table


def _end_of(packet: Packet) -> float:
    """Seconds of the file's clock at which a packet ends."""
    tick = packet.pts
    if tick is None:
        tick = packet.dts or 0
    return float((tick + (packet.duration or 0)) * packet.time_base)


def _check_end(
    container: InputContainer, stream: VideoStream, number: int, end: float
) -> None:
    """Raise ValueError if the file holds less than it says."""
    import av

    # mp4 lists its packets; the list of a fragmented file is complete when all are read.
    kind = container.format.name
    listed = len(stream.index_entries)
    if "mp4" in kind and number < listed:
        raise ValueError(f"is cut off: {number} of {listed} packets are there")

    # Others tell their duration.
    promised = 0.0
    if kind.startswith(("matroska", "flv")):
        promised = (container.duration or 0) / av.time_base
    elif kind == "avi":
        promised = float(stream.frames * stream.time_base)
    # Muxers round, and guess how long the last frame is shown.
    allowance = max(0.2, 2 / float(stream.average_rate or 1))
    if end < promised - allowance:
        raise ValueError(f"is cut off: {end:.2f} of {promised:.2f} seconds are there")
