"""A headless Chromium on the running server."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from .. import in_comfyui  # noqa: F401
from comfy_client import Server

PATIENCE = 120_000  # milliseconds for the page, on machines that do much else


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        pytest.fail("no Chromium: run `bash scripts/setup.sh --browser`")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The real front end on the running server, its default workflow loaded: `page.evaluate("app.graph...")`."""
    context = browser.new_context(base_url=f"http://{server.address}")
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    opened.goto("/")
    opened.wait_for_function(
        "window.app?.vueAppReady && app.graph?.nodes?.length && !document.querySelector('.p-blockui-mask')"
    )
    yield opened
    context.close()
