"""The editor and the node agree on what valid tracklets are and what they mean: each case is tried on both sides."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kinoloom.trainers.conditions import tracklets as core
from kinoloom.trainers.conditions.tracklets import Keyframe, Tracklet, Tracklets
from playwright.sync_api import Browser, Page, Route

WEB = Path(__file__).resolve().parents[2] / "web" / "tracklets"
CASES = json.loads((Path(__file__).parent / "tracklet_cases.json").read_text())


@pytest.fixture(scope="module")
def editor(browser: Browser) -> Iterator[Page]:
    """An empty page with the editor's module in `data`."""

    def serve(route: Route) -> None:
        file = WEB / route.request.url.rsplit("/", 1)[1]
        kind, body = ("text/javascript", file.read_text()) if file.is_file() else ("text/html", "<!doctype html>")
        route.fulfill(content_type=kind, body=body)

    page = browser.new_page()
    page.route("**/*", serve)
    page.goto("http://editor.test/")
    page.evaluate("async () => { window.data = await import('/data.mjs'); }")
    yield page
    page.close()


ANSWER = "(text) => { try { return {value: data.parse(text)}; } catch (error) { return {error: error.message}; } }"


@pytest.mark.parametrize("text", CASES["valid"])
def test_valid_on_both_sides_and_the_same_value(editor: Page, text: str) -> None:
    found = editor.evaluate(ANSWER, text)
    assert "error" not in found, found
    assert Tracklets.from_json(json.dumps(found["value"])) == Tracklets.from_json(text)


@pytest.mark.parametrize(("text", "field"), CASES["invalid"])
def test_invalid_on_both_sides_with_the_same_field(editor: Page, text: str, field: str) -> None:
    with pytest.raises(ValueError) as raised:
        Tracklets.from_json(text)
    found = editor.evaluate(ANSWER, text)
    assert "error" in found, found
    for message in (str(raised.value), found["error"]):
        assert message.startswith(field) and (not field or ": expected " in message), message


def random_tracklets(rng: random.Random) -> Tracklets:
    frames = rng.randint(1, 30)

    def box() -> tuple[float, ...]:
        x, y = rng.uniform(-1, 1), rng.uniform(-1, 1)
        return x, y, x + rng.choice([rng.uniform(0.1, 1), 1e-6]), y + rng.uniform(0.1, 1)

    def one(number: int) -> Tracklet:
        at = sorted(rng.sample(range(frames), rng.randint(1, min(frames, 6))))
        enter, leave = sorted(rng.randrange(frames) for _ in range(2))
        keys = tuple(Keyframe(frame, box(), rng.random() < 0.5) for frame in at)
        place = {"enter": rng.choice([None, enter]), "leave": rng.choice([None, leave])}
        return Tracklet(number, f"n{number}", core.PALETTE[number], keys, **place)

    made = tuple(one(n + 1) for n in range(rng.randint(1, 4)))
    return Tracklets(rng.randint(1, 900), rng.randint(1, 900), frames, made, rng.choice(core.INTERPOLATED))


@pytest.mark.parametrize("seed", range(25))
def test_the_editor_shows_the_boxes_that_the_node_gives(editor: Page, seed: int) -> None:
    rng = random.Random(seed)
    drawn = random_tracklets(rng)
    size, frames = (rng.choice([drawn.width, rng.randint(1, 900)]), drawn.height), rng.randint(1, 60)
    expected = in_the_node(drawn, size, frames)
    shown = editor.evaluate(
        """([text, width, height, frames]) => {
            try {
                const value = data.toVideo(data.parse(text), width, height, frames);
                const at = (tracklet, frame) => {
                    const found = data.boxAt(value, tracklet, frame);
                    return found && [found.box, found.hard];
                };
                return value.tracklets.map((item) => [...Array(frames).keys()].map((frame) => at(item, frame)));
            } catch (error) { return error.message; }
        }""",
        [drawn.to_json(), *size, frames],
    )
    if isinstance(expected, str):
        assert isinstance(shown, str) and "box=" in shown and "box=" in expected
        return
    assert [[at and at[1] for at in item] for item in shown] == [[at and at[1] for at in item] for item in expected]
    for ours, theirs in zip(shown, expected, strict=True):
        assert [at and at[0] for at in ours] == [at and pytest.approx(at[0], abs=1e-9) for at in theirs]


def in_the_node(drawn: Tracklets, size: tuple[int, int], frames: int) -> list | str:
    """Each object's box and hardness at each frame, None if it is absent; or the error if a box is out of range."""
    try:
        made = drawn.fit(*size).retime(frames)
    except ValueError as error:
        return str(error)

    def at(item: Tracklet, frame: int) -> tuple[list[float], bool] | None:
        there = (item.enter or 0) <= frame <= (frames - 1 if item.leave is None else item.leave)
        return core._at(item, frame, made.interpolated == "hard") if there else None

    return [[at(item, frame) for frame in range(frames)] for item in made.tracklets]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("between", ["hard", "soft"])
def test_a_frame_between_key_frames_is_hard_only_if_both_are_and_it_is_wanted(
    editor: Page, first: bool, second: bool, between: str
) -> None:
    keys = [{"frame": 0, "box": [0, 0, 1, 1], "hard": first}, {"frame": 2, "box": [0, 0, 1, 1], "hard": second}]
    value: dict[str, Any] = {"width": 8, "height": 8, "frames": 4, "interpolated": between}
    value["tracklets"] = [{"id": 1, "keyframes": keys}]
    shown = editor.evaluate(
        "(value) => [0, 1, 2, 3].map((frame) => data.boxAt(value, value.tracklets[0], frame).hard)", value
    )
    assert shown == [first, between == "hard" and first and second, second, between == "hard" and second]


@pytest.mark.parametrize("seed", range(5))
def test_what_the_editor_writes_is_what_it_had_to_four_digits_and_never_flat(editor: Page, seed: int) -> None:
    drawn = random_tracklets(random.Random(seed))
    text = editor.evaluate("(text) => data.format(data.parse(text))", drawn.to_json())
    written = Tracklets.from_json(text)
    for ours, theirs in zip(written.tracklets, drawn.tracklets, strict=True):
        assert (ours.enter, ours.leave, ours.color) == (theirs.enter, theirs.leave, theirs.color)
        for one, other in zip(ours.keyframes, theirs.keyframes, strict=True):
            assert (one.frame, one.hard) == (other.frame, other.hard)
            assert one.box == pytest.approx(other.box, abs=6e-5)
