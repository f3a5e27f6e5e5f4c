"""The dashboard in a real browser, offline: what a person does, by mouse and by keyboard, at two widths and in both themes.

Skipped where there is no Chromium: UNDERTOW_CHROMIUM, or `chromium` on the path (Debian: apt-get install chromium).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest
import uvicorn

from dashboards.guard import access_for
from dashboards.server import create_app
from tests.dashboards.conftest import Made, dashboard_of
from tests.dashboards.test_compare import CARD, OTHER, write_sae
from tests.dashboards.test_runs import write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("UNDERTOW_CHROMIUM") or shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or set UNDERTOW_CHROMIUM")
AXE = os.environ.get("UNDERTOW_AXE")
S = "/s/toy-1"
PATHS = ("/", S, f"{S}/features", f"{S}/f/7", f"{S}/f/7?width=row&breaks=on", f"{S}/prompt", f"{S}/prompt?text=The+keeper&f=7",
         f"{S}/surgery", f"{S}/surgery?f=7&op=floor&x=1&f=9&op=ablate&x=1&role=user&text=Hi&ceiling=none", "/runs",
         "/runs/demo", "/compare", "/compare?s=k4", "/compare?s=toy-1&s=k4&s=k8&overlap=yes")


@pytest.fixture(scope="module")
def address(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    runs = tmp_path_factory.mktemp("runs")
    write_run(made, runs / "demo")
    for name, card in (("k4", CARD), ("k8", OTHER)):
        write_sae(made, runs / name, card)
    notes = tmp_path_factory.mktemp("notes") / "notes.sqlite"
    app = create_app(dashboard_of(made, notes, runs=runs), access_for("127.0.0.1", port, ""))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)
    listening.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page whose every request to another host, and every error of a script or the policy, fails the test."""
    trouble: list[str] = []
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900})

    def only_here(route: object) -> None:
        url = route.request.url  # type: ignore[attr-defined]
        if urlsplit(url).hostname == "127.0.0.1":
            route.continue_()  # type: ignore[attr-defined]
        else:
            trouble.append(f"asked for {url}")
            route.abort()  # type: ignore[attr-defined]

    context.route("**/*", only_here)
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("pageerror", lambda error: trouble.append(f"script error: {error}"))
    # the browser calls every answer of 400 an error; those are the tests' own business
    opened.on("console", lambda message: trouble.append(message.text)
              if message.type == "error" and "status of 400" not in message.text else None)
    yield opened
    context.close()
    assert trouble == []


def test_the_whole_way(page: Page, made: Made) -> None:
    """List, filter, open, keyboard, label with history, star, prompt, reload of permalinks."""
    page.goto("/")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{S}/features")

    page.get_by_label("Sort by").select_option("density")
    page.get_by_label("Order").select_option("down")
    page.get_by_label("Fires").select_option("live")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**sort=density**")
    counts = made.store.columns["count"]
    order = sorted((i for i in range(48) if counts[i]), key=lambda i: (-counts[i], i))
    assert page.locator("#count").inner_text().startswith(f"{len(order)} of 48")
    assert [int(text) for text in page.locator(".grid tbody th").all_inner_texts()] == order

    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("*")
    page.locator(".grid tbody tr:nth-child(2) [aria-pressed=true]").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/f/{order[1]}?**")
    page.keyboard.press("]")
    page.wait_for_url(f"**/f/{order[2]}?**")
    page.keyboard.press("[")
    page.wait_for_url(f"**/f/{order[1]}?**")
    assert page.locator(".head [data-star]").get_attribute("aria-pressed") == "true", "starred in the table"

    for text in ("lamps", "oil lamps"):
        page.keyboard.press("l")
        page.keyboard.type(text)
        with page.expect_navigation():
            page.keyboard.press("Enter")
    assert page.locator("#history li").all_inner_texts()[0].startswith("oil lamps")
    assert page.locator("#history li").count() == 2
    page.reload()
    assert "oil lamps" in page.title()
    assert page.locator("h1 .name").inner_text() == "oil lamps"

    page.keyboard.press("u")
    page.wait_for_url("**/features?**")
    assert page.locator(".grid tbody tr:nth-child(2) .label").inner_text() == "oil lamps"

    page.keyboard.press("t")
    page.wait_for_url(f"**{S}/prompt")
    page.keyboard.press("/")
    page.keyboard.type("The keeper trimmed the lamp <b>twice</b>.")
    page.get_by_role("button", name="Read").click()
    page.wait_for_url("**text=**")
    first = page.locator("#found-title").inner_text()
    assert re.match(r"\d+ features fire on \d+ tokens", first)
    page.get_by_role("link", name=re.compile("heat of feature")).first.click()
    page.locator("#heat-title").wait_for()
    here = page.url
    page.goto("/")
    page.goto(here)
    assert page.locator("#found-title").inner_text() == first, "the address alone brings the view back"
    assert page.locator(".reading mark").count() >= 1


def test_keys_read_activations_and_help(page: Page) -> None:
    page.goto(f"{S}/f/7")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    assert re.search(r": \d", page.locator("#readout").inner_text())
    assert page.locator("mark.read").count() == 1
    page.keyboard.press("g")
    page.keyboard.type("9")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{S}/f/9")
    page.keyboard.press("l")
    page.keyboard.type("j]?s")
    assert page.locator("#label-text").input_value() == "j]?s", "keys are letters while typing"
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.wait_for_url(re.compile(r"/f/\d+$"))


def both_texts(page: Page) -> list[str]:
    return [page.locator(side).inner_text() for side in ("#base", "#operated")]


def operate(page: Page) -> None:
    page.get_by_role("button", name="Operate").click()
    page.locator("#verdict h3").wait_for()


def test_setting_the_table(page: Page, made: Made) -> None:
    """From a feature by its key to the table, and what keys, slider and number do there."""
    page.goto(f"{S}/f/7")
    page.keyboard.press("s")
    page.wait_for_url("**/surgery?f=7&op=strengthen&x=2")
    page.goto(f"{S}/features")
    page.locator(".grid tbody th a").nth(9).focus()
    page.keyboard.press("s")
    page.wait_for_url("**f=9&op=strengthen**")
    page.get_by_role("button", name="Remove feature 9").click()
    page.wait_for_url(re.compile(r"surgery\?f=7&op=strengthen&x=2$"))

    page.get_by_label("Operator on feature 7").select_option("clamp")
    maximum = float(made.store.columns["maximum"][7])
    slider = page.get_by_label("Strength of feature 7", exact=True)
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("-")
    assert page.locator("[data-dose]").input_value() == "2.75", "20 steps of 0.05, and one back of 0.25"
    meaning = page.locator("[data-meaning]").inner_text()
    assert float(meaning.rpartition(" ")[2]) == pytest.approx(2.75 * maximum, rel=0.01)
    page.locator("[data-dose]").fill("40")
    assert float(slider.input_value()) == 40, "the slider follows the number, past its end"
    page.wait_for_url(re.compile(r"surgery\?f=7&op=clamp&x=40$"))


def test_operating(page: Page) -> None:
    """Stream, verdict, lenses, permalink, cancel, save."""
    page.goto(f"{S}/surgery?f=7&op=clamp&x=40")
    page.locator("#prompt").fill("The keeper of the mill <b>")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("New tokens").fill("10")
    page.locator("#prompt").press("Escape")
    page.keyboard.press("o")
    page.locator("#verdict h3").wait_for()
    assert "the word was not said" in page.locator("#verdict").inner_text()
    assert "KL mean" in page.locator("#verdict").inner_text() and page.locator("#tokens tr").count() == 10
    assert page.locator("#operated mark.changed").count() >= 1 and page.locator("#base mark.changed").count() >= 1
    both = both_texts(page)
    page.get_by_label("KL", exact=True).check()
    assert page.locator("#operated > mark.h5").count() >= 1, "a clamp this strong moves something"
    page.locator("#operated").focus()
    page.keyboard.press("ArrowRight")
    assert re.search(r": KL .* nats, hazard", page.locator("#readout").inner_text())
    page.get_by_label("changed words").check()
    assert both_texts(page) == both

    here = page.url
    page.goto("/")
    page.goto(here)
    assert page.locator("[data-dose]").input_value() == "40" and page.locator("#sides").is_hidden()
    assert page.locator("#prompt").input_value() == "The keeper of the mill <b>"
    assert "undertow recipe apply" in page.locator("footer").inner_text()
    operate(page)
    assert both_texts(page) == both, "the address brings the run back"

    page.get_by_label("New tokens").fill("200")
    assert "changed since" in page.locator("#state").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("o")
    page.locator("#tokens tr").nth(2).wait_for(state="attached")
    page.get_by_role("button", name="Cancel").click()
    page.locator("#state", has_text="Cancelled after").wait_for()
    written = page.locator("#tokens tr").count()
    assert 3 <= written < 134 and page.locator("#verdict").is_hidden(), "no verdict on half a run"
    page.get_by_role("button", name="Save as recipe").click()
    page.locator("#saved", has_text="recipes/surgery-").wait_for()
    page.get_by_label("New tokens").fill("4")
    operate(page)


def test_operating_again_at_every_change(page: Page) -> None:
    page.goto(f"{S}/surgery?f=7&op=clamp&x=0&seed=3&tokens=6&text=The+keeper+of+the+mill+%3Cb%3E")
    page.get_by_label("again at every change").check()
    operate(page)
    before = page.locator("#verdict").inner_text()
    page.get_by_label("Strength of feature 7", exact=True).focus()
    page.keyboard.press("End")
    page.wait_for_function("""before => { const now = document.querySelector('#verdict');
                                          return !now.hidden && now.innerText !== before; }""", arg=before)
    assert not page.locator("#result.stale").count()


def test_the_way_to_a_verdict(page: Page) -> None:
    page.goto(f"{S}/features")
    page.keyboard.press("v")
    page.wait_for_url("**/runs")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/demo")
    assert "said" in page.locator("h2 .verdict").inner_text() and page.locator("li.decided").count() == 1
    page.get_by_role("link", name="Open in the operating table").click()
    page.wait_for_url("**/surgery?f=7&op=floor**")
    assert page.locator("#prompt").input_value() == "The keeper"


def test_two_saes_side_by_side_by_keyboard(page: Page) -> None:
    page.goto(f"{S}/features")
    page.keyboard.press("m")
    page.wait_for_url("**/compare")
    for name in ("k4", "k8"):
        while page.evaluate("document.activeElement.value") != name:
            page.keyboard.press("j")
        page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?s=k4&s=k8")
    assert page.locator("td.worse .cue").first.inner_text().startswith("▼ worse")
    page.get_by_role("link", name="Measure the overlap").click()
    page.wait_for_url("**overlap=yes")
    assert "matched" in page.locator("#overlap-title ~ div").inner_text()
    page.get_by_role("link", name="compare with this one").click()
    page.wait_for_url("**/compare?s=k8&s=k4")
    assert page.locator("td.better .cue").first.inner_text().startswith("▲ better")


def test_a_refused_operation_is_said(page: Page) -> None:
    page.goto(f"{S}/surgery?f=7&op=floor&x=1")
    page.get_by_role("button", name="Operate").click()
    page.locator("#state.warning", has_text="the prompt is blank").wait_for()
    page.locator("[data-dose]").fill("lots")
    page.get_by_role("button", name="Operate").click()
    page.locator("#state.warning", has_text="dose").wait_for()
    page.goto(f"{S}/surgery?role=user&text=Hello&f=7&op=floor&x=1&tokens=2")
    page.get_by_role("button", name="+ assistant").click()
    page.wait_for_url("**role=assistant**")
    page.get_by_role("button", name="Remove turn 2").click()
    page.get_by_role("button", name="Operate").click()
    page.locator("#verdict h3").wait_for()


def test_a_refused_label_is_said(page: Page) -> None:
    page.goto(f"{S}/f/7")
    page.evaluate("document.querySelector('#label-text').removeAttribute('maxlength')")
    page.locator("#label-text").fill("x" * 300)
    with page.expect_response("**/label"):
        page.locator("#label-text").press("Enter")
    page.locator("#alert", has_text="at most 200").wait_for()


def test_themes(page: Page) -> None:
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    page.goto(f"{S}/f/7")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(15, 23, 42)")
    page.keyboard.press("d")
    assert ground() == light
    page.reload()
    assert ground() == light, "the choice is kept"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_screen(page: Page, path: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate("""[...document.querySelectorAll('button:not(.hidden), .button, input:not([type=hidden]), select')]
        .filter(e => e.offsetParent && (e.offsetHeight < 24 || e.offsetWidth < 24)).map(e => e.outerHTML)""")
    assert small == [], "targets are at least 24 pixels"


@pytest.mark.skipif(AXE is None, reason="no axe-core: npm pack axe-core, unpack it, and set UNDERTOW_AXE to its axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, scheme: Literal["light", "dark"]) -> None:
    """Every page, and the operating table with a verdict and its heat on it; all rules in light, those of colour in dark."""
    rules = "{}" if scheme == "light" else "{runOnly: ['color-contrast', 'link-in-text-block']}"
    page.emulate_media(color_scheme=scheme)
    found: dict[str, list[str]] = {}
    for path in (*PATHS, "operated"):
        if path == "operated":
            page.goto(f"{S}/surgery?f=7&op=clamp&x=40&seed=3&tokens=10&text=The+keeper+of+the+mill+%3Cb%3E")
            page.get_by_role("button", name="Operate").click()
            page.locator("#verdict h3").wait_for()
            page.get_by_label("KL", exact=True).check()
            page.get_by_text("Token by token").click()
        else:
            page.goto(path)
        page.evaluate(Path(AXE or "").read_text(encoding="utf-8"))
        serious = page.evaluate(f"""async () => (await axe.run({rules})).violations
            .filter(v => ["serious", "critical"].includes(v.impact))
            .map(v => v.id + ": " + v.nodes.map(n => n.html).slice(0, 3).join(" | "))""")
        if serious:
            found[path] = serious
    assert found == {}


def test_axe_would_find_something(page: Page) -> None:
    """Negative control: a field without a name is seen."""
    if AXE is None:
        pytest.skip("no axe-core")
    page.goto("/")
    page.evaluate("document.querySelector('main').append(document.createElement('input'))")
    page.evaluate(Path(AXE).read_text(encoding="utf-8"))
    assert "label" in page.evaluate("async () => (await axe.run()).violations.map(v => v.id)")


def test_reading_needs_no_script(browser: Browser, address: str) -> None:
    context = browser.new_context(base_url=address, java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{S}/features")
    page.get_by_label("Sort by").select_option("density")
    page.get_by_label("Order").select_option("down")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**sort=density**")
    page.locator(".grid tbody th a").first.click()
    page.wait_for_url("**/f/**")
    assert page.locator("mark").count() > 5
    assert page.get_by_text("needs JavaScript").is_visible()
    assert not page.locator("#label-text").is_visible()
    page.get_by_label("Text", exact=True).fill("The lamp.")
    page.get_by_role("button", name="Read").click()
    page.wait_for_url("**text=The+lamp**")
    assert page.locator("#found-title").is_visible()
    context.close()


def test_the_check_on_other_hosts_works(browser: Browser, address: str) -> None:
    """Negative control: a page that does ask another host is seen to."""
    context = browser.new_context(base_url=address)
    asked: list[str] = []
    context.route("**/*", lambda route: (asked.append(route.request.url), route.abort()))
    opened = context.new_page()
    opened.set_content("<img src='http://elsewhere.example/x.png'>")
    opened.wait_for_timeout(200)
    assert asked == ["http://elsewhere.example/x.png"]
    context.close()
