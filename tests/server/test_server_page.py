"""The page in a headless Chromium: what is typed becomes a picture, of the whole text."""

import shutil

import pytest
from serving_tools import running

browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: klein-mlx[server-test]")
pytestmark = pytest.mark.skipif(browser is None, reason="no Chromium is installed")


def test_typing_makes_a_picture_of_the_whole_text() -> None:
    with running() as server, api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(server.url)
        page.get_by_label("Describe a picture").type("a red circle", delay=20)
        page.get_by_text("Seed 42, 128 x 128").wait_for(timeout=60_000)
        assert page.locator("#picture").get_attribute("alt") == "a red circle"
        assert (page.locator("#save").get_attribute("href") or "").startswith("data:image/png")
        chromium.close()
