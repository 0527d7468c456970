"""The test client: UI workflows become the prompts the real front end makes, and a real server runs them."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from comfy_client import Client, PromptError, Server
from comfy_workflow import find_node, set_widget, to_prompt, upstream

WORKFLOWS = Path(__file__).parent / "workflows"


@pytest.fixture
def workflow() -> dict:
    """Core nodes only, with a note, a reroute, a primitive, a linked widget, a bypassed and a muted node."""
    return json.loads((WORKFLOWS / "core_text_to_video.json").read_text())


@pytest.fixture
def prompt() -> dict:
    """What front end 1.47.12 made of it."""
    return json.loads((WORKFLOWS / "core_text_to_video.prompt.json").read_text())


def test_prompt_is_the_one_the_front_end_saved(workflow: dict, prompt: dict, client: Client) -> None:
    assert to_prompt(workflow, client.object_info()) == prompt


def test_prompt_is_the_one_the_front_end_makes_now(workflow: dict, client: Client, page: Page) -> None:
    set_widget(workflow, client.object_info(), "Prompt", "text", "a blue disc")
    set_widget(workflow, client.object_info(), "KSampler", "seed", 123)
    converted = page.evaluate(
        "async w => { await app.loadGraphData(w); return (await app.graphToPrompt()).output }", workflow
    )
    assert to_prompt(workflow, client.object_info()) == converted
    assert {"a blue disc", 123} <= {value for node in converted.values() for value in _plain(node["inputs"])}


def test_set_widget_finds_the_position_behind_the_seed_control(workflow: dict, client: Client) -> None:
    set_widget(workflow, client.object_info(), "KSampler", "sampler_name", "heun")
    node = find_node(workflow, "KSampler")
    assert node["widgets_values"] == [7, "fixed", 2, 1.5, "heun", "simple", 1]


@pytest.mark.parametrize(
    ("node", "widget", "message"),
    [
        ("KSampler", "steps", "linked"),
        ("KSampler", "sampler", "no widget 'sampler'"),
        ("CLIPTextEncode", "text", "2 nodes"),
        ("Nothing", "text", "0 nodes"),
    ],
)
def test_set_widget_refuses_what_it_cannot_set(
    workflow: dict, client: Client, node: str, widget: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        set_widget(workflow, client.object_info(), node, widget, 1)


def test_upstream_follows_a_link(workflow: dict) -> None:
    assert upstream(workflow, find_node(workflow, "KSampler"), "positive")["title"] == "Prompt"


def test_unknown_node_is_named(workflow: dict, client: Client) -> None:
    find_node(workflow, "KSampler")["type"] = "NoSuchSampler"
    with pytest.raises(ValueError, match="NoSuchSampler"):
        to_prompt(workflow, client.object_info())


def test_tiny_models_run_the_core_workflow(workflow: dict, client: Client, server: Server) -> None:
    outputs = client.run_workflow(workflow)
    assert {"execution_start", "progress", "executed", "execution_success"} <= {e["type"] for e in client.events}
    (video,) = client.files(outputs)
    assert (server.base / video).stat().st_size > 0


def test_failed_prompt_names_the_node(prompt: dict, client: Client) -> None:
    prompt["6"]["inputs"]["batch_size"] = 1
    prompt["2"]["inputs"]["clip_name"] = "absent.safetensors"
    with pytest.raises(PromptError, match="absent.safetensors") as refused:
        client.run(prompt)
    assert "2" in refused.value.details["node_errors"]


def _plain(inputs: dict) -> list:
    return [value for value in inputs.values() if not isinstance(value, list | dict)]
