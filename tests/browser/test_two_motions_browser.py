"""The template with two adapters, as a user works with it: opened, given files and words, queued, and its video seen."""

from playwright.sync_api import Page, expect

from ..media import write_image
from comfy_client import Client, Server

SET = """(widgets) => {
    for (const [name, values] of Object.entries(widgets)) {
        const node = app.graph.nodes.find((node) => [node.title, node.type].includes(name));
        for (const [widget, value] of Object.entries(values)) node.widgets.find((w) => w.name === widget).value = value;
    }
}"""
LATER = 300_000  # milliseconds at most, for what the models do


def test_two_motions_in_one_photo(page: Page, server: Server, client: Client, motions: list[str]) -> None:
    write_image(server.base / "input" / "photo.png", 90, (90, 70))
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    templates = page.get_by_role("dialog")
    templates.get_by_text("kinoloom", exact=True).first.click()
    templates.get_by_text("ca lora two generate").click()
    page.wait_for_function("app.graph.nodes.some((node) => node.type === 'KinoloomApplyI2vAdapters')")
    values = {
        "CheckpointLoaderSimple": {"ckpt_name": "narrow_sd15.safetensors"},
        "KinoloomLoadMotionModule": {"motion_module": "narrow_motion.safetensors"},
        "First adapter": {"file": motions[0], "prompt": "water"},
        "Second adapter": {"file": motions[1], "prompt": "sky"},
        "LoadImage": {"image": "photo.png"},
        "KinoloomI2vStart": {"width": 96, "height": 64, "frames": 4},
        "KinoloomI2vSigmas": {"steps": 2},
        "SaveVideo": {"filename_prefix": "video/seen"},
    }
    page.evaluate(SET, values)
    page.get_by_role("button", name="Run", exact=True).first.click()
    video = page.locator("video[src*=seen]")
    expect(video).to_be_visible(timeout=LATER)
    page.wait_for_function("(video) => video.videoWidth === 96 && video.duration > 0.4", arg=video.element_handle())
    (run,) = [run for run in client.get("/history?max_items=1").values()]
    used = {node["class_type"]: node["inputs"] for node in run["prompt"][2].values()}
    assert used["KinoloomApplyI2vAdapters"]["mode"] == "residual" and run["status"]["status_str"] == "success"
