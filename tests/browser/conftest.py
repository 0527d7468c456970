"""A headless Chromium on the running server."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

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


@pytest.fixture(scope="session")
def context(browser: Browser, server: Server) -> Iterator[BrowserContext]:
    """One profile for all pages, so that the front end is fetched and compiled once; each page begins without storage."""
    made = browser.new_context(base_url=f"http://{server.address}", reduced_motion="reduce")
    made.add_init_script(
        "if (!sessionStorage.getItem('begun')) { localStorage.clear(); sessionStorage.setItem('begun', '1'); }"
    )
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """The real front end on the running server, its default workflow loaded: `page.evaluate("app.graph...")`."""
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    opened.goto("/")
    opened.wait_for_function(
        "window.app?.vueAppReady && app.graph?.nodes?.length && !document.querySelector('.p-blockui-mask')"
    )
    yield opened
    opened.close()
