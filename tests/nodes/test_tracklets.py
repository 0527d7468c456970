"""Tracklets: the meaning of the JSON, refused inputs, and the nodes that read, make and paint tracklets."""

import json
import math
import random
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from kinoloom.nodes.data.reading.framing import center_crop
from kinoloom.nodes.tracklets import nodes as nodes
from kinoloom.trainers.conditions import tracklets as core
from kinoloom.trainers.conditions.tracklet_painting import paint
from kinoloom.trainers.conditions.tracklet_sources import from_masks, from_mot
from kinoloom.trainers.conditions.tracklets import Keyframe, Tracklet, Tracklets, to_tensors

BOX = [0.1, 0.2, 0.5, 0.6]


def clip(frames: int = 9, **changes) -> dict:
    """One object that moves right from frame 0 to 4 and stands still after."""
    keys = [{"frame": 0, "box": [0.0, 0.2, 0.4, 0.6]}, {"frame": 4, "box": [0.4, 0.2, 0.8, 0.6]}]
    one = {"id": 1, "name": "dog", "color": "#ff8000", "keyframes": keys, **changes}
    return {"width": 64, "height": 32, "frames": frames, "tracklets": [one]}


def tensors(value: dict, *args) -> tuple[torch.Tensor, torch.Tensor]:
    return to_tensors(Tracklets.from_json(value), *args)


# -- what the JSON means ---------------------------------------------------------------------------------------------------


def test_boxes_move_linearly_between_key_frames_and_stand_still_after() -> None:
    boxes, mask = tensors(clip())
    assert boxes.shape == (9, 20, 8) and mask.shape == (9, 20)
    expected = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])
    torch.testing.assert_close(boxes[:, 0, 0], expected)
    torch.testing.assert_close(boxes[:, 0, 2], expected + 0.4)
    torch.testing.assert_close(boxes[:, 0, 4:7], torch.tensor([1, 128 / 255, 0]).expand(9, 3))
    assert mask[:, 0].eq(1).all() and not mask[:, 1:].any() and not boxes[:, 1:].any()


def test_before_the_first_key_frame_the_box_stands_where_it_will_be() -> None:
    boxes, _ = tensors(clip(keyframes=[{"frame": 6, "box": BOX}]))
    torch.testing.assert_close(boxes[:, 0, :4], torch.tensor(BOX).expand(9, 4))


def test_enter_and_leave_are_the_first_and_the_last_frame_that_has_it() -> None:
    boxes, mask = tensors(clip(enter=2, leave=5))
    assert mask[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert not boxes[mask == 0].any()


@pytest.mark.parametrize(
    ("between", "first", "second", "expected"),
    [
        ("hard", True, True, [1, 1, 1, 1, 1, 1]),
        ("hard", True, False, [1, 0, 0, 0, 0, 0]),
        ("hard", False, True, [0, 0, 0, 1, 1, 1]),
        ("soft", True, True, [1, 0, 0, 1, 0, 0]),
        ("soft", False, False, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_frame_between_key_frames_is_hard_only_if_wanted_and_both_are(
    between: str, first: bool, second: bool, expected: list[int]
) -> None:
    value = clip(6, keyframes=[{"frame": 0, "box": BOX, "hard": first}, {"frame": 3, "box": BOX, "hard": second}])
    boxes, _ = tensors({**value, "interpolated": between})
    assert boxes[:, 0, 7].tolist() == expected


def test_a_box_ends_at_the_frame_and_is_gone_where_less_than_a_hundredth_shows() -> None:
    keys = [{"frame": 0, "box": [-0.4, 0.1, 0.1, 0.6]}, {"frame": 4, "box": [-0.8, 0.1, -0.3, 0.6]}]
    boxes, mask = tensors(clip(5, keyframes=keys))
    torch.testing.assert_close(boxes[0, 0, :4], torch.tensor([0, 0.1, 0.1, 0.6]))
    assert mask[:, 0].tolist() == [1, 0, 0, 0, 0]  # at frame 1 it ends exactly at the border
    narrow = clip(1, keyframes=[{"frame": 0, "box": [0.5, 0.1, 0.5099, 0.9]}])
    wide = clip(1, keyframes=[{"frame": 0, "box": [0.5, 0.1, 0.5101, 0.9]}])
    assert not tensors(narrow)[1].any() and tensors(wide)[1][0, 0] == 1


def test_slots_keep_the_order_of_the_list() -> None:
    value = clip()
    value["tracklets"] = [{"id": 7, "keyframes": [{"frame": 0, "box": BOX}]}, *value["tracklets"]]
    made = Tracklets.from_json(value)
    assert (made.tracklets[0].color, made.tracklets[0].name) == (core.PALETTE[0], "object 7")
    boxes, mask = to_tensors(made)
    assert mask[0].sum() == 2
    torch.testing.assert_close(boxes[0, 0, :4], torch.tensor(BOX))


# -- other lengths and shapes ------------------------------------------------------------------------------------------------


def test_another_number_of_frames_takes_the_same_time() -> None:
    boxes, _ = tensors(clip(), 17)
    torch.testing.assert_close(boxes[[0, 4, 8, 16], 0, 0], torch.tensor([0, 0.2, 0.4, 0.4]))
    boxes, mask = tensors(clip(enter=2, leave=6), 5)
    torch.testing.assert_close(boxes[1:4, 0, 0], torch.tensor([0.2, 0.4, 0.4]))
    assert mask[:, 0].tolist() == [0, 1, 1, 1, 0]
    made = Tracklets.from_json(clip())
    assert made.retime(25).retime(9) == made and made.retime(1).tracklets[0].keyframes[0].box[0] == 0.0


def test_fewer_frames_keep_the_key_frame_nearest_in_time() -> None:
    keys = [{"frame": frame, "box": [frame / 10, 0.0, 1.0, 1.0]} for frame in range(9)]
    made = Tracklets.from_json(clip(keyframes=keys)).retime(3)
    assert [(key.frame, key.box[0]) for key in made.tracklets[0].keyframes] == [(0, 0.0), (1, 0.4), (2, 0.8)]


@pytest.mark.parametrize("size", [(32, 32), (64, 16), (20, 50), (31, 7), (128, 64)])
def test_fit_sees_what_the_central_crop_of_a_frame_sees(size: tuple[int, int]) -> None:
    value = clip(1, keyframes=[{"frame": 0, "box": [0.25, 0.25, 0.75, 0.75]}])
    frame = torch.zeros(32, 64, 3)
    frame[8:24, 16:48] = 1
    cropped = center_crop(frame, *size)[0, 0]
    boxes, _ = tensors(value, 1, size)
    rows, columns = (cropped.amax(dim).nonzero() for dim in (1, 0))
    scale = torch.tensor([*cropped.shape[::-1]] * 2)
    expected = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / scale
    torch.testing.assert_close(boxes[0, 0, :4], expected)


def test_fit_keeps_what_leaves_so_that_it_can_come_back() -> None:
    made = Tracklets.from_json(clip(keyframes=[{"frame": 0, "box": [0.0, 0.2, 0.1, 0.6]}, {"frame": 8, "box": BOX}]))
    square = made.fit(32, 32)
    assert (square.width, square.height) == (32, 32) and square.tracklets[0].keyframes[0].box[0] == -0.5
    _, mask = to_tensors(square)
    assert mask[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert made.fit(128, 64).tracklets == made.tracklets


# -- JSON ----------------------------------------------------------------------------------------------------------------------


def random_tracklets(rng: random.Random) -> Tracklets:
    frames = rng.randint(1, 40)

    def box() -> tuple[float, ...]:
        x, y = rng.uniform(-1, 1), rng.uniform(-1, 1)
        return x, y, x + rng.uniform(0.001, 1), y + rng.uniform(0.001, 1)

    def one(number: int) -> Tracklet:
        at = sorted(rng.sample(range(frames), rng.randint(1, frames)))
        enter, leave = sorted(rng.randrange(frames) for _ in range(2))
        keys = tuple(Keyframe(frame, box(), rng.random() < 0.5) for frame in at)
        return Tracklet(
            number, f'n"{number}é', core.PALETTE[number], keys, rng.choice([None, enter]), rng.choice([None, leave])
        )

    count = rng.randint(0, 20)
    return Tracklets(
        rng.randint(400, 800), rng.randint(400, 800), frames, tuple(one(n + 1) for n in range(count)),
        rng.choice(core.INTERPOLATED),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_json_and_back_is_the_same_and_tensors_keep_their_promises(seed: int) -> None:
    rng = random.Random(seed)
    made = random_tracklets(rng)
    text = made.to_json()
    assert Tracklets.from_json(text) == made == Tracklets.from_json(json.loads(text))
    frames = rng.randint(1, 60)
    size = rng.randint(100, 200), rng.randint(100, 200)
    boxes, mask = to_tensors(made, frames, size)
    assert boxes.shape == (frames, 20, 8) and mask.shape == (frames, 20)
    assert boxes.min() >= 0 and boxes.max() <= 1 and set(mask.unique().tolist()) <= {0, 1}
    there = boxes[mask == 1]
    assert ((there[:, 2:4] - there[:, :2]) > 0.0099).all() and not boxes[mask == 0].any()


def test_key_frames_may_come_in_any_order() -> None:
    value = clip()
    value["tracklets"][0]["keyframes"].reverse()
    assert Tracklets.from_json(value) == Tracklets.from_json(clip())


def edited(*path, value) -> dict:
    """The clip with one place of its JSON changed; a value of None removes it."""
    whole = clip()
    place = whole
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return whole


KEY = ("tracklets", 0, "keyframes", 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not JSON (Expecting"),
        ("[" * 100000, "not JSON ("),
        ("[]", "tracklets=[]: expected an object with width, height, frames, tracklets"),
        ({"width": 1}, "height=None: expected a value; width, height, frames, tracklets are needed"),
        (edited("width", value=0), "width=0: expected a whole number 1..16384"),
        (edited("height", value=1.5), "height=1.5: expected a whole number"),
        (edited("frames", value=True), "frames=True: expected a whole number 1..100000"),
        (edited("frames", value=4), "tracklets[0].keyframes[1].frame=4: expected a whole number 0..3"),
        (edited("fps", value=8), "fps=8: expected one of width, height, frames, tracklets, interpolated"),
        (edited("interpolated", value="firm"), "interpolated='firm': expected hard or soft"),
        (edited("tracklets", value={}), "tracklets={}: expected a list"),
        (edited("tracklets", value=[3]), "tracklets[0].tracklet=3: expected an object with id, keyframes"),
        (edited("tracklets", 0, "colour", value="red"), "tracklets[0].colour='red': expected one of id, name, color"),
        (edited("tracklets", 0, "color", value="red"), "tracklets[0].color='red': expected a colour such as #ff0000"),
        (edited("tracklets", 0, "id", value=0), "tracklets[0].id=0: expected a whole number 1.."),
        (edited("tracklets", 0, "name", value=3), "tracklets[0].name=3: expected text"),
        (edited("tracklets", 0, "enter", value=9), "tracklets[0].enter=9: expected a whole number 0..8"),
        (edited("tracklets", 0, "leave", value="x"), "tracklets[0].leave='x': expected a whole number"),
        (clip(enter=5, leave=4), "tracklets[0].leave=4: expected a frame not before enter=5"),
        (edited("tracklets", 0, "keyframes", value=[]), "tracklets[0].keyframes=[]: expected at least one key frame"),
        (edited(*KEY, "frame", value=0), "tracklets[0].keyframes=[0, 0]: expected ascending frames, each once"),
        (edited(*KEY, "frame", value=-1), "tracklets[0].keyframes[1].frame=-1: expected a whole number"),
        (edited(*KEY, "hard", value=1), "tracklets[0].keyframes[1].hard=1: expected true or false"),
        (edited(*KEY, "box", value=[0, 0, 1]), "tracklets[0].keyframes[1].box=(0, 0, 1): expected x1, y1, x2, y2"),
        (edited(*KEY, "box", value="all"), "tracklets[0].keyframes[1].box='all': expected x1, y1, x2, y2 as fractions"),
        (edited(*KEY, "box", value=[0, 0, 64, 1]), "keyframes[1].box=(0, 0, 64, 1): expected x1, y1, x2, y2 as fractions"),
        (edited(*KEY, "box", value=[0, 0, math.nan, 1]), "box=(0, 0, nan, 1): expected"),
        (json.dumps(edited(*KEY, "box", value=[0, 0, math.inf, 1])), "box=(0, 0, inf, 1): expected"),
        (edited(*KEY, "box", value=[0.5, 0, 0.5, 1]), "box=(0.5, 0, 0.5, 1): expected x1, y1, x2, y2 with x1 < x2"),
        (edited("tracklets", value=clip()["tracklets"] * 2), "tracklets[1].id=1: expected an id that no other tracklet has"),
        (
            edited("tracklets", value=[{**clip()["tracklets"][0], "id": n} for n in range(1, 22)]),
            "tracklets=21: expected at most 20",
        ),
    ],
)  # fmt: skip
def test_bad_json_is_one_error_with_place_value_and_expectation(value: str | dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Tracklets.from_json(value)
    assert message in str(raised.value)


# -- CSV and masks ---------------------------------------------------------------------------------------------------------

MOT = "frame,id,x,y,w,h,conf,class,vis\n1,3,0,8,16,8,1,1,1\n3,3,32,8,16,8,1,1,0.5\n2,9,16,0,32,16,-1,-1,-1\n4,9,0,0,64,32,0,1,1\n"


def test_mot_csv_becomes_key_frames() -> None:
    made = from_mot(MOT, 64, 32)
    assert made == Tracklets(
        64, 32, 3,
        (
            Tracklet(3, "object 3", core.PALETTE[0], (Keyframe(0, (0, 0.25, 0.25, 0.5)), Keyframe(2, (0.5, 0.25, 0.75, 0.5)))),
            Tracklet(9, "object 9", core.PALETTE[1], (Keyframe(1, (0.25, 0, 0.75, 0.5)),), 1, 1),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lines=0: expected at least one box"),
        ("1,1,0,0,5\n", "line 1: line='1,1,0,0,5': expected frame,id,x,y,w,h"),
        ("1,1,0,0,5,5\n\n0,1,0,0,5,5\n", "line 3: frame=0: expected a whole number 1.."),
        ("1,1.5,0,0,5,5\n", "line 1: id='1.5': expected a whole number"),
        ("1,-1,0,0,5,5\n", "line 1: id=-1: expected a whole number 1.."),
        ("1,1,0,nan,5,5\n", "line 1: y='nan': expected a number"),
        ("1,1,0,0,0,5\n", "line 1: box=(0.0, 0.0, 0.0, 0.15625): expected x1, y1, x2, y2 with x1 < x2"),
        ("1,1,0,0,5,5\n1,1,0,0,6,5\n", "line 2: frame=1: expected each frame of id 1 once"),
    ],
)
def test_bad_csv_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        from_mot(text, 64, 32)
    assert message in str(raised.value)


def test_masks_become_their_bounding_boxes() -> None:
    labels = torch.zeros(4, 10, 20, dtype=torch.int)
    labels[0, 2:5, 4:8] = 5
    labels[2, 2:5, 8:12] = 5
    labels[3, 9, 19] = 2
    made = from_masks(labels)
    assert [(item.id, item.enter, item.leave) for item in made.tracklets] == [(2, 3, None), (5, None, 2)]
    boxes, mask = to_tensors(made)
    torch.testing.assert_close(boxes[3, 0, :4], torch.tensor([0.95, 0.9, 1, 1]))
    torch.testing.assert_close(boxes[:3, 1, 0], torch.tensor([0.2, 0.3, 0.4]))
    assert mask[:, :2].tolist() == [[0, 1], [0, 1], [0, 1], [1, 0]]


# -- painting --------------------------------------------------------------------------------------------------------------


def test_outlines_are_painted_inwards_to_the_pixel_and_nothing_else() -> None:
    frames = torch.rand(2, 32, 64, 3, generator=torch.Generator().manual_seed(0))
    boxes, mask = tensors(clip(2, keyframes=[{"frame": 0, "box": [0.25, 0.25, 0.75, 0.875]}], leave=0))
    boxes[:, 5] = 1  # a masked slot may hold anything
    expected = frames.clone()
    for rows, columns in (((8, 12), (16, 48)), ((24, 28), (16, 48)), ((8, 28), (16, 20)), ((8, 28), (44, 48))):
        expected[0, slice(*rows), slice(*columns)] = torch.tensor([1, 128 / 255, 0])
    before = frames.clone()
    assert torch.equal(paint(frames, boxes, mask), expected) and torch.equal(frames, before)
    assert torch.equal(paint(frames, boxes, mask, skip_first=True), frames)


def test_a_box_thinner_than_two_lines_is_filled_and_later_objects_lie_on_top() -> None:
    value = clip(1, keyframes=[{"frame": 0, "box": [0.0, 0.0, 0.1, 1.0]}])
    value["tracklets"].append({"id": 2, "color": "#0000ff", "keyframes": [{"frame": 0, "box": [0.0, 0.5, 1.0, 1.0]}]})
    painted = paint(torch.zeros(1, 32, 64, 3), *tensors(value), width=3)[0]
    assert painted[:16, :6].eq(torch.tensor([1, 128 / 255, 0])).all() and not painted[:16, 6:].any()
    assert painted[16:19].eq(torch.tensor([0.0, 0, 1])).all() and not painted[20, 7:61].any()


def test_the_palette_is_well_spaced() -> None:
    rgb = torch.tensor([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in core.PALETTE])
    assert len(rgb) == 29 and torch.cdist(rgb, rgb)[~torch.eye(29, dtype=torch.bool)].min() > 0.15


# -- nodes -----------------------------------------------------------------------------------------------------------------


def test_draw_tracklets_gives_the_boxes_for_the_size_and_length_of_its_widgets() -> None:
    made, text = nodes.DrawTracklets.execute(64, 32, 9, json.dumps(clip())).result
    assert made == Tracklets.from_json(clip()) == Tracklets.from_json(text)
    made, _ = nodes.DrawTracklets.execute(32, 32, 17, json.dumps(clip())).result
    assert made == Tracklets.from_json(clip()).fit(32, 32).retime(17)
    assert nodes.DrawTracklets.execute(64, 32, 9, " ").result[0] == Tracklets(64, 32, 9)


def test_draw_tracklets_leaves_the_first_frame_for_the_editor() -> None:
    output = nodes.DrawTracklets.execute(64, 32, 9, "", torch.rand(3, 32, 64, 3))
    (saved,) = output.ui["kinoloom_frame"]
    assert (Path(folder_paths.get_temp_directory()) / saved["filename"]).is_file()


def test_load_tracklets_reads_json_and_csv_from_the_input_folder() -> None:
    folder = Path(folder_paths.get_input_directory())
    (folder / "boxes.json").write_text(json.dumps(clip()))
    (folder / "boxes.csv").write_text(MOT)
    assert {"boxes.json", "boxes.csv"} <= set(nodes.input_files())
    assert nodes.LoadTracklets.execute("boxes.json", 16, 16, 24, 0).result[0] == Tracklets.from_json(clip())
    assert nodes.LoadTracklets.execute("boxes.csv", 64, 32, 24, 0).result[0] == from_mot(MOT, 64, 32)
    assert nodes.LoadTracklets.execute("boxes.csv", 64, 32, 24, 48).result[0] == from_mot(MOT, 64, 32).retime(5)
    assert nodes.LoadTracklets.execute("boxes.csv", 64, 32, 24, 0, 9).result[0] == from_mot(MOT, 64, 32, 9)
    before = nodes.LoadTracklets.fingerprint_inputs("boxes.csv")
    (folder / "boxes.csv").write_text("1,1,0,0,0,1")
    assert nodes.LoadTracklets.fingerprint_inputs("boxes.csv") != before
    with pytest.raises(ValueError, match=r"boxes.csv: line 1: box="):
        nodes.LoadTracklets.execute("boxes.csv", 64, 32, 24, 0)
    with pytest.raises(ValueError, match="Invalid file path"):
        nodes.input_file("../boxes.csv")


def test_tracklets_from_masks_chain() -> None:
    masks = torch.zeros(3, 16, 16)
    masks[:, 4:8, 4:12] = 1
    first = nodes.TrackletsFromMasks.execute(masks, "").result[0]
    both = nodes.TrackletsFromMasks.execute(masks.roll(4, 1).repeat(1, 2, 2)[:, ::2, ::2], "cat", first).result[0]
    assert [(item.id, item.name, item.color) for item in both.tracklets] == [
        (1, "object 1", core.PALETTE[0]), (2, "cat", core.PALETTE[1]),
    ]  # fmt: skip
    assert both.tracklets[0].keyframes[0] == Keyframe(0, (0.25, 0.25, 0.75, 0.5))
    with pytest.raises(ValueError, match="masks: 2 frames: expected 3"):
        nodes.TrackletsFromMasks.execute(masks[:2], "", first)
    with pytest.raises(ValueError, match="masks: empty in every frame"):
        nodes.TrackletsFromMasks.execute(masks * 0, "", first)


def test_preview_tracklets_paints_on_black_on_one_image_and_on_frames() -> None:
    made = Tracklets.from_json(clip())

    def preview(images: torch.Tensor | None = None, labels: bool = False) -> torch.Tensor:
        return nodes.PreviewTracklets.execute(made, 4, False, labels, images).result[0]

    black = preview()
    assert torch.equal(black, paint(torch.zeros(9, 32, 64, 3), *to_tensors(made)))
    assert torch.equal(preview(torch.zeros(1, 32, 64, 3)), black)
    assert torch.equal(
        preview(torch.zeros(5, 40, 40, 4)), paint(torch.zeros(5, 40, 40, 3), *to_tensors(made, 5, (40, 40)))
    )
    labelled = preview(labels=True)
    assert labelled.shape == black.shape and not torch.equal(labelled, black)
    assert np.allclose(labelled[:, :2], black[:, :2], atol=1 / 255)


def test_of_too_many_tracked_objects_the_longest_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Of 23 objects the three with a single box are dropped."""
    short = (2, 7, 19)
    lines = [f"{frame},{n},0,0,5,5" for n in range(1, 24) for frame in range(1, 2 if n in short else 3)]
    kept = from_mot("\n".join(lines), 10, 10)
    assert [item.id for item in kept.tracklets] == [n for n in range(1, 24) if n not in short]
    assert "23 tracked objects, of which the 20 longest are kept" in caplog.text
