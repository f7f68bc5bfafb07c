"""Makes the pictures of the page, with the models that ship and Chromium: python docs/images/ui.py"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from ovforge.model import package_path

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


def show(page: Page, name: str) -> str:
    """Open a tab, and return the beginning of its ids."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.locator("[id$=-run]:visible").first.get_attribute("id").removesuffix("-run")  # type: ignore[union-attr]


def run(page: Page, tab: str) -> None:
    """Press Run, and wait for the end."""
    page.evaluate(f"document.querySelector('#{tab}-status [data-state]').removeAttribute('data-state')")
    page.click(f"#{tab}-run")
    page.wait_for_selector(f"#{tab}-status [data-state=done]")
    shown = f"[...document.querySelectorAll('#{tab}-made img')]"
    page.wait_for_function(f"{shown}.length && {shown}.every(image => image.complete && image.naturalWidth)")


def text_to_image(page: Page) -> None:
    """Three pictures, the last with the adapter, and its recipe."""
    tab = show(page, "text-to-image")
    for prompt, weight in (("a yellow duck", 0), ("a red car on a white background", 0), ("a cute pink unicorn", 1)):
        page.fill(f"#{tab}-prompt textarea", prompt)
        page.fill(f"#{tab}-seed input", "7")
        slider = page.locator(f"#{tab}-adapter-0 input[type=number]")
        slider.fill(str(weight))
        slider.press("Tab")
        run(page, tab)
    page.click(f"#{tab}-recipe-box button")
    page.wait_for_selector(f"#{tab}-recipe .cm-line")
    page.screenshot(path=HERE / "ui.png")


def mask(page: Page) -> None:
    """A car whose left half is painted over."""
    tab = show(page, "inpainting")
    page.locator(f"#{tab}-image canvas").first.wait_for()
    with page.expect_file_chooser() as chooser:
        page.click(f"#{tab}-image >> text=Upload an image")
    chooser.value.set_files(HERE / "unicorn.png")
    page.click(f"#{tab}-image button[aria-label=Brush]")
    page.wait_for_selector(f"#{tab}-image button[aria-label=Undo]")
    box = page.locator(f"#{tab}-image canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 30, steps=8)
    page.mouse.up()
    page.fill(f"#{tab}-prompt textarea", "a beautiful blue unicorn, 8k")
    page.fill(f"#{tab}-seed input", "2")
    run(page, tab)
    page.screenshot(path=HERE / "ui-mask.png")


def detect(page: Page) -> None:
    """The scene that ships with the detector."""
    tab = show(page, "detect")
    page.set_input_files(
        f"#{tab}-image input[type=file]", package_path("package:ovforge_grounding_dino/demo/scene.jpg")
    )
    page.wait_for_selector(f"#{tab}-image img")
    run(page, tab)
    page.screenshot(path=HERE / "ui-detect.png")


def compare(page: Page) -> None:
    """The model in float32, and with weights of 8 bits."""
    tab = show(page, "Compare text-to-image")
    page.fill(f"#{tab}-seed input", "1234567")
    run(page, tab)
    page.screenshot(path=HERE / "ui-compare.png")


def main() -> None:
    """Open two pages, and take pictures of their tabs."""
    compared = [f"original={EXAMPLES / 'compare-f32.toml'}", f"int8={EXAMPLES / 'compare-int8-weights.toml'}"]
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for configs, shots in (([], (text_to_image, mask, detect)), (compared, (compare,))):
            command = [sys.executable, "-m", "ovforge", "ui", "--port", "0", *configs]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
            assert process.stdout is not None
            try:
                page = browser.new_page(viewport={"width": 1280, "height": 960})
                page.set_default_timeout(120_000)
                page.goto(process.stdout.readline().strip())
                for shot in shots:
                    shot(page)
            finally:
                process.terminate()
                process.wait()
        browser.close()


if __name__ == "__main__":
    main()
