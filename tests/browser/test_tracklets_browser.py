"""The editor of Draw Tracklets, with the mouse and the keys, on the real front end in both of its renderers."""

import json
from collections.abc import Iterator

import pytest
import torch
from kinoloom.nodes.data.reading.images import read_image
from kinoloom.trainers.conditions import tracklets as core
from kinoloom.trainers.conditions.tracklet_painting import paint
from kinoloom.trainers.conditions.tracklets import Tracklets, to_tensors
from PIL import Image
from playwright.sync_api import Page, expect

from comfy_client import Client, Server

WIDTH, HEIGHT = 128, 64
BUILD = """async () => {
    app.graph.clear();
    const add = (type, pos, values) => {
        const node = LiteGraph.createNode(type);
        node.pos = pos;
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
        return node;
    };
    const image = add("LoadImage", [20, 100], {image: "first_frame.png"});
    const draw = add("KinoloomTracklets", [400, 100], {width: 128, height: 64, frames: 9});
    const show = add("KinoloomPaintTracklets", [1000, 100], {line_width: 2});
    const save = add("SaveImage", [1000, 350], {filename_prefix: "painted"});
    image.connect(0, draw, 0); draw.connect(0, show, 0); image.connect(0, show, 1); show.connect(0, save, 0);
    app.canvas.ds.scale = 0.9;
    app.canvas.ds.offset = [-300, 20];
    app.canvas.setDirty(true, true);
}"""
WIDGET = "app.graph.nodes.find((n) => n.type === 'KinoloomTracklets').widgets.find((w) => w.name === 'json')"


@pytest.fixture(params=[False, True], ids=["classic", "nodes-2"])
def editor(page: Page, server: Server, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Load Image -> Draw Tracklets (128x64, 9 frames) -> Preview Tracklets -> Save Image, on the screen."""
    picture = Image.new("RGB", (WIDTH, WIDTH), (200, 40, 40))
    picture.paste((0, 80, 160), (0, 32, WIDTH, 96))  # what a central crop to 2:1 keeps
    picture.save(server.base / "input" / "first_frame.png")
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    setting = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(setting, request.param)
    page.evaluate(BUILD)
    expect(page.locator(".kl-stage canvas")).to_be_visible()
    page.wait_for_timeout(500)  # node and editor take their size in several frames
    yield page
    assert errors == []
    page.evaluate(setting, False)


CLASSIC = pytest.mark.parametrize("editor", [False], indirect=True)  # for what is not the renderer's
NODES_2 = pytest.mark.parametrize("editor", [True], indirect=True)


def stored(page: Page) -> dict:
    return json.loads(page.evaluate(f"{WIDGET}.value"))


def boxes(page: Page, number: int = 0) -> list[tuple[int, list[float], bool]]:
    """Key frames of a tracklet; coordinates to the hundredth, which a mouse can hit."""
    keys = stored(page)["tracklets"][number]["keyframes"]
    return [(key["frame"], [round(edge, 2) for edge in key["box"]], key["hard"]) for key in keys]


def at(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a point of the frame is on the screen."""
    left, top, width, height = page.evaluate(
        """([width, height]) => {
            const stage = document.querySelector(".kl-stage");
            const rect = stage.getBoundingClientRect();
            const zoom = rect.width / stage.clientWidth;
            const scale = Math.min((stage.clientWidth - 36) / width, (stage.clientHeight - 36) / height) * zoom;
            const [w, h] = [width * scale, height * scale];
            return [rect.x + (rect.width - w) / 2, rect.y + (rect.height - h) / 2, w, h];
        }""",
        [WIDTH, HEIGHT],
    )
    return left + x * width, top + y * height


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.mouse.move(*at(page, *start))
    page.mouse.down()
    page.mouse.move(*at(page, (start[0] + end[0]) / 2, (start[1] + end[1]) / 2))
    page.mouse.move(*at(page, *end))
    page.mouse.up()


def press(page: Page, key: str, times: int = 1) -> None:
    for _ in range(times):
        page.keyboard.press(key)


PIXEL = """([x, y]) => {
    const canvas = document.querySelector(".kl-stage canvas");
    const rect = canvas.getBoundingClientRect();
    const k = canvas.width / rect.width;
    return [...canvas.getContext("2d").getImageData((x - rect.x) * k, (y - rect.y) * k, 1, 1).data.slice(0, 3)];
}"""


def pixel(page: Page, x: float, y: float) -> list[int]:
    """The colour of the editor's canvas at a point of the frame."""
    return page.evaluate(PIXEL, at(page, x, y))


def wait_for_pixel(page: Page, x: float, y: float, color: list[int]) -> None:
    page.wait_for_function(f"([at, color]) => ({PIXEL})(at).join() === color.join()", arg=[at(page, x, y), color])


def test_draw_scrub_move_run_and_reload(editor: Page, client: Client, server: Server) -> None:
    page = editor
    drag(page, (0.1, 0.2), (0.4, 0.6))
    press(page, "ArrowRight", 4)
    drag(page, (0.25, 0.4), (0.65, 0.5))
    assert boxes(page) == [(0, [0.1, 0.2, 0.4, 0.6], True), (4, [0.5, 0.3, 0.8, 0.7], True)]
    assert {key: stored(page)[key] for key in ("width", "height", "frames")} == {
        "width": 128,
        "height": 64,
        "frames": 9,
    }
    assert len(page.locator(".kl-key").all()) == 2

    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    files = [file for file in client.files(client.run(prompt)) if file.startswith("output")]
    assert len(files) == 9
    first = read_image(server.base / "input" / "first_frame.png").expand(9, -1, -1, -1)
    made = Tracklets.from_json(stored(page))
    expected = paint(first, *to_tensors(made, 9, (WIDTH, WIDTH)), width=2)
    for file, frame in zip(files, expected, strict=True):
        torch.testing.assert_close(read_image(server.base / file), frame, atol=1 / 255, rtol=0)

    before = stored(page)
    page.wait_for_timeout(1500)  # the front end keeps its draft a moment later
    page.reload()
    page.wait_for_function(f"window.app?.vueAppReady && app.graph?.nodes?.length && {WIDGET}")
    assert stored(page) == before
    expect(page.locator(".kl-key")).to_have_count(2)


def test_resize_with_a_handle_and_select_by_click(editor: Page) -> None:
    page = editor
    drag(page, (0.2, 0.2), (0.4, 0.6))
    drag(page, (0.6, 0.2), (0.8, 0.6))
    drag(page, (0.8, 0.6), (0.9, 0.9))
    assert boxes(page, 1) == [(0, [0.6, 0.2, 0.9, 0.9], True)]
    page.mouse.click(*at(page, 0.3, 0.4))
    drag(page, (0.2, 0.4), (0.1, 0.5))  # the left edge moves only sideways
    assert boxes(page, 0) == [(0, [0.1, 0.2, 0.4, 0.6], True)]
    drag(page, (0.25, 0.4), (-0.05, 0.4))
    assert boxes(page, 0) == [(0, [-0.2, 0.2, 0.1, 0.6], True)], "a box may leave the frame"
    assert [item["color"] for item in stored(page)["tracklets"]] == core.PALETTE[:2]


@NODES_2
def test_keys_hard_enter_leave_delete_and_undo(editor: Page) -> None:
    page = editor
    drag(page, (0.2, 0.2), (0.4, 0.6))
    states = [stored(page)]
    press(page, "ArrowRight", 2)
    for key in ("k", "h", "[", "ArrowRight", "]", "Shift+ArrowDown", "Delete"):
        press(page, key)
        if key != "ArrowRight":
            states.append(stored(page))
    keyed, soft, enters, leaves, nudged, deleted = (state["tracklets"] for state in states[1:])
    assert [key["frame"] for key in keyed[0]["keyframes"]] == [0, 2] and soft[0]["keyframes"][1]["hard"] is False
    assert enters[0]["enter"] == 2 and leaves[0]["leave"] == 3 and deleted == []
    assert nudged[0]["keyframes"][2]["box"] == pytest.approx([0.2, 0.21, 0.4, 0.61], abs=0.01)
    for state in reversed(states[:-1]):
        press(page, "Control+z")
        assert stored(page) == state
    page.get_by_role("button", name="Undo").click()
    assert page.evaluate(f"{WIDGET}.value") == ""


@CLASSIC
def test_rename_colour_and_delete_in_the_list(editor: Page) -> None:
    page = editor
    drag(page, (0.2, 0.2), (0.4, 0.6))
    name = page.locator(".kl-row input[type=text]")
    name.fill('<b>"dog"</b>')
    name.press("Enter")
    page.locator(".kl-row input[type=color]").fill("#123456")
    tracklet = stored(page)["tracklets"][0]
    assert (tracklet["name"], tracklet["color"]) == ('<b>"dog"</b>', "#123456")
    page.locator(".kl-row button").click()
    assert stored(page)["tracklets"] == []


@NODES_2
def test_scrubbing_the_timeline_shows_the_boxes_between_key_frames(editor: Page) -> None:
    page = editor
    page.evaluate(
        f"(text) => {WIDGET}.value = text",
        json.dumps({"width": 128, "height": 64, "frames": 9, "tracklets": [{"id": 1, "color": "#00ff00", "keyframes": [
            {"frame": 0, "box": [0.1, 0.1, 0.3, 0.9]}, {"frame": 8, "box": [0.7, 0.1, 0.9, 0.9]}]}]}),
    )  # fmt: skip
    assert pixel(page, 0.3, 0.5)[1] > 200
    lane = page.locator(".kl-lane").last.bounding_box()
    page.mouse.click(lane["x"] + lane["width"] * 4.5 / 9, lane["y"] + lane["height"] / 2)
    assert page.locator(".kl-time").inner_text() == "4 / 8"
    assert pixel(page, 0.6, 0.3)[1] > 200 and pixel(page, 0.3, 0.3)[1] < 200


def test_the_first_frame_is_shown_cut_as_the_video_is(editor: Page) -> None:
    page = editor
    wait_for_pixel(page, 0.5, 0.02, [0, 80, 160])
    assert pixel(page, 0.5, 0.98) == [0, 80, 160]
    page.evaluate(
        """() => {
            const draw = app.graph.nodes.find((n) => n.type === "KinoloomTracklets");
            const made = LiteGraph.createNode("EmptyImage");
            app.graph.add(made);
            made.widgets.find((w) => w.name === "color").value = 0x20c040;
            made.connect(0, draw, 0);
        }"""
    )
    assert pixel(page, 0.5, 0.5) == [0, 0, 0], "only a run can tell what this node makes"
    page.evaluate("app.queuePrompt(0)")
    wait_for_pixel(page, 0.5, 0.5, [0x20, 0xC0, 0x40])


@CLASSIC
def test_json_by_hand_changes_the_picture_and_bad_json_says_what_is_wrong(editor: Page) -> None:
    page = editor
    drag(page, (0.2, 0.2), (0.4, 0.6))
    page.get_by_role("button", name="JSON").click()
    text = page.locator(".kl-tracklets textarea")
    value = stored(page)
    value["tracklets"][0]["keyframes"][0]["box"] = [0.5, 0.2, 0.9, 0.6]
    text.fill(json.dumps(value))
    assert stored(page) == value and pixel(page, 0.9, 0.4)[0] > 200
    value["tracklets"][0]["keyframes"][0]["box"] = [0.9, 0.2, 0.5, 0.6]
    text.fill(json.dumps(value))
    error = page.locator(".kl-error")
    expect(error).to_contain_text("tracklets[0].keyframes[0].box=[0.9,0.2,0.5,0.6]: expected x1, y1, x2, y2")
    text.fill("{")
    expect(error).to_contain_text("JSON")
    expect(page.locator(".kl-bar select")).to_be_disabled()
    text.fill("")
    expect(error).to_be_hidden()
    assert page.locator(".kl-row").count() == 1, "only the ruler"


@CLASSIC
def test_another_size_and_length_show_what_the_node_will_give(editor: Page) -> None:
    page = editor
    value = {"width": 256, "height": 64, "frames": 5, "tracklets": [{"id": 1, "keyframes": [
        {"frame": 0, "box": [0.3, 0.2, 0.4, 0.6]}, {"frame": 3, "box": [0.5, 0.2, 0.6, 0.6], "hard": False}]}]}  # fmt: skip
    page.evaluate(f"(text) => {WIDGET}.value = text", json.dumps(value))
    press_lane = page.locator(".kl-lane").last.bounding_box()
    page.mouse.click(press_lane["x"] + 3, press_lane["y"] + 5)
    press(page, "]")
    ours = Tracklets.from_json(value).fit(WIDTH, HEIGHT).retime(9)
    (shown,) = Tracklets.from_json(stored(page)).tracklets
    assert [(key.frame, key.hard) for key in shown.keyframes] == [(0, True), (6, False)]
    for key, expected in zip(shown.keyframes, ours.tracklets[0].keyframes, strict=True):
        assert key.frame == expected.frame and key.box == pytest.approx(expected.box, abs=1e-4)


def test_the_editor_has_the_same_palette(page: Page) -> None:
    module = "import('/extensions/kinoloom/tracklets/data.mjs')"
    assert page.evaluate(f"async () => (await {module}).PALETTE") == core.PALETTE
