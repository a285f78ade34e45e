"""A screenshot of the studio with tiny, as `klein-mlx serve --demo` shows it: studio_screenshot.py [FILE].

It needs klein-mlx[server], playwright, and a Chromium that playwright or the system has.
"""

import io
import shutil
import sys

from PIL import Image
from playwright.sync_api import sync_playwright

from klein_mlx.server.serving import Background
from klein_mlx.server.settings import Settings

PROMPTS = (
    "a yellow cross",
    "a small orange circle in the middle",
    "a green triangle in the top left corner",
    "a purple triangle right of a red square",
    "a blue square",
    "a purple ring on black",
    "a red circle left of a blue square",
)

target = sys.argv[1] if len(sys.argv) > 1 else "studio.png"
browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
with Background(Settings(model="tiny", port=0)) as server, sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1280, "height": 720})
    page.goto(server.url)
    page.locator("#worker", has_text="ready").wait_for()
    for number, prompt in enumerate(PROMPTS, 1):
        page.get_by_label("Describe a picture").fill(prompt)
        page.locator(f"#strip li:nth-child({number}) img").wait_for()
    page.locator("#frame:not([aria-busy])").wait_for()
    page.evaluate("document.activeElement.blur()")
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    chromium.close()
