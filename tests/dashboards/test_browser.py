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
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import uvicorn

from dashboards.finding import Collection, named
from dashboards.guard import access_for
from dashboards.notes import Notes
from dashboards.prompting import Reader
from dashboards.server import Dashboard, create_app
from features.searching import Query
from tests.dashboards.conftest import SITE, Made

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("UNDERTOW_CHROMIUM") or shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or set UNDERTOW_CHROMIUM")
S = "/s/toy-1"


@pytest.fixture(scope="module")
def address(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    query = Query(made.subject, made.subject.site(SITE), made.dictionary, "toy/1", None)
    dashboard = Dashboard(Collection(named([made.store])), Notes(tmp_path_factory.mktemp("notes") / "notes.sqlite"),
                          Reader(lambda record: query), "here")
    app = create_app(dashboard, access_for("127.0.0.1", port, ""))
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
    page.keyboard.press("s")
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
    page.get_by_role("link", name=re.compile("Lay feature")).first.click()
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


@pytest.mark.parametrize("path", ["/", S, f"{S}/features", f"{S}/f/7", f"{S}/f/7?width=row&breaks=on", f"{S}/prompt",
                                  f"{S}/prompt?text=The+keeper&f=7"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_screen(page: Page, path: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate("""[...document.querySelectorAll('button, .button, input:not([type=hidden]), select')]
        .filter(e => e.offsetParent && (e.offsetHeight < 24 || e.offsetWidth < 24)).map(e => e.outerHTML)""")
    assert small == [], "targets are at least 24 pixels"


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
