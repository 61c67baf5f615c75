"""Odd films for the tests of the reader, and what ffmpeg's own decoder shows of each.

The scene: frame i is grey of 10 + 5 i with a ramp to the right and down, and has a coloured square
in each corner, so that a frame tells its number and which way up it is.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

CORNER = 16
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


@functools.cache
def ffmpeg() -> str:
    """The path of an ffmpeg; skips the test where there is none."""
    imageio_ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason="needs the ffmpeg binary of imageio-ffmpeg"
    )
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        found = shutil.which("ffmpeg")
    if found is None:
        pytest.skip("needs an ffmpeg binary")
    return found


@dataclass(frozen=True)
class FilmCase:
    """A film: the options that encode the scene, and those of each copy of a copy.

    A copy's options hold -i {}, the file before it. ``between`` is the format of the files before
    the last, ``shown`` the stream that a player chooses, ``slow`` an encoder that takes its time.
    """

    name: str
    encode: str
    copies: tuple[str, ...] = ()
    between: str = ""
    rate: str = "24"
    width: int = 96
    height: int = 64
    count: int = 24
    shown: str = "v:0"
    slow: bool = False

    def make(self, folder: Path) -> Path:
        """Write the film."""
        target = folder / self.name
        between = self.between or target.suffix[1:]
        files = [folder / f"before{i}.{between}" for i in range(len(self.copies))]
        files.append(target)
        raw = f"-f rawvideo -pix_fmt rgb24 -s {self.width}x{self.height} -r {self.rate}"
        pixels = scene(self.count, self.height, self.width).tobytes()
        words = [*raw.split(), "-i", "-", *self.encode.split(), f"file:{files[0]}"]
        run_ffmpeg(words, pixels)
        for options, before, after in zip(self.copies, files, files[1:], strict=False):
            words = [word.replace("{}", f"file:{before}") for word in options.split()]
            run_ffmpeg([*words, f"file:{after}"])
        return target


def scene(count: int, height: int, width: int) -> np.ndarray:
    """Frames of the scene, uint8 (T, Y, X, 3)."""
    grey_T = 10 + 5 * np.arange(count)
    ramp_YX = np.add.outer(np.arange(height), np.arange(width)) * 60 / (height + width)
    video_TYX = grey_T[:, None, None] + ramp_YX
    video = np.repeat(video_TYX[..., None], 3, axis=3)
    corners = [
        (slice(0, CORNER), slice(0, CORNER)),
        (slice(0, CORNER), slice(width - CORNER, width)),
        (slice(height - CORNER, height), slice(0, CORNER)),
        (slice(height - CORNER, height), slice(width - CORNER, width)),
    ]
    for (rows, columns), colour in zip(corners, COLOURS, strict=True):
        video[:, rows, columns] = colour
    return video.round().astype(np.uint8)


def run_ffmpeg(
    words: list[str], given: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg with some bytes as its input."""
    command = [ffmpeg(), "-y", "-hide_banner", "-nostats", "-threads", "1", *words]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done


@dataclass(frozen=True)
class ShownFilm:
    """What a player shows: uint8 frames (T, Y, X, 3), and their times from the first."""

    frames: np.ndarray
    times: np.ndarray


def show(path: Path, shown: str = "v:0") -> ShownFilm:
    """Decode a film with ffmpeg: turned upright, with square pixels, every frame once."""
    words = ["-i", f"file:{path}", "-map", f"0:{shown}", "-fps_mode", "passthrough"]
    words += ["-vf", "scale=iw*sar:ih,setsar=1,format=rgb24,showinfo=checksum=0"]
    done = run_ffmpeg([*words, "-f", "rawvideo", "-"])
    log = done.stderr.decode(errors="replace")
    times = [float(t) for t in re.findall(r"pts_time:\s*([-\d.e+]+)", log)]
    width, height = map(int, re.findall(r" s:(\d+)x(\d+) ", log)[0])
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    times = np.array(times[: len(frames)])
    return ShownFilm(frames, times - times[0])


def difference(found: np.ndarray, want: np.ndarray) -> float:
    """The largest difference of the means of 8 x 8 pixels."""
    assert found.shape == want.shape

    def means(video: np.ndarray) -> np.ndarray:
        rows = video.shape[1] // 8 * 8
        columns = video.shape[2] // 8 * 8
        blocks = video[:, :rows, :columns].astype(np.float32)
        blocks = blocks.reshape(len(video), rows // 8, 8, columns // 8, 8, 3)
        return blocks.mean((2, 4))

    return float(np.abs(means(found) - means(want)).max())


# Options that several films share.
SHARED = {
    "h264": "-c:v libx264 -g 12 -crf 4 -pix_fmt yuv420p",
    "x264": "-c:v libx264 -crf 4",
    "x265": "-c:v libx265 -crf 4",
    "mpeg2": "-c:v mpeg2video -g 12 -bf 2 -q:v 2",
    "vp9": "-c:v libvpx-vp9 -g 12 -crf 4 -b:v 0 -cpu-used 8",
    "copy": "-i {} -c copy",
    # Half of the later frames, as a screen recorder leaves them out.
    "uneven": "-vf select='lt(n,12)+not(mod(n,4))' <ms>",
    "jitter": "-vf settb=1/1000,setpts='PTS+4*mod(N,3)' <ms>",
    "ms": "-fps_mode passthrough -enc_time_base 1/1000",
    # Two pictures, of which the second is the one to show.
    "two": "-i {} -map 0 -map 0 -c:v:1 copy -c:v:0 libx264 -filter:v:0 negate <default>",
    "default": "-disposition:v:0 0 -disposition:v:1 default",
    "cover": "-i {} <still> -map 1:v -map 0:v -c:v:0 mjpeg -c:v:1 copy <attached>",
    "still": "-f lavfi -i testsrc2=s=200x200:d=0.04",
    "attached": "-disposition:v:0 attached_pic",
    "silence": "-f lavfi -t 3 -i anullsrc -map 0:v -map 1:a -c:v copy -c:a aac",
    "sound_first": "-f lavfi -t 3 -i sine -i {} -map 0:a -map 1:v -c:v copy -c:a aac",
    "bt709": "-colorspace bt709 -color_primaries bt709 -color_trc bt709",
    "hdr": "-colorspace bt2020nc -color_primaries bt2020 -color_trc smpte2084",
    "half": "colorchannelmixer=aa=0.5",
}
# A film a line: name | options of the encoder | options of each copy | fields of `FilmCase`.
# The films of a group with a star are slow tests.
TABLE = """
# containers
plain.mp4 | <h264>
plain.mov | <h264>
plain.mkv | <h264>
plain.flv | <h264>
plain.avi | -c:v mpeg4 -q:v 2 -g 12
h264_b_frames.avi | <h264>
plain.ts | <h264>
plain.mpg | <mpeg2>
plain.ogv | -c:v libtheora -q:v 10
plain.h264 | <h264>
plain.hevc | <x265>
fragmented.mp4 | <h264> -movflags frag_keyframe+empty_moov
index_first.mp4 | <h264> -movflags +faststart
live.mkv | <h264> -live 1
live.webm | <vp9> -live 1
# rarer containers *
plain.m4v | <h264>
plain.3gp | <h264>
h264.avi | <h264> -bf 0
plain.m2ts | <h264>
plain.vob | <mpeg2>
plain.mxf | <mpeg2>
plain.nut | <h264>
plain.asf | -c:v wmv2 -q:v 2
plain.wmv | -c:v msmpeg4 -q:v 2
plain.gif | -vf format=gray
plain.y4m | -pix_fmt yuv420p
plain.ivf | <vp9>
# codecs *
hevc.mp4 | <x265> -x265-params keyint=12
hevc_open.mp4 | <x265> -x265-params keyint=8:min-keyint=8:open-gop=1
vp8.webm | -c:v libvpx -crf 4 -b:v 2M -auto-alt-ref 1 -lag-in-frames 8 -cpu-used 8
vp9.webm | <vp9>
vp9.mp4 | <vp9> -auto-alt-ref 1 -lag-in-frames 12
av1.mp4 | -c:v libsvtav1 -crf 8 -preset 12 -g 12 -svtav1-params lp=1
av1.mkv | -c:v libaom-av1 -crf 8 -cpu-used 8 -g 12
vvc.mp4 | -c:v libvvenc -preset faster -qp 12 | | count=9
mpeg1.mpg | -c:v mpeg1video -q:v 2 -g 12
mpeg4.mp4 | -c:v mpeg4 -q:v 2 -bf 2 -g 12
xvid.avi | -c:v libxvid -q:v 2 -bf 2 -g 12
mjpeg.avi | -c:v mjpeg -q:v 2
mjpeg.mov | -c:v mjpeg -q:v 2
prores.mov | -c:v prores_ks
ffv1.mkv | -c:v ffv1 -g 12
huffyuv.avi | -c:v huffyuv
utvideo.avi | -c:v utvideo
raw.avi | -c:v rawvideo -pix_fmt bgr24
raw.mkv | -c:v rawvideo -pix_fmt yuv420p
png.mov | -c:v png
qtrle.mov | -c:v qtrle -g 12
cinepak.avi | -c:v cinepak | | count=6
flv1.flv | -c:v flv1 -q:v 2
apng.apng | -f apng
intra_refresh.mp4 | <h264> -x264-params intra-refresh=1:keyint=12:bframes=0
open_gop.mp4 | <h264> -x264-params open-gop=1:keyint=8:min-keyint=8:bframes=3
repeated_headers.mkv | <h264> -x264-params repeat-headers=1
slices.mp4 | <h264> -x264-params slices=4
# turned and mirrored
rot90.mp4 | <h264> | -display_rotation 90 <copy>
rot180.mp4 | <h264> | -display_rotation 180 <copy>
rot270.mp4 | <h264> | -display_rotation 270 <copy>
rot90.mov | <h264> | -display_rotation 90 <copy>
rot90.mkv | <h264> | -display_rotation 90 <copy>
hflip.mp4 | <h264> | -display_hflip <copy>
vflip.mp4 | <h264> | -display_vflip <copy>
rot90_hflip.mp4 | <h264> | -display_rotation 90 -display_hflip <copy>
rot270_hflip.mp4 | <h264> | -display_rotation 270 -display_hflip <copy>
rot90_cut.mp4 | <h264> | -display_rotation 90 -ss 0.25 <copy>
rot90_in_the_codec.mp4 | <h264> | <copy> -bsf:v h264_metadata=rotate=90
# pixels that are not square
sar2.mp4 | -vf setsar=2 <h264>
sar1_2.mp4 | -vf setsar=1/2 <h264>
sar4_3.mp4 | -vf setsar=4/3 <h264>
sar10_11.mp4 | -vf setsar=10/11 <h264>
sar2.mkv | -vf setsar=2 <h264>
sar2.ts | -vf setsar=2 <h264>
sar2.mpg | -vf setsar=2 <mpeg2>
sar2.webm | -vf setsar=2 <vp9>
sar2_rot90.mp4 | -vf setsar=2 <h264> | -display_rotation 90 <copy>
# rates *
rate1.mp4 | <h264> | | rate=1
rate10.mp4 | <h264> | | rate=10
rate23_976.mp4 | <h264> | | rate=24000/1001
rate60.mp4 | <h264> | | rate=60
rate23_976.mkv | <h264> | | rate=24000/1001
rate29_97.flv | <h264> | | rate=30000/1001
uneven.mp4 | <uneven> <h264>
uneven.mkv | <uneven> <h264>
uneven.webm | <uneven> <vp9>
uneven.ts | <uneven> <h264>
jitter.mp4 | <jitter> <h264>
# where time starts, and what is left out
late.mkv | <h264> | <copy> -output_ts_offset 5
late.ts | <h264> | <copy> -output_ts_offset 5
late.mp4 | <h264> | -itsoffset 2 -i {} <silence>
cut.mp4 | <h264> | -ss 0.3 <copy>
cut.mov | <h264> | -ss 0.3 <copy>
cut_twice.mp4 | <h264> | -ss 0.3 <copy> ; -ss 0.2 -t 0.3 <copy>
cut_hevc.mp4 | <x265> -x265-params keyint=12 | -ss 0.7 <copy>
cut.ts | <h264> | -ss 0.3 <copy> | between=mp4
cut.mkv | <h264> | -ss 0.3 <copy> | between=mp4
without_start.ts | <h264> | <copy> -ss 0.2 -copyinkf
without_start.mkv | <h264> | <copy> -ss 0.2 -copyinkf
# several streams
sound.mp4 | <h264> | -i {} <silence>
sound.mkv | <h264> | <sound_first>
two_pictures.mp4 | <h264> | <two> | shown=v:1
two_pictures.mkv | <h264> | <two> | shown=v:1
cover.mp4 | <h264> | <cover>
# colours *
yuv422p.mp4 | <x264> -pix_fmt yuv422p
yuv444p.mp4 | <x264> -pix_fmt yuv444p
yuv420p10.mp4 | <x264> -pix_fmt yuv420p10le
hevc10.mp4 | <x265> -pix_fmt yuv420p10le
vp9_444_12.webm | <vp9> -pix_fmt yuv444p12le
full_range.mp4 | -vf scale=out_range=full <h264> -color_range pc
yuvj420p.mp4 | <x264> -pix_fmt yuvj420p
gray.mkv | -c:v ffv1 -pix_fmt gray
gray.mp4 | <x264> -pix_fmt gray
gray10.mkv | -c:v ffv1 -pix_fmt gray10le
rgb.mp4 | -c:v libx264rgb -crf 4 -pix_fmt rgb24
gbrp.mkv | -c:v ffv1 -pix_fmt gbrp
rgba.mov | -vf format=rgba,<half> -c:v png
yuva.mov | -vf format=yuva444p10le,<half> -c:v prores_ks -profile:v 4
bt709.mp4 | -vf scale=out_color_matrix=bt709 <h264> <bt709>
hdr.mp4 | -vf scale=out_color_matrix=bt2020 <x265> -pix_fmt yuv420p10le <hdr>
smpte240m.mp4 | -vf scale=out_color_matrix=smpte240m <h264> -colorspace smpte240m
# interlaced *
interlaced.mp4 | <h264> -x264-params tff=1
interlaced.ts | <h264> -x264-params bff=1
interlaced.mpg | <mpeg2> -flags +ilme+ildct
# sizes, names and lengths
odd.mp4 | <x264> -pix_fmt yuv444p | | width=95 height=63
odd.webm | <vp9> | | width=95 height=63
narrow.mp4 | <h264> | | width=34 height=130
colon:a.mp4 | <h264>
50% #1?.mp4 | <h264>
ä 中.mp4 | <h264>
one_frame.mp4 | <h264> | | count=1
two_frames.mkv | <h264> | | count=2
long.mp4 | <h264> | | count=48
"""


def _case(line: str, *, slow: bool) -> FilmCase:
    """Read a line of the table."""
    while "<" in line:
        for name, options in SHARED.items():
            line = line.replace(f"<{name}>", options)
    cells = [cell.strip() for cell in line.split("|")]
    name, encode, copies, words = (*cells, "", "")[:4]
    fields: dict[str, str | int] = {}
    for word in words.split():
        key, _, value = word.partition("=")
        fields[key] = int(value) if key in ("count", "width", "height") else value
    steps = tuple(step.strip() for step in copies.split(";") if step)
    return FilmCase(name, encode, steps, slow=slow, **fields)


def _cases() -> list[FilmCase]:
    cases = []
    slow = False
    for line in TABLE.strip().splitlines():
        if line.startswith("#"):
            slow = line.endswith("*")
        else:
            cases.append(_case(line, slow=slow))
    return cases


CASES = _cases()
