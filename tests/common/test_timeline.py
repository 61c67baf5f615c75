"""When frames are shown, by hand; which packets are entries, by bytes made from the standards."""

from __future__ import annotations

import pytest

from common.packets import PacketTable, packet_roles
from common.timeline import measure


def measured(ticks, *, last=0, tick=0.001, claims=(24.0,)):
    return measure(ticks, last=last, tick=tick, claims=claims)


def test_measure_takes_a_claim_that_fits_rounded_times():
    # 24 a second, in whole milliseconds, from 5 s on
    found = measured([5000, 5042, 5083, 5125, 5167])
    assert (found.fps, found.starts) == (24.0, None)
    assert found.duration == pytest.approx(5 / 24)
    assert [found.place_of(k) for k in range(5)] == [0, 1, 2, 3, 4]


def test_measure_takes_the_mean_of_a_wrong_claim():
    # 0, 100, ..., 900 ms and the last as long as the one before it: 10 frames in a second
    found = measured(range(0, 1000, 100))
    assert found.fps == pytest.approx(10.0)
    assert found.starts is None
    # 8 ms of lateness still mean a constant rate.
    late = measured([0, 108, 200, 300, 408, 500])
    assert late.starts is None


def test_measure_of_a_variable_rate_shows_by_time():
    # a frame for a second, then four of 250 ms: 5 in 2 s are 2.5 a second
    found = measured([0, 1000, 1250, 1500, 1750])
    assert (found.fps, found.duration) == (2.5, 2.0)
    # at 0, 0.4, 0.8, 1.2 and 1.6 s
    assert [found.place_of(k) for k in range(5)] == [0, 0, 0, 1, 3]
    assert [found.place_at(s) for s in (0.0, 0.999, 1.0, 1.3, 9.0)] == [0, 1, 1, 2, 4]


def test_measure_counts_a_last_frame_that_stays():
    # three frames of 100 ms, of which the last stays for 1.8 s
    found = measured([0, 100, 200], last=1800, claims=(10.0,))
    assert found.fps == pytest.approx(1.5)
    assert [found.place_of(k) for k in range(3)] == [0, 2, 2]


@pytest.mark.parametrize("ticks", [[None, None], [0, None], [10, 0], [0, 0]])
def test_measure_without_usable_times_takes_the_codecs_rate(ticks):
    found = measured(ticks, claims=(25.0, 8.0))
    assert (found.count, found.fps, found.duration) == (2, 8.0, 0.25)
    assert measured(ticks, claims=(0.0,)).fps == 25.0


def test_measure_of_one_frame_has_a_rate():
    assert measured([77], claims=(8.0,)).fps == 8.0
    assert measured([77], claims=()).fps == 25.0


# ------------------------------------------------------------------ entries

AVCC = bytes([1, 100, 0, 30, 0xFF])
HVCC = bytes([1] + [0] * 20 + [3])


def units(*kinds: int) -> bytes:
    """NAL units of five bytes, each after its length in four bytes."""
    return b"".join(bytes([0, 0, 0, 5, kind, 1, 2, 3, 4]) for kind in kinds)


@pytest.mark.parametrize(
    ("codec", "extradata", "content", "is_entry"),
    [
        # H.264: the kind is in the low 5 bits. SEI, IDR; SEI, slice of a P picture
        ("h264", AVCC, units(0x06, 0x65), True),
        ("h264", AVCC, units(0x06, 0x41), False),
        # HEVC: in bits 1 to 6. IDR_W_RADL 19, CRA 21, TRAIL_R 1
        ("hevc", HVCC, units(19 << 1), True),
        ("hevc", HVCC, units(21 << 1), True),
        ("hevc", HVCC, units(1 << 1), False),
        # VP9: 10 marker, 00 profile, 0 existing, 0 key frame, 1 shown
        ("vp9", b"", bytes([0b10000010]), True),
        ("vp9", b"", bytes([0b10000110]), False),
        ("vp9", b"", bytes([0b10000000]), False),
        # profile 3 has a bit more
        ("vp9", b"", bytes([0b10110001]), True),
        ("vp9", b"", bytes([0b10110011]), False),
        # AV1: temporal delimiter, sequence header of two bytes, frame: 0 existing, 00 key, 1 shown
        ("av1", b"", bytes([0x12, 0, 0x0A, 2, 9, 9, 0x32, 1, 0b00010000]), True),
        ("av1", b"", bytes([0x12, 0, 0x0A, 2, 9, 9, 0x32, 1, 0b00110000]), False),
        ("av1", b"", bytes([0x12, 0, 0x32, 1, 0b00010000]), False),
    ],
)
def test_packet_roles_tell_entries(codec, extradata, content, is_entry):
    assert packet_roles(codec, extradata)(content).is_entry is is_entry


def test_packet_roles_tell_parameters():
    role = packet_roles("h264", AVCC)
    assert role(units(0x67, 0x68, 0x65)).has_parameters
    assert not role(units(0x65)).has_parameters


@pytest.mark.parametrize(
    ("codec", "extradata"),
    [("mpeg4", b""), ("h264", b""), ("h264", b"\0\0\0\1gggg"), ("vp8", b"")],
)
def test_packet_roles_without_certainty_are_none(codec, extradata):
    assert packet_roles(codec, extradata) is None


def table(ticks, entries, **more) -> PacketTable:
    return PacketTable(ticks=ticks, key_frames=entries, entries=entries, **more)


def test_packet_table_plans_from_the_last_entry():
    packets = table([0, 2, 1, 3, 5, 4], [0, 3])
    assert packets.shown_ticks() == [0, 1, 2, 3, 4, 5]
    assert packets.plan([1, 3, 4]) == {0: {1}, 3: {3, 4}}
    hidden = table([-2, -1, 0, 1], [0, 2], hidden={0, 1})
    assert hidden.shown_ticks() == [0, 1]


@pytest.mark.parametrize(
    "packets",
    [
        table([0, 1], []),
        table([0, 1], [1]),
        # a frame that is shown before the first key frame
        table([2, 1, 3], [0]),
        table([0, None], [0]),
        table([0, 1, 1], [0]),
        table([0, 1], [0], certain=False),
    ],
)
def test_packet_table_that_does_not_tell_the_frames(packets):
    assert packets.shown_ticks() is None
