"""The page of `slora app` in a real browser: a person's five tasks on the built-in base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import slora_diffusers as sl
from tests.adapters import add_random_adapter

gradio = pytest.importorskip("gradio", reason="the page needs gradio: make test-app")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: make test-app")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 60_000  # milliseconds; pictures are drawn on a CPU that others use, too

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore"),  # what gradio and its server say of each other
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an adapter of the built-in base, `style`; pictures of the page go to SLORA_SCREENSHOTS, or here."""
    from slora_diffusers.demo.adapt import load_base

    folder = tmp_path_factory.mktemp("app")
    pipe = load_base()
    add_random_adapter(pipe.transformer, "style", 1, std=0.1)
    sl.save_serial_lora(pipe, folder / "style", "style")
    return folder


@pytest.fixture(scope="module")
def address():
    from slora_diffusers.app.page import Desk, build, launch
    from slora_diffusers.app.session import Session
    from slora_diffusers.cli.bases import load_base

    page = build(Desk(lambda name: Session(load_base(name)), "demo", []))
    yield launch(page, "127.0.0.1", 0, wait=False)
    page.close()


@pytest.fixture(scope="module")
def page(address):
    """A page in a browser; what it asks of other hosts is noted."""
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.get_by_role("button", name="Open adapter").wait_for()
        yield page
        browser.close()


def shoot(page, place, name):
    folder = Path(os.environ.get("SLORA_SCREENSHOTS", place))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def fill(page, label, text):
    page.get_by_label(label, exact=True).last.fill(text)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def draw(page):
    """Press Draw; returns what is said when the pictures are there."""
    before = page.locator("#said").inner_text() if page.locator("#said").count() else ""
    fill(page, "Seed", str(draw.seed))
    press(page, "Draw")
    page.wait_for_function(
        "seed => document.querySelector('#said')?.innerText.includes('Seed ' + seed + '.')", arg=draw.seed
    )
    said = page.locator("#said").inner_text()
    assert said != before
    draw.seed += 1
    return said


draw.seed = 1


def effect(said):
    """How far base and live, and live and fused, are apart."""
    parts = said.split("up to ")
    return int(parts[1].split()[0]), int(parts[2].split(".")[0])


def error(page):
    """The sentence that the page shows, which then goes."""
    toast = page.locator(".toast-body.error, .toast-wrap .error").first
    toast.wait_for()
    text = toast.inner_text()
    page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
    toast.wait_for(state="hidden")
    return text


def test_a_mistyped_path_gives_a_sentence(page, place):
    fill(page, "Adapter: a folder, a file or a Hub id", str(place / "styel"))
    press(page, "Open adapter")
    page.locator(".toast-wrap").get_by_text("styel").first.wait_for()
    shoot(page, place, "mistyped")
    text = error(page)
    assert "styel" in text and "Traceback" not in text


def test_open_an_adapter_and_see_base_live_and_fused(page, place):
    fill(page, "Adapter: a folder, a file or a Hub id", str(place / "style"))
    press(page, "Open adapter")
    page.get_by_text("Weight of style").first.wait_for()
    page.get_by_label("transformer 0").wait_for()
    fill(page, "number input for Steps", "4")
    changed, apart = effect(draw(page))
    assert changed > 20 and apart <= 1
    for label in ("Base", "Live", "Fused"):
        page.locator(".image-container, .image-frame").filter(has=page.locator("img")).first.wait_for()
        assert label
    assert page.locator("img[src*='/file=']").count() >= 3
    shoot(page, place, "side-by-side")


def test_move_a_weight_and_see_the_picture_change(page, place):
    weight = page.get_by_label("number input for Weight of style")
    weight.fill("0")
    weight.press("Tab")
    page.wait_for_timeout(1500)
    assert effect(draw(page)) == (0, 0)
    weight.fill("1.5")
    weight.press("Tab")
    page.wait_for_timeout(1500)
    assert effect(draw(page))[0] > 20
    shoot(page, place, "weight")


def test_switch_blocks_off(page, place):
    for block in range(6):
        page.get_by_label(f"transformer {block}", exact=True).uncheck()
    assert effect(draw(page)) == (0, 0)
    shoot(page, place, "blocks-off")
    for block in range(6):
        page.get_by_label(f"transformer {block}", exact=True).check()
    assert effect(draw(page))[0] > 20


def test_make_a_grid(page, place):
    page.get_by_role("tab", name="Grid").click()
    fill(page, "Seeds of the columns", "0, 1")
    press(page, "Draw the grid")
    page.wait_for_function("[...document.querySelectorAll('img')].some(i => i.naturalWidth > 300 && i.offsetParent)")
    shoot(page, place, "grid")


def test_export_and_see_the_error(page, place):
    page.get_by_role("tab", name="Export, compress, merge").click()
    fill(page, "Folder to write to (a new one)", str(place / "lora"))
    fill(page, "Rank (empty: exact; auto: the least that is as good)", "1")
    page.get_by_label("Format of the LoRA").click()
    page.get_by_role("option", name="peft").click()
    press(page, "Export what is shown as a LoRA")
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value.includes('relative error'))")
    shoot(page, place, "export")
    assert load_file(place / "lora" / "transformer" / "adapter_model.safetensors")
    press(page, "Export what is shown as a LoRA")
    assert "nothing is overwritten" in error(page)


def test_spectrum_and_norms_are_plotted(page, place):
    page.get_by_role("tab", name="Inspect").click()
    press(page, "Plot spectrum and norms")
    page.wait_for_function("[...document.querySelectorAll('img')].some(i => i.naturalWidth > 600 && i.offsetParent)")
    page.locator("svg.chart rect").first.wait_for()
    assert page.locator("svg.chart rect").count() == 6  # one for each block
    shoot(page, place, "inspect")


def test_compress_and_merge_by_button(page, place):
    """The LoRA that equals the adapter comes back as it was; a merge of both is one more adapter, not shown yet."""
    page.get_by_role("tab", name="Export, compress, merge").click()
    rank, folder = "Rank (empty: exact; auto: the least that is as good)", "Folder to write to (a new one)"
    fill(page, rank, "")
    fill(page, folder, str(place / "whole"))
    press(page, "Export what is shown as a LoRA")
    said(page, "exact")
    fill(page, rank, "4")
    fill(page, "LoRA to compress: a file, a folder or a Hub id", str(place / "whole" / "transformer"))
    fill(page, folder, str(place / "small"))
    press(page, "Compress the LoRA")
    text = said(page, "relative error")
    assert float(text.split("relative error ")[1].split()[0]) < 1e-5
    page.get_by_label("number input for Weight of small").wait_for()
    fill(page, rank, "")
    fill(page, folder, str(place / "both"))
    press(page, "Merge what is shown")
    said(page, "both")
    assert page.get_by_label("number input for Weight of both").input_value() == "0"
    shoot(page, place, "merge")
    for name in ("small", "both"):
        assert load_file(place / name / "serial_lora_weights.safetensors")
    press(page, "Compress the LoRA")
    assert "Compressing needs a rank" in error(page)


def said(page, words):
    """The report, once it holds these words."""
    found = "words => [...document.querySelectorAll('textarea')].some(t => t.value.includes(words))"
    page.wait_for_function(found, arg=words)
    return page.get_by_label("Report").input_value()


def test_progress_is_shown_and_cancel_ends_a_drawing(page, place):
    page.get_by_role("tab", name="Side by side").click()
    fill(page, "number input for Steps", "150")
    press(page, "Draw")
    page.locator(".progress-text, .progress-level").filter(visible=True).first.wait_for()
    press(page, "Cancel")
    assert "Stopped" in error(page)
