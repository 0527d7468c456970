"""A folder of clips: which files are used, which are named as not used, and captions in all their places."""

import csv
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np
import pytest
from kinoloom.nodes.data.reading import captions, folder
from kinoloom.nodes.data.reading.cutting import ClipPlan, Options
from kinoloom.nodes.data.reading.folder import Reading, plan_folder
from PIL import Image

from ..media import write_image, write_video

OPTIONS = Options(frames_per_clip=5, size=64, single_frames=0)


def read(root: Path, options: Options = OPTIONS, **reading: Any) -> tuple[list[ClipPlan], list[str]]:
    return plan_folder(root, "set", Reading(16.0, **reading), options, 4)


def names(plans: list[ClipPlan]) -> list[str]:
    return [planned.clip.source.name for planned in plans]


def texts(plans: list[ClipPlan]) -> dict[str, str]:
    return {planned.clip.source.name: planned.clip.captions.motion for planned in plans}


def write(path: Path, text: str = "a caption") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def photo(path: Path, caption: str | None = "a photo") -> Path:
    write_image(path, 99)
    if caption:
        write(path.with_suffix(".txt"), caption)
    return path


def test_what_is_not_used_is_named_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    photo(root / "a.jpg")
    for name in ("a.heic", "scan.pdf", "README", "old.txt", ".DS_Store", "Thumbs.db", "a.json"):
        write(root / name)
    photo(root / "more" / "b.png")
    write_video(root / "deep" / "deeper" / "c.mp4", 5)
    (root / "empty").mkdir()
    for number in range(5):
        write_image(root / "walk" / f"{number}.png", number)
    write(root / "walk" / "caption.txt"), write(root / "walk" / "notes.md"), write(root / "walk" / "film.mp4")
    with caplog.at_level(logging.WARNING):
        plans, lines = read(tmp_path)
    assert names(plans) == ["a.jpg", "walk"]
    assert sorted(lines) == [
        "not used, .heic is not read: save photos as PNG or JPEG, videos as MP4: a.heic",
        "not used, .pdf is not read: save photos as PNG or JPEG, videos as MP4: scan.pdf",
        "not used, a file without suffix is not read: save photos as PNG or JPEG, videos as MP4: README",
        "not used, a folder of photos with captions of their own: choose it as a folder of its own, and join both with "
        "Combine Training Data: more",
        "not used, a folder with clips in it: choose it as a folder of its own, and join both with Combine Training "
        "Data: deep",
        "not used, a folder without clips: empty",
        "not used, no clip has this name: old.txt",
        "not used, no frame of the clip it lies in: walk/film.mp4, walk/notes.md",
    ]
    (record,) = [record for record in caplog.records if "not used" in record.message]
    assert all(line in record.message for line in lines)


@pytest.mark.parametrize("written", ["b.txt", "b.heic.txt", "b.caption", "b.motion.txt", "metadata.jsonl"])
def test_a_file_with_a_caption_of_its_own_is_not_left_out(tmp_path: Path, written: str) -> None:
    photo(tmp_path / "set" / "a.jpg")
    write(tmp_path / "set" / "b.heic")
    write(tmp_path / "set" / written, json.dumps({"file_name": "b.heic", "text": "b"}))
    with pytest.raises(ValueError, match=r"\n- b\.heic: \.heic is not read: save photos as PNG or JPEG"):
        read(tmp_path)


def test_a_mask_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    photo(tmp_path / "set" / "a.jpg")
    write(tmp_path / "set" / "a.mask.heic")
    with pytest.raises(ValueError, match=r"\n- a\.mask\.heic: \.heic is not read"):
        read(tmp_path)


def test_nothing_left_says_what_was_found(tmp_path: Path) -> None:
    photo(tmp_path / "set" / "deeper" / "a.jpg")
    write(tmp_path / "set" / "b.heic")
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert "holds no videos, photos or folders of frames" in str(caught.value)
    assert "deeper" in str(caught.value) and "b.heic" in str(caught.value)


def test_svd_s_folder_names_the_same_files_and_takes_tracklets(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_video(root / "a.mp4", 5)
    for name in ("a.json", "a.csv", "a.txt", "b.json", "c.heic", "c.txt"):
        write(root / name)
    with pytest.raises(ValueError, match=r"c\.heic"):
        read(tmp_path, captioned=False)
    (root / "c.txt").unlink()
    plans, lines = read(tmp_path, captioned=False)
    assert names(plans) == ["a.mp4"] and [line.rsplit(": ", 1)[1] for line in lines] == ["b.json", "c.heic"]


def test_kinds_that_pillow_and_ffmpeg_read_are_read(tmp_path: Path) -> None:
    root, picture = tmp_path / "set", Image.new("RGB", (64, 48), "red")
    stills = ["a.avif", "b.jfif", "c.webp", "d.gif", "e.tif", "f.bmp", "g.jp2", "h.JPEG", "i.ppm"]
    for name in stills:
        picture.save(root.mkdir(exist_ok=True) or root / name, format="JPEG" if name == "b.jfif" else None)
        write(root / f"{name}.txt")
    for name in ("j.mts", "k.m2ts", "l.3gp", "m.ts", "n.MP4"):
        write_video(root / f"{name}.mp4", 5).rename(root / name)
        write(root / f"{name}.txt")
    frames = [Image.new("RGB", (64, 48), (9 * i, 0, 0)) for i in range(9)]
    for name in ("o.webp", "p.png", "q.gif"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:], duration=62)
        write(root / f"{name}.txt")
    plans, lines = read(tmp_path)
    assert not lines
    assert [planned.clip.source.name for planned in plans if planned.clip.source.photo] == stills
    assert [p.clip.source.name[0] for p in plans if not p.clip.source.photo] == list("jklmnopq")


def test_captions_in_all_their_places(tmp_path: Path) -> None:
    root = tmp_path / "set"
    photo(root / "a.jpg", "beside")
    photo(root / "b.jpg", None)
    write(root / "b.caption", " caption\n")
    photo(root / "c.jpg", None), photo(root / "c.png", None)
    write(root / "c.jpg.txt", "the photo"), write(root / "c.png.caption", "the picture")
    plans, lines = read(tmp_path)
    assert texts(plans) == {"a.jpg": "beside", "b.jpg": "caption", "c.jpg": "the photo", "c.png": "the picture"}
    assert not lines
    write(root / "a.caption", "beside\n")
    assert texts(read(tmp_path)[0])["a.jpg"] == "beside"
    write(root / "a.caption", "something else")
    with pytest.raises(ValueError, match=r"a\.jpg: has captions that differ: a\.txt, a\.caption"):
        read(tmp_path)


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
        else:
            file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize(("file", "text"), [("file_name", "text"), ("video", "prompt")])
def test_one_table_has_all_captions(tmp_path: Path, table: str, file: str, text: str) -> None:
    root = tmp_path / "set"
    photo(root / "a.jpg", None), write_video(root / "b.mp4", 5)
    for number in range(5):
        write_image(root / "walk" / f"{number}.png", number)
    rows = [{file: "./a.jpg", text: 'a "photo", red\nand blue', "width": "64"}, {file: "b.mp4", text: " a clip "}]
    write_table(root / table, [*rows, {file: "walk", text: "a walk"}, {file: "gone.mp4", text: "gone"}])
    plans, lines = read(tmp_path)
    assert texts(plans) == {"a.jpg": 'a "photo", red\nand blue', "b.mp4": "a clip", "walk": "a walk"}
    assert lines == ["not used, in the folder's metadata, but no such file: gone.mp4"]
    write(root / "b.txt", "another")
    with pytest.raises(ValueError, match=r"b\.mp4: has captions that differ: b\.txt, metadata"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a"}\n{"file_name": "a.jpg"', r"metadata\.jsonl, line 2: "),
        ("metadata.jsonl", '{"file_name": "a.jpg"}', r"line 1: expected file_name or video, and text or prompt"),
        ("metadata.jsonl", '["a.jpg", "a"]', r"line 1: expected file_name or video"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 3}', r"line 1: expected file_name or video"),
        ("metadata.jsonl", "[" * 100_000, r"metadata\.jsonl, line 1: "),
        ("metadata.jsonl", '{"video": "a.jpg", "text": "a"}\n{"video": "a.jpg", "text": "b"}', r"line 2: .* a\.jpg"),
        ("metadata.csv", "file_name;text\na.jpg;a\n", r"metadata\.csv, line 2: expected file_name or video"),
        ("metadata.csv", "file_name,text\na.jpg\n", r"metadata\.csv, line 2: expected file_name or video"),
        ("metadata.csv", b"file_name,text\na.jpg,M\xe4dchen\n", r"metadata\.csv is not UTF-8"),
        ("metadata.jsonl", '{"video": "more/b.png", "text": "b"}', r"more/b\.png: has a caption in the folder's"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    photo(tmp_path / "set" / "a.jpg"), photo(tmp_path / "set" / "more" / "b.png")
    (tmp_path / "set" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason):
        read(tmp_path)


def test_two_tables_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "set" / "a.jpg")
    write(tmp_path / "set" / "metadata.csv"), write(tmp_path / "set" / "metadata.jsonl")
    with pytest.raises(ValueError, match="holds both metadata.jsonl and metadata.csv: keep one"):
        read(tmp_path)


def test_transparency_is_said_once_and_may_be_the_mask(tmp_path: Path) -> None:
    root, picture = tmp_path / "set", Image.new("RGBA", (64, 64), "red")
    picture.putalpha(Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 32, 0).repeat(64, 1)))
    for name in ("a.png", "b.png", "c.png"):
        picture.save(root.mkdir(exist_ok=True) or root / name), write(root / name.replace("png", "txt"))
    photo(root / "d.jpg")
    write_image(root / "c.mask.png", 255, (64, 64))
    plans, lines = read(tmp_path)
    assert len(lines) == 1 and lines[0].endswith("a.png, b.png, c.png") and "white" in lines[0]
    assert [bool(planned.clip.mask) for planned in plans] == [False, False, True, False]
    chosen, _ = read(tmp_path, alpha_as_mask=True)
    assert [bool(planned.clip.mask) for planned in chosen] == [True, True, True, False]
    (mask,), (pixels,) = chosen[0].clip.mask.frames([0]), chosen[0].clip.source.frames([0])
    assert (mask[0].max(), mask[-1].min()) == (0, 1)
    assert pixels[0, 0].tolist() == [1, 1, 1] and pixels[-1, 0].tolist() == [1, 0, 0]
    assert chosen[2].clip.mask.name == "c.mask.png"
    assert chosen[0].clip.source.digest == plans[0].clip.source.digest != chosen[0].clip.mask.digest


def test_frames_may_have_their_transparency_as_mask(tmp_path: Path) -> None:
    for number in range(5):
        picture = Image.new("LA", (64, 64), (99, 255 if number < 3 else 0))
        path = tmp_path / "set" / "walk" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    write(tmp_path / "set" / "walk.txt")
    (planned,), _ = read(tmp_path, alpha_as_mask=True)
    assert [frame.mean() for frame in planned.clip.mask.frames(range(5))] == [1, 1, 1, 0, 0]


def test_masks_of_16_bits_and_of_palettes_and_with_transparency(tmp_path: Path) -> None:
    def mask(name: str, picture: Image.Image) -> list[int]:
        photo(tmp_path / "set" / f"{name}.jpg")
        path = tmp_path / "set" / f"{name}.mask.png"
        picture.resize((64, 48), Image.Resampling.NEAREST).save(path)
        (planned,) = [p for p in read(tmp_path)[0] if p.clip.source.name == f"{name}.jpg"]
        (frame,) = planned.clip.mask.frames([0])
        return (frame[0, [0, -1], 0] * 255).round().int().tolist()

    assert mask("deep", Image.fromarray(np.array([[12000, 65535]], np.uint16))) == [47, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert mask("palette", palette) == [255, 0]
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((1, 0), (255, 255, 255, 255))
    assert mask("clear", clear) == [0, 255]
    with pytest.raises(ValueError, match=r"red\.mask\.png .*has colours, expected .*white"):
        mask("red", Image.new("RGB", (2, 1), (255, 0, 0)))


def test_only_photos_that_change_lose_what_was_encoded(tmp_path: Path) -> None:
    """The digest of ordinary photos is their file's hash, as it always was."""
    for mode, plain in (("RGB", True), ("L", True), ("P", True), ("RGBA", False), ("I;16", False)):
        path = tmp_path / "a.png"
        Image.new(mode, (8, 8)).save(path)
        digest = folder.open_source(path, 1.0).digest
        assert (digest == hashlib.sha256(path.read_bytes()).hexdigest()) == plain


@pytest.mark.parametrize("kind", ["photos", "frames", "big"])
def test_cancel_is_heard_while_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Cancel comes after one of three files, or after one block of a large file."""
    root = tmp_path / "set"
    root.mkdir()
    for number in range(3):
        photo((root / "walk" if kind == "frames" else root) / f"{number}.png", None if kind == "frames" else "a")
    write(root / "walk.txt") if kind == "frames" else None
    if kind == "big":
        os.truncate(write(root / "0.png", "x"), 1 << 30)
    heard = 0
    real = comfy.model_management.throw_exception_if_processing_interrupted

    def cancel_later() -> None:
        nonlocal heard
        heard += 1
        if heard == 4:
            comfy.model_management.interrupt_current_processing()
        real()

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel_later)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        read(tmp_path)


def test_captions_of_a_file_are_found_by_its_whole_name(tmp_path: Path) -> None:
    assert [captions.captioned(Path(name)) for name in ("a.txt", "a.mp4.txt", "a.static.txt", "a.caption", "a.md")] == [
        "a", "a.mp4", "a", "a", "",
    ]  # fmt: skip
