"""The training panel on the real front end in both of its renderers: a run watched, steered, reloaded and broken."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kinoloom.trainers.run.unreadable import Unreadable
from playwright.sync_api import Browser, Locator, Page, Route, expect

from ..server_prompts import write_clips
from comfy_client import Client, Server, set_widget

TEMPLATE = Path(__file__).resolve().parents[2] / "workflows" / "wan_lora_train.json"
HOSTILE = """<img src="x" onerror="window.hacked = true">"""
READY = "window.app?.vueAppReady && app.graph?.nodes?.length && !document.querySelector('.p-blockui-mask')"
JOBS = "window.kinoloomJobs"
SAMPLED = {"prompts": HOSTILE, "width": 32, "height": 32, "frames": 9, "steps": 1, "sample_every": 10}
ADD_SAMPLES = """(values) => {
    const find = (type) => app.graph.nodes.find((node) => node.type === type);
    const made = LiteGraph.createNode("KinoloomSamplePrompts");
    app.graph.add(made);
    for (const [name, value] of Object.entries(values)) made.widgets.find((w) => w.name === name).value = value;
    find("CLIPLoader").connect(0, made, made.findInputSlot("clip"));
    const train = find("KinoloomTrainWanLora");
    made.connect(0, train, train.findInputSlot("samples"));
}"""
RUN = {"steps": 5000, "rank": 4, "validate_every": 4, "pause_when_busy": False}
LATER = 60_000  # milliseconds at most, for what a run does


@pytest.fixture
def panel(page: Page, server: Server, client: Client) -> Iterator[Page]:
    write_clips(server.base)
    page.set_default_timeout(LATER)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    client.post("/queue", {"clear": True})
    for job in client.jobs():
        client.post(f"/kinoloom/jobs/{job['id']}/stop")
    assert errors == []


def load(page: Page, client: Client, run_name: str, **options: object) -> None:
    """The shipped workflow that trains a Wan LoRA, on tiny models and clips."""
    values = {
        "UNETLoader": {"unet_name": "tiny_wan.safetensors"},
        "CLIPLoader": {"clip_name": "tiny_clip.safetensors"},
        "VAELoader": {"vae_name": "tiny_wan_vae.safetensors"},
        "KinoloomClipsFromFolder": {"folder": "clips", "frames_per_clip": 9, "size": 32},
        "KinoloomTrainWanLora": {"run_name": run_name, **RUN, **options},
    }
    workflow, info = json.loads(TEMPLATE.read_text()), client.object_info()
    for node, widgets in values.items():
        for widget, value in widgets.items():
            set_widget(workflow, info, node, widget, value)
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)


def open_panel(page: Page) -> Locator:
    page.evaluate("app.extensionManager.command.execute('Kinoloom.OpenTraining')")
    return page.locator(".side-bar-panel .kl-training")


def job_of(client: Client, run_name: str) -> dict:
    return next(job for job in client.jobs() if job["run_name"] == run_name)


def wait_for_change(page: Page, chart: str) -> None:
    """Until the first chart of this selector shows something else."""
    before = page.locator(chart).first.evaluate("(canvas) => canvas.toDataURL()")
    changed = "([chart, before]) => document.querySelector(chart).toDataURL() !== before"
    page.wait_for_function(changed, arg=[chart, before])


def button(place: Locator, label: str) -> Locator:
    return place.get_by_role("button", name=label, exact=True)


def toast(page: Page, text: str) -> Locator:
    """By its role: front ends of different versions make it of different elements."""
    return page.get_by_role("alert").filter(has_text=text).first


@pytest.mark.parametrize("nodes_2", [False, pytest.param(True, marks=pytest.mark.smoke)], ids=["classic", "nodes-2"])
def test_watch_stop_reload_resume_and_delete_a_run(panel: Page, client: Client, server: Server, nodes_2: bool) -> None:
    page, name = panel, f"watched {nodes_2}"
    page.evaluate("(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    load(page, client, name)
    page.evaluate(ADD_SAMPLES, SAMPLED)
    page.evaluate("app.queuePrompt(0)")
    widgets = page.locator(".kl-node", has_text="running")
    expect(widgets).to_have_count(2, timeout=LATER)  # on the Train node and on Training Result
    wait_for_change(page, ".kl-node canvas")
    widgets.first.get_by_title("Open in the training tab").click()

    view = page.locator(".kl-job")
    expect(view.locator(".kl-title")).to_contain_text([f"{name}Train Wan LoRA"])
    wait_for_change(page, ".kl-job canvas")
    expect(view.locator(".u-legend").first).to_contain_text("loss on fixed noise")
    expect(view.locator(".kl-pair img")).to_have_count(2, timeout=LATER)  # the first and the newest
    expect(view.locator(".kl-prompt")).to_have_text(HOSTILE)
    shown = view.locator(".kl-pair img").first.element_handle()
    page.wait_for_function("(image) => image.naturalWidth === 32", arg=shown)
    button(view, "Pause").click()
    expect(view.locator(".kl-state")).to_have_text("paused", timeout=LATER)
    button(view, "Resume").click()
    expect(view.locator(".kl-state")).to_have_text("running", timeout=LATER)
    button(view, "Stop").click()
    expect(toast(page, f"{name} was stopped")).to_be_visible(timeout=LATER)
    done = job_of(client, name)["done"]
    expect(button(view, f"Resume from step {done}")).to_be_visible()
    expect(view.locator(".kl-files")).to_contain_text(f"{name}-lora-{done:06}.safetensors")
    ended = re.compile(rf"stopped\s*{done} / 5000")
    expect(widgets).to_have_count(0)
    expect(page.locator(".kl-node", has_text=ended)).to_have_count(2)

    page.wait_for_timeout(1500)  # the front end keeps its draft a moment later
    page.reload()
    page.wait_for_function(READY)
    expect(page.locator(".kl-node", has_text=ended)).to_have_count(2)
    open_panel(page)
    row = page.locator(".kl-row", has_text=name)
    expect(row).to_contain_text("stopped")
    row.click()
    button(view, f"Resume from step {done}").click()
    expect(view.locator(".kl-state")).to_have_text("running", timeout=LATER)
    page.wait_for_function(f"parseInt(document.querySelector('.kl-fact').innerText.slice(4)) > {done}", timeout=LATER)
    button(view, "Stop").click()
    expect(button(view, "Delete")).to_be_visible(timeout=LATER)
    button(view, "Generate").click()
    loader = "app.graph.nodes.find((node) => node.type === 'LoraLoaderModelOnly')?.widgets[0].value"
    last = job_of(client, name)["lora_names"]["lora"]
    page.wait_for_function(f"(last) => {loader} === last", arg=last, timeout=LATER)
    assert last == f"kinoloom/{name}/{name}-lora-{job_of(client, name)['done']:06}.safetensors"
    button(view, "Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".kl-list")).to_be_visible()
    expect(row).to_have_count(0)
    assert all(job["run_name"] != name for job in client.jobs())
    assert list(server.base.glob(f"models/loras/kinoloom/{name}/*.safetensors")), "LoRA files stay"


def test_a_gap_in_the_socket_and_a_rewind_leave_no_gap_in_the_history(panel: Page, client: Client) -> None:
    page, name = panel, "gap"
    load(page, client, name, save_every=10)
    page.evaluate("app.queuePrompt(0)")
    page.evaluate(f"async () => {{ {JOBS} = (await import('/extensions/kinoloom/training/training.js')).jobs; }}")
    known = f"{JOBS}.list.find((job) => job.run_name === '{name}')"
    page.wait_for_function(f"{known}?.done > 2", timeout=LATER)
    for _ in range(2):
        done = job_of(client, name)["done"]
        page.evaluate("app.api.socket.close()")
        page.wait_for_function(f"{known}.done > {done + 5}", timeout=LATER)
        job = job_of(client, name)
        client.post(f"/kinoloom/jobs/{job['id']}/stop")
        page.wait_for_function(f"{known}.status === 'stopped'", timeout=LATER)
        history = client.get(f"/kinoloom/jobs/{job['id']}?after=0")["history"]
        kept = f"{JOBS}.histories.get('{job['id']}').entries"
        page.wait_for_function(f"{kept}.length >= {len(history)}", timeout=LATER)
        assert page.evaluate(kept) == history
        client.post(f"/kinoloom/jobs/{job['id']}/resume")
        page.wait_for_function(f"{known}.status === 'running'", timeout=LATER)
    client.post(f"/kinoloom/jobs/{job['id']}/stop")


def test_a_broken_run_says_why_and_no_text_becomes_html(panel: Page, client: Client, browser: Browser) -> None:
    page, name = panel, "broken"
    options = {"learning_rate": 10.0, "precision": "fp16", "max_grad_norm": 0.0, "trigger_words": HOSTILE}
    load(page, client, name, **options)
    page.evaluate("app.queuePrompt(0)")
    message = re.compile("became nan in step .* Try a lower learning_rate")
    expect(toast(page, f"{name} failed")).to_contain_text(message, timeout=LATER)
    expect(page.locator(".kl-node").first).to_contain_text(message)
    open_panel(page)
    page.locator(".kl-row", has_text=name).click()
    view = page.locator(".kl-job")
    expect(view.locator(".kl-trouble .kl-error")).to_contain_text(message)
    view.locator("summary", has_text="Log").click()
    expect(view.locator(".kl-log")).to_contain_text("became nan in step")
    view.locator("summary", has_text="Options").click()
    expect(view.get_by_text(HOSTILE)).to_be_visible()

    page.evaluate(
        """({job, hostile}) => {
            const advice = [{kind: "x", text: hostile, link: "javascript:window.hacked = true"}];
            const plan = {...job.plan, text: hostile};
            const texts = {run_name: hostile, title: hostile, phase: hostile, error: hostile, status: hostile};
            const changed = {...job, ...texts, advice, plan, losses: {[hostile]: 1}, main_file: hostile};
            app.api.dispatchCustomEvent("kinoloom.job", {job: changed, event: "status"});
        }""",
        {"job": job_of(client, name), "hostile": HOSTILE},
    )
    for part in (".kl-title", ".kl-state", ".kl-error", ".kl-advice", ".kl-numbers", ".kl-plan"):
        expect(view.locator(part, has_text=HOSTILE).first).to_be_visible()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x], a[href^=javascript]").count() == 0

    with browser.new_context(base_url=page.url) as context:  # another browser hears the same
        other = context.new_page()
        other.goto("/")
        other.wait_for_function(READY)
        open_panel(other)
        expect(other.locator(".kl-row", has_text=name)).to_contain_text(message)


def test_options_that_do_not_fit_are_said_at_the_node_and_nothing_is_queued(panel: Page, client: Client) -> None:
    page = panel
    load(page, client, "com1.v2", rank=4)
    page.evaluate("app.queuePrompt(0)")
    message = "run_name='com1.v2': expected another name, because Windows reserves this one for a device"
    expect(page.get_by_text(message).first).to_be_visible()
    train = "app.graph.nodes.find((node) => node.type === 'KinoloomTrainWanLora')"
    page.wait_for_function(f"{train}.has_errors")
    assert [job for job in client.jobs() if job["run_name"].startswith("com1")] == []
    load(page, client, HOSTILE)
    page.evaluate("app.queuePrompt(0)")
    expect(page.get_by_text(f"run_name={HOSTILE!r}: expected letters").first).to_be_visible()
    assert page.evaluate("window.hacked") is None and page.locator("img[src=x]").count() == 0


def test_runs_that_nobody_can_read_and_files_of_any_name_are_text(panel: Page, client: Client, tmp_path: Path) -> None:
    page, folder = panel, tmp_path / "unreadable"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"spec": {"run_name": f"lost {HOSTILE}", "created": 5.0}}))
    lost = Unreadable(folder, HOSTILE).summary()
    strange = {**lost, "id": "strange", "run_name": "strange", "status": HOSTILE, "error": "in use by another ComfyUI"}
    files = {"folder": HOSTILE, "files": [{"name": HOSTILE, "bytes": 5, "modified": 1.0, "lora_name": HOSTILE}]}
    history = {**lost, "config": {HOSTILE: HOSTILE}, "history": [], "next": 0, "epoch": 1}
    for path, answer in (
        ("jobs?*", {"jobs": [lost, strange], "total": 2}), ("jobs/strange/files", files),
        ("jobs/*?after=0", history), ("jobs/*/log", {"lines": [HOSTILE]}),
    ):  # fmt: skip
        page.route(f"**/kinoloom/{path}", lambda route, _, answer=answer: route.fulfill(json=answer))
    page.reload()
    page.wait_for_function(READY)
    rows = open_panel(page).locator(".kl-row")
    expect(rows).to_have_count(2)
    expect(rows.filter(has_text=f"lost {HOSTILE}")).to_contain_text(["unreadable"])
    expect(rows.filter(has_text="strange")).to_contain_text(["in use by another ComfyUI"])
    rows.filter(has_text="lost").click()
    view = page.locator(".kl-job")
    expect(view.locator(".kl-error").first).to_contain_text(HOSTILE)
    expect(view.locator(".kl-actions button")).to_have_text(["Delete"])
    view.get_by_title("All runs").click()
    rows.filter(has_text="strange").click()
    expect(view.locator(".kl-files")).to_contain_text(HOSTILE)
    expect(view.locator(".kl-state")).to_contain_text(HOSTILE)
    view.locator("summary", has_text="Options").click()
    expect(view.locator(".kl-fact", has_text=HOSTILE).first).to_be_visible()
    assert page.evaluate("window.hacked") is None and page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("connect", ["location.reload()", "app.api.dispatchCustomEvent('reconnected')"])
def test_a_page_of_another_version_says_what_it_lacks(connect: str, page: Page) -> None:
    """Also one that was open when the server started again."""
    def answer(route: Route) -> None:
        words = route.fetch().json()
        route.fulfill(json={**words, "events": [*words["events"], "evaluated"], "ended": [*words["ended"], "merged"]})

    page.route("**/kinoloom/words", answer)
    page.evaluate(connect)
    expect(toast(page, "it lacks evaluated, merged. Reload it.")).to_be_visible(timeout=LATER)


def test_smoothing_is_tensorboards_and_curves_follow_phases(page: Page) -> None:
    values = [4.0, 2.0, None, 3.0, 1.0]
    weight, mean, count, expected = 0.6, 0.0, 0, []
    for value in values:
        if value is not None:
            mean, count = mean * weight + value * (1 - weight), count + 1
        expected.append(None if value is None else mean / (1 - weight**count))
    folder = "/extensions/kinoloom/training"
    module = f"(await import('{folder}/series.mjs'))"
    smoothed = page.evaluate(f"async ([values, weight]) => {module}.smooth(values, weight)", [values, weight])
    assert smoothed == pytest.approx(expected)

    def step(phase: str, number: int, done: int) -> dict:
        losses = {"concept": done / 10}
        return {"event": "step", "phase": phase, "step": number, "done": done, "losses": losses, "learning_rate": 0.1}

    def validation(phase: str, number: int, best: bool) -> dict:
        return {"event": "validation", "phase": phase, "step": number, "loss": 1.0, "best": best, "held_out": True}

    history = [
        *(step("set", number, number) for number in (1, 2)),
        validation("set", 2, True),
        *(step("sequence", number, 2 + number) for number in (1, 2)),
        validation("sequence", 2, False),
    ]
    found = page.evaluate(
        f"""async (history) => {{
            const {{ read }} = await import('{folder}/history.mjs');
            const c = {module}.curves(read(history));
            return {{...c, losses: [...c.losses]}};
        }}""",
        history,
    )
    assert found == {
        "x": [1, 2, 3, 4],
        "losses": [
            ["set: concept", [0.1, 0.2, None, None]],
            ["sequence: concept", [None, None, 0.3, 0.4]],
        ],
        "rate": [0.1] * 4,
        "validation": [None, 1.0, None, 1.0],
        "heldOut": True,
        "best": 2,
    }


def test_settings_and_commands_are_translated(page: Page) -> None:
    ours = "(ids) => ids.filter((id) => id.startsWith('Kinoloom.')).map((id) => id.replaceAll('.', '_')).sort()"
    settings, commands = (
        page.evaluate(f"({ours})({ids})")
        for ids in (
            "Object.keys(app.extensionManager.setting.settings)",
            "app.extensionManager.command.commands.map(({id}) => id)",
        )
    )
    for name, ids in (("settings", settings), ("commands", commands)):
        translated = json.loads((TEMPLATE.parents[1] / "locales" / "zh" / f"{name}.json").read_text(encoding="utf-8"))
        assert sorted(translated) == ids and ids


def test_the_panel_shows_limits_and_frees_the_encoded_clips(panel: Page, client: Client, server: Server) -> None:
    data = server.base / "user" / "__kinoloom" / "data"
    data.mkdir(parents=True, exist_ok=True)
    unneeded = data / f"{'0' * 64}.latents.safetensors"
    unneeded.write_bytes(bytes(3 * 10**7))
    view = open_panel(panel).locator(".kl-cache")
    expect(view).to_contain_text(re.compile(r"Encoded clips: [\d.]+ GB"), timeout=LATER)
    limit = view.get_by_role("spinbutton")
    expect(limit).to_have_value("50")
    limit.fill("40")
    limit.press("Enter")
    button(view, "Free").click()
    dialog = panel.get_by_role("dialog")
    expect(dialog).to_contain_text("of encoded clips? They are encoded again")
    dialog.get_by_role("button", name="Delete").click()
    expect(button(view, "Free")).to_be_disabled(timeout=LATER)
    assert not unneeded.exists() and client.get("/kinoloom/cache")["limit_gb"] == 40
    client.post("/kinoloom/cache", {"limit_gb": 50})
