"""The page in a real browser: what is typed, pressed, moved and painted there, and what is seen then."""

from __future__ import annotations

import io
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge


def show(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def run(page: Any, tab: str, state: str = "done") -> str:
    """Press Run, wait for how it ends, and return what the page says then."""
    press(page, tab)
    return wait(page, tab, state)


def press(page: Any, tab: str) -> None:
    """Press Run, and forget how the run before has ended."""
    forget(page, tab)
    page.click(f"#{tab}-run")


def forget(page: Any, tab: str) -> None:
    page.evaluate(f"document.querySelector('#{tab}-status [data-state]').removeAttribute('data-state')")


def wait(page: Any, tab: str, *states: str) -> str:
    page.wait_for_selector(", ".join(f"#{tab}-status [data-state={state}]" for state in states))
    return str(page.inner_text(f"#{tab}-status"))


def picture(page: Any, tab: str, place: int = 0) -> Image.Image:
    """Return a picture of the gallery, as the browser gets it."""
    page.wait_for_selector(f"#{tab}-made img")
    url = page.locator(f"#{tab}-made button img, #{tab}-made img").nth(place).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(url).body()))


def shows(page: Any, tab: str, expected: Image.Image) -> bool:
    """Wait until the gallery shows a picture; False if it never does."""
    for _ in range(100):
        if same(picture(page, tab), expected):
            return True
        page.wait_for_timeout(100)
    return False


def recipe(page: Any, tab: str) -> dict[str, Any]:
    """Open the recipe, and return it."""
    if not page.is_visible(f"#{tab}-recipe"):
        page.click(f"#{tab}-recipe-box button")
    page.wait_for_selector(f"#{tab}-recipe .cm-line")
    return tomllib.loads("\n".join(page.locator(f"#{tab}-recipe .cm-line").all_inner_texts()))


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    return bool(np.array_equal(np.asarray(ours.convert("RGB")), np.asarray(theirs.convert("RGB"))))


def test_a_prompt_becomes_a_picture_and_adapters_are_switched(page: Any, running: Any) -> None:
    pipeline = running.hosts["lcm"].pipeline
    compiled = len(pipeline.compiled.all())
    page.fill("#p0-prompt textarea", "a red car")
    page.fill("#p0-seed input", "3")
    run(page, "p0")
    plain = pipeline("a red car", seed=3).images[0]
    assert shows(page, "p0", plain)
    made = recipe(page, "p0")
    assert made["input"].items() >= {"prompt": "a red car", "steps": 4, "seed": 3}.items()
    config = ovforge.PipelineConfig.of(made).model_copy(update={"input": {}})
    assert config == pipeline.config.model_copy(update={"input": {}}), "a recipe is the whole config"

    page.locator("#p0-adapter-0 input[type=number]").fill("1")
    page.locator("#p0-adapter-0 input[type=number]").press("Tab")
    run(page, "p0")
    with ovforge.adjusted(pipeline, adapters={"pencil": 1.0}):
        drawn = pipeline("a red car", seed=3).images[0]
    assert shows(page, "p0", drawn) and not same(drawn, plain)
    assert "adapter pencil = 1" in page.inner_text("#p0-recipe")
    assert pipeline.adapters["pencil"] == 0, "what a page sets holds for its own runs"
    assert len(pipeline.compiled.all()) == compiled

    # The first one again, by its recipe: the adapter is off, whatever the form said.
    page.locator("#p0-made .thumbnail-item").nth(1).click()
    page.wait_for_function("document.querySelector('#p0-recipe').innerText.includes('pencil = 0')")
    assert shows(page, "p0", plain)
    forget(page, "p0")
    page.click("#p0-again")
    wait(page, "p0", "done")
    assert shows(page, "p0", plain)
    assert page.input_value("#p0-adapter-0 input[type=number]") == "0"


def test_the_scheduler_is_changed_for_a_run(page: Any, running: Any) -> None:
    pipeline = running.hosts["lcm"].pipeline
    page.fill("#p0-seed input", "3")
    page.click("#p0-scheduler input")
    page.get_by_role("option", name="euler", exact=True).click()
    run(page, "p0")
    own = pipeline.config.scheduler
    pipeline.use_scheduler("euler")
    expected = pipeline(seed=3).images[0]
    pipeline.use_scheduler(own)
    assert shows(page, "p0", expected)
    assert recipe(page, "p0")["scheduler"] == "euler"


def test_thresholds_act_at_once(page: Any, running: Any, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(page, "detect")
    page.set_input_files("#p1-image input[type=file]", scene)
    page.wait_for_selector("#p1-image img")
    run(page, "p1")
    pipeline = running.hosts["detect"].pipeline
    found = pipeline(image=scene)
    before = page.inner_text("#p1-details pre")
    assert str(scene.name) in page.inner_text("#p1-details") and str(running.folder) not in page.inner_text(
        "#p1-details"
    )
    monkeypatch.setattr(pipeline, "task", None)  # nothing can be found anew
    page.locator("#p1-now-threshold input[type=number]").fill("0.85")
    page.locator("#p1-now-threshold input[type=number]").press("Tab")
    page.wait_for_function(
        "text => document.querySelector('#p1-details pre').innerText != text",
        arg=before,
    )
    expected = found.adjusted(threshold=0.85)
    assert 0 < len(expected.detections[0]) < len(found.detections[0])
    assert shows(page, "p1", expected.annotated())
    assert page.input_value("#p1-threshold input") == "0.85"


def test_a_run_is_seen_and_cancelled(page: Any) -> None:
    show(page, "draw")
    page.fill("#p2-prompt textarea", "slow")
    page.fill("#p2-steps input", "100000")
    page.click("#p2-run")
    page.wait_for_selector("#p2-status img.ovforge-preview")
    assert re.search(r"draw: \d+ of 100000 · <u>note</u>", page.inner_text("#p2-status"))
    assert page.is_disabled("#p2-run")
    page.click("#p2-cancel")
    assert wait(page, "p2", "cancelled") == "Cancelled."
    page.wait_for_selector("#p2-run:enabled")
    page.fill("#p2-steps input", "2")
    assert run(page, "p2").startswith("Done in")


def test_errors_and_markup_are_text(page: Any) -> None:
    show(page, "draw")
    page.fill("#p2-prompt textarea", "wrong")
    text = run(page, "p2", "error")
    assert text.split("\n\n") == ["prompt: <b>bold</b> is *not* drawn", "Draw <i>this</i>."]
    page.fill("#p2-steps input", "many")
    assert run(page, "p2", "error").startswith("Steps: 'many' is not a number")
    page.fill("#p2-steps input", "0")
    assert "`steps` should be greater than or equal to 1" in run(page, "p2", "error")
    page.fill("#p2-steps input", "2")
    page.fill("#p2-prompt textarea", "broken")
    assert "it raised RuntimeError: a fault of the task" in run(page, "p2", "error")
    assert "Traceback" not in page.inner_text("body")
    attack = "<img src=x onerror=\"document.title='hit'\"> ${document.title='hit'} {{x}} **a** </script>"
    page.fill("#p2-prompt textarea", attack)
    run(page, "p2")
    assert recipe(page, "p2")["input"]["prompt"] == attack
    assert page.title() == "ovforge" and not page.locator("img[src=x]").count()
    assert "Draw <b>it</b>." in page.inner_text("#p2-about")
    assert "(word:1.3), <lora:name:0.8>" in page.inner_text("#p2-prompt")


def test_two_configs_stand_side_by_side(page: Any) -> None:
    show(page, "Compare draw")
    tab = page.locator("[id^=compare][id$=-run]").get_attribute("id").removesuffix("-run")
    run(page, tab)
    page.wait_for_selector(f"#{tab}-details table")
    rows = [row.split("\t") for row in page.locator(f"#{tab}-details tr").all_inner_texts()]
    assert rows[0][:3] == ["config", "seconds", "ssim"]
    assert [row[0] for row in rows[1:]] == ["draw", "second"] and rows[2][2] == "1.0000"
    first, second = picture(page, tab, 0), picture(page, tab, 1)
    assert same(first, second), "both were given one seed"


def test_a_mask_is_painted(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "white").save(tmp_path / "white.png")
    show(page, "paint")
    assert "Image: is missing" in run(page, "p4", "error")
    with page.expect_file_chooser() as chooser:
        page.click("#p4-image >> text=Upload an image")
    chooser.value.set_files(tmp_path / "white.png")
    page.click("#p4-image button[aria-label=Brush]")
    page.wait_for_selector("#p4-image button[aria-label=Undo]")
    box = page.locator("#p4-image canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=5)
    page.mouse.up()
    page.wait_for_selector("#p4-image button[aria-label=Undo]:enabled")
    run(page, "p4")
    mask = np.asarray(picture(page, "p4").convert("L"))
    assert mask.shape == (64, 96) and set(np.unique(mask)) == {0, 255}
    assert mask[32, 48] == 255 and mask[2, 2] == 0
    # Only the second object is filled in: it is the first that the task gets.
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png")
    page.click("#p4-stickers-1 button")
    page.set_input_files("#p4-stickers-1-image input[type=file]", tmp_path / "grey.png")
    page.wait_for_selector("#p4-stickers-1-image img")
    page.locator("#p4-stickers-1-left input[type=number]").fill("40")
    page.locator("#p4-stickers-1-left input[type=number]").press("Tab")
    run(page, "p4")
    stuck = Image.fromarray(mask)
    stuck.paste(128, (40, 0, 48, 8))
    assert shows(page, "p4", stuck)
    made = recipe(page, "p4")["input"]["stickers"]
    assert [sticker["left"] for sticker in made] == [40] and made[0]["image"].startswith("sha256:")
    forget(page, "p4")
    page.click("#p4-again")
    wait(page, "p4", "done")
    page.click("#p4-stickers-0 button")
    assert page.input_value("#p4-stickers-0-left input[type=number]") == "40"
