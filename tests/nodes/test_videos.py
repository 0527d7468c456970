"""Reading videos and animations: their times, their pixels, and files that are not videos."""

from io import BytesIO
from itertools import accumulate
from pathlib import Path

import av
import comfy.model_management as host
import numpy as np
import pytest
import torch
from comfy_api.latest._input_impl import VideoFromFile
from kinoloom.nodes.data import inputs
from kinoloom.nodes.data.reading import folder, framing, sources, videos
from kinoloom.nodes.data.reading.cutting import Clip, Options, plan
from PIL import Image

from ..media import ffmpeg, lit, write_timed, write_video


def columns(source: sources.Source, indices: list[int]) -> list[int]:
    """The lit column of each frame, which shows its time in a video from `lit`."""
    return [int(frame[..., 0].mean(0).argmax()) for frame in source.frames(indices)]


def write_animation(path: Path, lengths: list[int], **options: object) -> Path:
    """Frames that last `lengths` of 50 ms, each lit at its own time."""
    starts = accumulate(lengths[:-1], initial=0)
    pictures = [Image.fromarray(lit(start)) for start in starts]
    shown = [50 * length for length in lengths]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=shown, loop=0, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_animated_picture_is_a_clip_that_keeps_its_times(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    path = write_animation(tmp_path / name, [1, 1, 4, 2, 12, 1, 3], **options)
    assert videos.is_animated(path)
    source = videos.video(path)
    assert (source.count, source.width, source.height, source.photo) == (7, 64, 64, False)
    assert columns(source, list(range(7))) == [0, 1, 2, 6, 8, 20, 21]
    assert columns(source, framing.resample(source, 20)) == [0, 1, *[2] * 4, 6, 6, *[8] * 12, 20, 21]


def test_animation_of_one_pace_has_that_frame_rate(tmp_path: Path) -> None:
    source = videos.video(write_animation(tmp_path / "a.gif", [1] * 9))
    assert (source.count, source.fps, source.times) == (9, 20, ())
    assert framing.resample(source, 10) == [0, 2, 4, 6, 8]


def test_transparency_of_an_animation_is_white(tmp_path: Path) -> None:
    pictures = [Image.new("RGBA", (16, 16), (255, 0, 255, 0)), Image.new("RGBA", (16, 16), (0, 255, 0, 255))]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    source = videos.video(tmp_path / "a.webp")
    assert source.notes == (sources.ON_WHITE,)
    clear, solid = source.frames([0, 1])
    assert clear.mean((0, 1)).tolist() == [1, 1, 1]
    assert solid.mean((0, 1)).tolist() == [0, 1, 0]


def test_transparency_of_a_video_is_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a file, and of frames in memory with a fourth colour."""
    frames = np.zeros((3, 32, 32, 4), np.uint8)
    frames[..., :3], frames[:, :, 16:, 3], frames[:, :8, :16, 3] = (250, 0, 250), 255, 51
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=8, options={"strict": "experimental"})
        stream.width = stream.height = 32
        stream.pix_fmt = "argb"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format="argb")))
        container.mux(stream.encode())
    images = torch.from_numpy(frames).float() / 255
    for pictures, video in ((None, VideoFromFile(str(path))), (images, None)):
        caplog.clear()
        [source] = inputs.clip_sources(pictures, video, 8.0)
        [frame] = source.frames([1])
        expected = {(20, 5): (1, 1, 1), (20, 20): (250 / 255, 0, 250 / 255), (2, 2): (254 / 255, 0.8, 254 / 255)}
        for place, colour in expected.items():
            assert frame[place].tolist() == pytest.approx(colour, abs=0.005), (source.name, place)
        assert caplog.text.count(sources.ON_WHITE) == 1 and source.notes == (sources.ON_WHITE,)


def test_a_solid_alpha_changes_no_bit() -> None:
    images = torch.rand(2, 8, 8, 3)
    solid = sources.from_tensor("x", torch.cat([images, torch.ones(2, 8, 8, 1)], -1), 8.0)
    assert not solid.notes and solid.digest == sources.from_tensor("x", images, 8.0).digest
    assert torch.equal(sources.over_white(torch.cat([images, torch.ones(2, 8, 8, 1)], -1)), images)


def test_pictures_that_stand_still_are_not_animated(tmp_path: Path) -> None:
    for name in ("a.gif", "a.png", "a.jpg", "a.webp", "a.bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        assert not videos.is_animated(tmp_path / name)
    pages = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    (tmp_path / "text.gif").write_text("no picture")
    assert not videos.is_animated(tmp_path / "pages.tiff")
    assert not videos.is_animated(tmp_path / "text.gif")


PATTERNS = {
    "slows": [*range(12), *range(12, 40, 2), *range(40, 61, 5)],
    "pauses": [0, 1, 2, 3, 22, 23, 24, 44, 60],
    "one gap": [*range(5), *range(30, 40)],
    "random": np.flatnonzero(np.random.default_rng(3).random(62) < 0.4).tolist(),
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("fps", [20, 16, 7, 30])
def test_frames_of_uneven_times_keep_the_speed(tmp_path: Path, suffix: str, fps: int) -> None:
    for name, times in PATTERNS.items():
        times = [time - times[0] for time in times]
        source = videos.video(write_timed(tmp_path / f"{name}.{suffix}", times))
        indices = framing.resample(source, fps)
        assert len(indices) == times[-1] * fps // 20 + 1
        assert columns(source, indices) == [times[index] for index in indices]
        for moment, index in zip(np.arange(len(indices)) * 20 / fps, indices, strict=True):
            shown = max(time for time in times if time <= moment + 10 / fps + 1e-6)  # half a frame later at most
            assert abs(times[index] - moment) <= abs(shown - moment) or times[index] == shown


def test_all_frames_of_uneven_times_are_shown_at_their_average_rate(tmp_path: Path) -> None:
    source = videos.video(write_timed(tmp_path / "a.mp4", [0, 1, 2, 3, 8, 9, 10, 20]))
    assert source.fps == pytest.approx(7)
    assert columns(source, framing.resample(source, 0)) == [0, 3, 3, 9, 10, 10, 10, 20]


def test_windows_of_uneven_times_are_cut_at_moments(tmp_path: Path) -> None:
    source = videos.video(write_timed(tmp_path / "a.mp4", PATTERNS["slows"]))
    options = Options(frames_per_clip=9, fps=10, window_mode="sliding", window_stride=8)
    planned = plan(Clip(source, None), options, 4)
    assert [columns(source, list(window)) for window in planned.windows] == [
        [0, 2, 4, 6, 8, 10, 12, 14, 16],
        [16, 18, 20, 22, 24, 26, 28, 30, 32],
        [32, 34, 36, 38, 40, 40, 45, 45, 45],
    ]


def test_video_socket_keeps_the_speed_whole_in_memory_and_trimmed(tmp_path: Path) -> None:
    times = PATTERNS["slows"]
    path = write_timed(tmp_path / "a.mp4", times)
    whole, memory = inputs.video_source(VideoFromFile(str(path))), VideoFromFile(BytesIO(path.read_bytes()))
    held = inputs.video_source(memory)
    assert columns(whole, framing.resample(whole, 10)) == columns(held, framing.resample(held, 10))
    assert len(framing.resample(whole, 10)) == 31
    for start, duration, first, last in ((0.6, 0, 12, 60), (0.6, 1.2, 12, 34), (0, 1.2, 0, 22), (-1.1, 0, 40, 60)):
        part = inputs.video_source(VideoFromFile(str(path), start_time=start, duration=duration))
        assert columns(part, [0, part.count - 1]) == [first, last]
        assert part.digest != whole.digest
        assert len(framing.resample(part, 10)) == (last - first) // 2 + 1


def test_pauses_are_no_reason_to_advise_another_frame_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    framing.resample(videos.video(write_timed(tmp_path / "a.mp4", PATTERNS["pauses"])), 16)
    assert "frames per second" not in caplog.text
    framing.resample(videos.video(write_video(tmp_path / "b.mp4", 9, fps=8)), 16)
    assert "b.mp4 has 8 frames per second" in caplog.text


def test_frames_ten_hours_apart_are_counted_without_decoding_time(tmp_path: Path) -> None:
    source = videos.video(write_timed(tmp_path / "a.mkv", [0, 36_000], unit=1000))
    assert source.count == 2
    assert len(framing.resample(source, 16)) == 16 * 36_000 + 1
    with pytest.raises(ValueError, match="is 30 hours long: expected at most 24"):
        videos.video(write_timed(tmp_path / "b.mkv", [0, 30 * 3600], unit=1000))


def test_reading_hears_cancel(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.mp4", list(range(30)))
    frames = videos.video(path).frames(range(30))
    next(frames)
    host.interrupt_current_processing()
    with pytest.raises(host.InterruptProcessingException):
        list(frames)
    host.interrupt_current_processing()
    with pytest.raises(host.InterruptProcessingException):
        videos.video(write_timed(tmp_path / "b.mp4", list(range(30))))


TEST_PICTURE = ("-f", "lavfi", "-i", "testsrc2=s=160x90:r=24:d=2", "-pix_fmt", "yuv420p")


def decoded_by_command(path: Path, source: sources.Source, *options: str) -> np.ndarray:
    raw = path.with_suffix(".raw")
    ffmpeg("-i", path, *options, "-pix_fmt", "rgb24", "-f", "rawvideo", raw)
    return np.fromfile(raw, np.uint8).reshape(-1, source.height, source.width, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b.mp4", ("-c:v", "libx264", "-x264-params", "bframes=5:b-pyramid=normal:open-gop=1:keyint=24")),
        ("b.mkv", ("-c:v", "libx264", "-bf", 3, "-output_ts_offset", 7)),
        ("b.avi", ("-c:v", "libx264", "-bf", 3)),
        ("b.mts", ("-c:v", "libx264", "-bf", 3, "-f", "mpegts")),
        ("b.webm", ("-c:v", "libvpx", "-auto-alt-ref", 1, "-lag-in-frames", 16)),
        ("b.mov", ("-c:v", "prores_ks",)),
        ("b.mpg", ("-c:v", "mpeg2video", "-bf", 2)),
    ],
)
def test_plain_video_has_the_frames_that_ffmpeg_gives(tmp_path: Path, name: str, options: tuple) -> None:
    ffmpeg(*TEST_PICTURE, *options, tmp_path / name)
    source = folder.open_source(tmp_path / name, 1.0)
    expected = decoded_by_command(tmp_path / name, source)
    assert (source.count, source.fps, source.times) == (48, 24, ())
    assert np.array_equal([(frame * 255).round().byte() for frame in source.frames(range(48))], expected)


@pytest.mark.parametrize("turn", [("-display_rotation", 90), ("-display_rotation", 270), ("-display_rotation", 180)])
@pytest.mark.parametrize("flip", [(), ("-display_hflip",), ("-display_vflip",)])
def test_turned_and_mirrored_video_is_upright(tmp_path: Path, turn: tuple, flip: tuple) -> None:
    ffmpeg(*TEST_PICTURE, "-frames:v", 2, tmp_path / "plain.mp4")
    ffmpeg(*turn, *flip, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    source = videos.video(tmp_path / "turned.mp4")
    assert (source.width, source.height) == ((160, 90) if 180 in turn else (90, 160))
    expected = decoded_by_command(tmp_path / "turned.mp4", source)
    assert np.array_equal([(frame * 255).round().byte() for frame in source.frames([0, 1])], expected)


def test_part_that_an_edit_list_hides_is_not_shown(tmp_path: Path) -> None:
    ffmpeg(*TEST_PICTURE, "-g", 48, tmp_path / "whole.mp4")
    ffmpeg("-ss", 0.5, "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")
    whole, cut = videos.video(tmp_path / "whole.mp4"), videos.video(tmp_path / "cut.mp4")
    assert (cut.count, cut.fps) == (36, 24)
    first, last = cut.frames([0, 35])
    assert all(torch.equal(*pair) for pair in zip((first, last), whole.frames([12, 47]), strict=True))


@pytest.mark.parametrize("name", ["pal.mp4", "pal.ts", "pal.mpg"])
def test_interlaced_video_of_wide_pixels_is_whole_and_square(tmp_path: Path, name: str) -> None:
    codec = ("-c:v", "mpeg2video", "-b:v", "8M") if name == "pal.mpg" else ("-c:v", "libx264", "-x264-params", "tff=1")
    moving = "color=black:s=360x288:r=50:d=1,format=yuv420p[b];color=white:s=40x288:r=50:d=1[w]"
    moving += ";[b][w]overlay=x=320*t:y=0,interlace=scan=tff,setsar=64/45"
    ffmpeg("-filter_complex", moving, *codec, "-flags", "+ilme+ildct", "-r", 25, tmp_path / name)
    source = videos.video(tmp_path / name)
    assert (source.count, source.fps, source.width, source.height) == (25, 25, 512, 288)
    rows = next(iter(source.frames([12])))[16:-16, :, 0]
    assert rows.max() > 0.9
    assert (rows[1:] - rows[:-1]).abs().mean() < 0.005  # with combs 0.02


def write_hdr(path: Path, colour: tuple[int, int, int], transfer: str) -> Path:
    """A clip of an sRGB colour, in BT.2020 with white at 203 nits."""
    light = np.array(colour) / 255
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    light = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]) @ light
    if transfer == "arib-std-b67":
        scene = 0.265 * light
        high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)
    else:
        power = (203 / 10000 * light) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    raw = path.with_suffix(".raw")
    np.tile((signal * 65535).round().astype(np.uint16), (4, 64, 64, 1)).tofile(raw)
    wide = f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    scaled = f"scale=out_color_matrix=bt2020:out_range=tv,format=yuv420p10le,{wide}"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "64x64", "-i", raw, "-vf", scaled, "-c:v", "libx265", path)
    return path


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_hdr_is_brought_to_the_standard_range_and_said_once(
    tmp_path: Path, transfer: str, caplog: pytest.LogCaptureFixture
) -> None:
    for colour in ((200, 60, 40), (30, 90, 180), (120, 120, 120), (8, 8, 8)):
        source = videos.video(write_hdr(tmp_path / f"{colour[0]}.mp4", colour, transfer))
        for frame in source.frames([0, 3]):
            assert ((frame.mean((0, 1)) * 255) - torch.tensor(colour)).abs().max() < 6  # 10 bits
    white = videos.video(write_hdr(tmp_path / "white.mp4", (255, 255, 255), transfer))
    assert 235 < next(iter(white.frames([0]))).min() * 255 < 255
    assert white.notes[0].startswith("HDR (")
    inputs.clip_sources(None, VideoFromFile(str(tmp_path / "white.mp4")), 16.0)
    assert caplog.text.count("white.mp4: HDR (") == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.flv"])
def test_video_that_lost_its_end_is_refused_with_both_numbers(tmp_path: Path, name: str) -> None:
    ffmpeg(*TEST_PICTURE, "-c:v", "libx264", "-g", 6, "-movflags", "+faststart", tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 7 // 10])
    with pytest.raises(ValueError, match=r"gives \d+ of the 48 frames it promises: it is damaged"):
        folder.open_source(tmp_path / name, 1.0)


def test_video_with_damage_inside_is_refused_with_both_numbers_where_it_is_used(tmp_path: Path) -> None:
    ffmpeg(*TEST_PICTURE, "-c:v", "libx264", "-g", 6, "-movflags", "+faststart", tmp_path / "a.mp4")
    damaged = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 3000] = bytes(3000)
    (tmp_path / "a.mp4").write_bytes(damaged)
    source = videos.video(tmp_path / "a.mp4")
    assert len(list(source.frames(range(6)))) == 6
    with pytest.raises(ValueError, match=r"a\.mp4 gives \d+ of the 48 frames it promises"):
        list(source.frames(range(48)))


def test_sound_and_its_cover_are_no_video(tmp_path: Path) -> None:
    cover, sound, video = tmp_path / "cover.png", tmp_path / "sound.mp4", write_video(tmp_path / "v.mp4", 5)
    Image.new("RGB", (200, 200), "red").save(cover)
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", sound)
    with_cover = ("-i", cover, "-map", 0, "-map", 1, "-c", "copy")
    ffmpeg("-i", sound, *with_cover, "-disposition:v:0", "attached_pic", tmp_path / "covered.mp4")
    ffmpeg("-i", video, *with_cover, "-disposition:v:1", "attached_pic", tmp_path / "both.mp4")
    for name in ("sound.mp4", "covered.mp4"):
        with pytest.raises(ValueError, match="holds no video"):
            videos.video(tmp_path / name)
    assert videos.video(tmp_path / "both.mp4").count == 5


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {name}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "text": "only a text\n" * 100,
    "empty": "",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_playlist_or_text_with_a_video_s_name_opens_nothing(tmp_path: Path, kind: str, suffix: str) -> None:
    other = write_video(tmp_path / f"other.{suffix}", 20)
    path = tmp_path / f"list.{suffix}"
    path.write_text(PLAYLISTS[kind].format(other=other, name=other.name))
    with pytest.raises(ValueError, match="not a readable video"):
        videos.video(path)
    with pytest.raises(ValueError, match=rf"^list\.{suffix}: not a readable video"):
        inputs.video_source(VideoFromFile(str(path)))
