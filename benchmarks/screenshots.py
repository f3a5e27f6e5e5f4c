"""Pictures of the dashboard, page by page, from a real browser.

    python benchmarks/screenshots.py runs docs/screenshots
    python benchmarks/screenshots.py runs/smollm2-12-dashboard docs/screenshots --prefix smollm2- --only feature --latent 2316

It starts `undertow dashboard DIR` as a person would, and needs what the browser tests need: playwright and Chromium.
DIR holds a finished run of `undertow demo` with its SAE, and another SAE to compare it with.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("UNDERTOW_CHROMIUM") or shutil.which("chromium")
MOST_BYTES = 200_000
WIDE, NARROW, HEIGHT = 1280, 360, 900
TEXT = "Ana came in from the rain. The keeper set the lamp by the door and poured the last of the oil."
Scheme = Literal["light", "dark"]


class View(NamedTuple):
    """A page: the name of its picture, its address, how tall the picture is, and what to do before it is taken."""

    name: str
    path: str
    height: int = HEIGHT
    prepare: Callable[[Page], None] = lambda page: None


def main() -> None:
    """Take every view in both themes, and one at the width of a telephone."""
    from playwright.sync_api import sync_playwright

    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", help="what undertow dashboard is to show")
    asked.add_argument("out", type=Path, help="folder of the pictures")
    asked.add_argument("--prefix", default="", help="put before the name of every picture")
    asked.add_argument("--only", default="", help="names of the views to take, with commas; default: all")
    asked.add_argument("--latent", type=int, help="the feature to show; default: the first that was chosen")
    words = asked.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in words.only.split(",") if name]
    with served(words.folder) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for view in views(browser, address, words.latent):
            if wanted and view.name not in wanted:
                continue
            name = words.prefix + view.name
            for scheme in ("light", "dark"):
                take(browser, address, view, (WIDE, scheme), words.out / f"{name}-{scheme}.png")
            if name == "feature":
                take(browser, address, view, (NARROW, "light"), words.out / f"{name}-{NARROW}.png")
        browser.close()


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The dashboard of `folder` on a free port; gives its address."""
    command = [str(Path(sys.executable).parent / "undertow"), "dashboard", folder, "--port", "0", "--no-open", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


def views(browser: Browser, address: str, chosen: int | None) -> list[View]:
    """The views, with what there is in that folder: a feature that was chosen, a run, two SAEs."""
    page = browser.new_page(base_url=address)
    page.set_default_timeout(600_000)
    page.goto("/runs")
    runs = [found.get_attribute("href") for found in page.locator("a[data-row]").all()]
    page.goto("/compare")
    saes = [str(found.get_attribute("value")) for found in page.locator("input[name=s]").all()]
    stores = _stores(page)
    store = stores[0]
    if runs:
        page.goto(str(runs[0]))
        link = page.get_by_role("link", name="Open in the operating table")
        store = str(link.get_attribute("href")).split("/")[2] if link.count() else store
    page.goto(f"/s/{store}/features?sort={'chosen' if runs else 'maximum'}&order={'up' if runs else 'down'}")
    feature = str(page.locator("a[data-row]").first.get_attribute("href"))
    if chosen is not None:
        feature = f"/s/{store}/f/{chosen}"
    latent = re.search(r"/f/(\d+)", feature)
    page.close()
    assert latent is not None
    found = [View("stores", "/", 620), View("features", feature.replace(f"/f/{latent[1]}", "/features")),
             View("feature", feature, 1100),
             View("prompt", f"/s/{store}/prompt?text={TEXT.replace(' ', '+')}", 1000, heat)]
    if runs:
        found += [View("surgery", str(runs[0]), 1500, operate), View("runs", "/runs", 420), View("run", str(runs[0]), 1500)]
    if len(saes) > 1:
        ordered = [store, *(key for key in saes if key != store)]
        found.append(View("compare", f"/compare?s={ordered[0]}&s={ordered[1]}&overlap=yes", 1200))
    return [*found, View("help", feature, HEIGHT, lambda page: page.keyboard.press("?"))]


def _stores(page: Page) -> list[str]:
    page.goto("/healthz")
    return json.loads(page.locator("body").inner_text())["stores"]


def heat(page: Page) -> None:
    """One of the features that fire, over the text."""
    page.get_by_role("link", name=re.compile("heat of feature")).nth(2).click()
    page.locator("#heat-title").wait_for()


def operate(page: Page) -> None:
    """From a verdict to the operating table, and there through one operation."""
    page.get_by_role("link", name="Open in the operating table").click()
    page.get_by_role("button", name="Operate").click()
    page.locator("#verdict h3").wait_for()
    page.locator("#result-title").scroll_into_view_if_needed()
    page.evaluate("window.scrollTo(0, 0)")


def take(browser: Browser, address: str, view: View, size: tuple[int, Scheme], path: Path) -> None:
    """One picture, in a palette, which halves it. Raises ValueError if it is larger than MOST_BYTES even so."""
    width, scheme = size
    context = browser.new_context(base_url=address, viewport={"width": width, "height": view.height}, color_scheme=scheme,
                                  reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(600_000)
    page.goto(view.path)
    view.prepare(page)
    picture = page.screenshot()
    context.close()
    path.write_bytes(in_palette(picture))
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,}")
    sys.stdout.write(f"{path}  {path.stat().st_size:,} bytes\n")


def in_palette(picture: bytes) -> bytes:
    """The same picture in 128 colours."""
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(made, "png", optimize=True)
    return made.getvalue()


if __name__ == "__main__":
    main()
