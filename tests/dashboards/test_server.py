"""Pages through HTTP, without a browser: content, escaping, and every kind of request that has to be refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from dashboards.answering import MAX_BODY, Dashboard
from dashboards.finding import collect, named
from dashboards.guard import HEADER, Access, access_for, is_loopback
from dashboards.prompting import MAX_PROMPT
from dashboards.rendering import DATA, STATIC, TEMPLATES
from dashboards.server import create_app
from features.searching import Query
from sae.formats import save_folder
from tests.dashboards.conftest import DEAD, HOST, SCRIPT, Made, dashboard_of, query_of
from undertow.cli.dashboard import _collection
from undertow.core.errors import SpecError

S = "/s/toy-1"
WRITE = {HEADER: "1", "origin": f"http://{HOST}"}
PAGES = ("/", S, f"{S}/features", f"{S}/f/7", f"{S}/f/{DEAD}", f"{S}/prompt", f"{S}/prompt?text=The+keeper&f=7")


class _Elements(HTMLParser):
    """Every start tag of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", PAGES)
def test_pages(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    tags = _Elements(answer.text).found
    scripts = [attrs.get("src") for tag, attrs in tags if tag == "script"]
    assert scripts == ["/static/theme.js", "/static/app.js"], "no other script, whatever the text says"
    for tag, attrs in tags:
        assert "style" not in attrs and not any(name.startswith("on") for name in attrs), tag
        for name in ("src", "href", "action"):
            assert (attrs.get(name) or "/").startswith(("/", "#")), (tag, attrs)
    assert len(answer.content) < 80_000 or "/features" in path


def test_the_table(client: TestClient, made: Made) -> None:
    page = client.get(f"{S}/features", params={"sort": "density", "order": "down"}).text
    shown = [int(n) for n in re.findall(r"/f/(\d+)\?[^\"]*\" data-row", page)]
    counts = made.store.columns["count"]
    assert shown == sorted(range(48), key=lambda i: (-counts[i], i))
    assert 'aria-sort="descending"' in page
    assert "<b>48</b> of 48 features" in page
    assert "undertow dashboard list" in page and "--sort=density" in page
    dead = client.get(f"{S}/features?state=dead").text
    assert "<b>1</b> of 48" in dead and "never fired" in dead
    assert "No feature passes these filters" in client.get(f"{S}/features?density_from=100").text
    assert "There is no page 9" in client.get(f"{S}/features?page=9").text


def test_the_feature_page(client: TestClient, made: Made) -> None:
    page = client.get(f"{S}/f/7", params={"sort": "density", "order": "down"}).text
    assert "toy/1:7" in page
    assert f"Fires on <b>{made.store.columns['count'][7]:,}</b> of {made.store.n_tokens:,} tokens" in page
    order = sorted(range(48), key=lambda i: (-made.store.columns["count"][i], i))
    at = order.index(7)
    for rel, latent in (("prev", order[at - 1]), ("next", order[at + 1])):
        assert f'<link rel="{rel}" href="{S}/f/{latent}?sort=density&amp;order=down">' in page
    assert f"{at + 1} of 48" in page
    assert "undertow features show" in page and " 7 " in page
    assert re.search(r'<mark class="h5 peak" data-v="', page)
    assert "As a table" in page and page.count("<svg") == 2
    assert "Nearest features" in page and "seed 3" in page
    assert "never fired on" in client.get(f"{S}/f/{DEAD}").text


def test_ways_of_showing_contexts(client: TestClient) -> None:
    plain = client.get(f"{S}/f/7").text
    assert client.get(f"{S}/f/7?values=on").text.count('class="value"') > 5 > plain.count('class="value"')
    assert client.get(f"{S}/f/7?breaks=on&width=row").text.count("↵<br>") > plain.count("↵<br>") == 0
    assert len(client.get(f"{S}/f/7?width=short").text) < len(plain) < len(client.get(f"{S}/f/7?width=row").text)
    assert client.get(f"{S}/f/7?width=huge").status_code == 400


def test_json(client: TestClient, made: Made) -> None:
    page = client.get(f"{S}/f/7.json").json()
    assert page["figures"]["count"] == int(made.store.columns["count"][7])
    strongest = page["groups"][0]["passages"][0]
    assert strongest["value"] == pytest.approx(float(made.store.columns["maximum"][7]))
    assert [run["peak"] for run in strongest["runs"]].count(True) == 1
    assert client.get(f"{S}/f/48.json").json()["error"] == "no feature 48: this SAE has 48"


def test_the_prompt_page(client: TestClient, made: Made) -> None:
    text = f"Ana came in.\n{SCRIPT} Été 🙂"
    page = client.get(f"{S}/prompt", params={"text": text, "f": "7"}).text
    assert SCRIPT not in page and "&lt;script&gt;" in page
    assert "undertow features search" in page
    n = int(re.search(r"fire on (\d+) tokens", page)[1])  # type: ignore[index]
    assert n == len(made.subject.encode(text)) - 1
    assert re.search(r"Feature <a href=\"/s/toy-1/f/7\">7</a> over the text", page)
    rare = client.get(f"{S}/prompt", params={"text": text, "sort": "rarity", "top": "3"}).text
    assert rare.count("data-row") == 3
    hidden = client.get(f"{S}/prompt", params={"text": text, "dense": "hide"}).text
    assert "hidden</b>" in hidden


def test_text_is_escaped_everywhere(client: TestClient) -> None:
    """The text of the store holds a script, document names hold markup; label, note and search get some too."""
    nasty = '"><script src=//evil.example></script><img src=x onerror=alert(1)>'
    for kind in ("label", "note"):
        assert client.post(f"{S}/f/7/{kind}", json={"text": nasty}, headers=WRITE).status_code == 200
    pages = [client.get(f"{S}/f/{i}?width=row").text for i in range(0, 48, 6)]
    assert any("&lt;b&gt;" in page for page in pages), "the document's name is shown, escaped"
    assert any("script" in page and "alert" in page for page in pages)
    pages += [client.get(path, params=params).text for path, params in (
        (f"{S}/f/7", {}), (f"{S}/features", {"q": nasty}), (f"{S}/prompt", {"text": nasty}), (f"/s/{nasty}", {}),
        (f"{S}/features", {"sort": nasty}), (f"{S}/go", {"latent": nasty}))]
    for page in pages:
        tags = _Elements(page).found
        assert [attrs for tag, attrs in tags if tag == "script"] == [{"src": "/static/theme.js"},
                                                                     {"src": "/static/app.js", "defer": None}]
        assert [attrs.get("src") for tag, attrs in tags if tag == "img"] == ["/static/icon.svg"]
        assert not [attrs for tag, attrs in tags if tag == "b" and set(attrs) - {"aria-current"}]


def test_labels_notes_and_stars(client: TestClient, dashboard: Dashboard, made: Made) -> None:
    for text in ("lamps", "oil lamps"):
        assert client.post(f"{S}/f/7/label", json={"text": text}, headers=WRITE).json() == {"latent": 7}
    assert client.post(f"{S}/f/7/note", json={"text": "see 8"}, headers=WRITE).status_code == 200
    assert client.post(f"{S}/f/7/star", json={"on": True}, headers=WRITE).status_code == 200
    page = client.get(f"{S}/f/7").text
    assert page.index("oil lamps</span>") and page.index("<li>oil lamps") < page.index("<li>lamps")
    assert "see 8" in page and 'aria-pressed="true"' in page
    assert "<b>1</b> of 48" in client.get(f"{S}/features?starred=yes&labelled=yes&q=LAMPS").text
    assert dashboard.notes.marks(made.store.dictionary).labels == {7: "oil lamps"}
    too_long = client.post(f"{S}/f/7/label", json={"text": "x" * 201}, headers=WRITE)
    assert (too_long.status_code, "at most 200" in too_long.json()["error"]) == (400, True)
    assert client.post(f"{S}/f/48/star", json={"on": True}, headers=WRITE).status_code == 404


@pytest.mark.parametrize(("headers", "status"), [
    ({"host": "evil.example"}, 421), ({"host": "127.0.0.1"}, 421), ({"host": "127.0.0.1:1"}, 421),
    ({"host": f"{HOST}.evil.example"}, 421), ({"host": ""}, 421),
    ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": f"https://{HOST}"}, 403),
    ({"origin": "http://127.0.0.1:8778"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ({"origin": f"http://{HOST}"}, 200),
])
def test_requests_from_elsewhere(client: TestClient, headers: dict[str, str], status: int) -> None:
    for path in (f"{S}/f/7", "/static/app.js"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == status
        assert "content-security-policy" in answer.headers


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 403), ({HEADER: "0"}, 403), ({HEADER: "1", "origin": "http://evil.example"}, 403),
    ({HEADER: "1", "host": "evil.example"}, 421), ({HEADER: "1"}, 200),
])
def test_writing_needs_the_header(client: TestClient, dashboard: Dashboard, made: Made, headers: dict[str, str],
                                  status: int) -> None:
    assert client.post(f"{S}/f/7/star", json={"on": True}, headers=headers).status_code == status
    assert dashboard.notes.marks(made.store.dictionary).starred == (frozenset({7}) if status == 200 else frozenset())


def test_a_form_of_another_site_cannot_write(client: TestClient) -> None:
    """What a page elsewhere can send without asking: a form, with its own origin and no header of ours."""
    answer = client.post(f"{S}/f/7/label", data={"text": "x"}, headers={"origin": "http://evil.example"})
    assert answer.status_code == 403
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, f"{S}/f/7/label").status_code == 403
        assert client.request(method, f"{S}/f/7/label", headers=WRITE).status_code in (404, 405)
    assert client.get(f"{S}/f/7/label").status_code in (404, 405), "reading never writes"


@pytest.mark.parametrize("path", [
    "/s/../../etc/passwd", "/s/..%2F..%2Fetc", "/s/toy-1%2Fmanifest.json", "/s/TOY-1", "/s/nothing/features",
    f"{S}/f/-1", f"{S}/f/%2e%2e", f"{S}/f/7%2F..%2F8", f"{S}/f/48", f"{S}/f/99999999999999999999999", f"{S}/f/0x7",
    f"{S}/f/7.npy",
    "/static/../server.py", "/static/..%2Fserver.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/",
    "/manifest.json", f"{S}/details.npy",
])
def test_ids_are_never_paths(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text and "import" not in answer.text


def test_oversized_requests(client: TestClient) -> None:
    answer = client.get(f"{S}/prompt", params={"text": "x" * (MAX_PROMPT + 1)})
    assert answer.status_code == 400 and "4,001 characters; at most 4,000" in answer.text
    assert client.post(f"{S}/f/7/note", content=b"x" * (MAX_BODY + 1), headers=WRITE).status_code == 413
    for body in (b"", b"[]", b"{", b'{"text": 5}', b'{"text": "x", "more": 1}'):
        assert client.post(f"{S}/f/7/note", content=body, headers=WRITE).status_code == 400


def test_jumping(client: TestClient) -> None:
    for typed in ("7", " toy/1:7 "):
        answer = client.get(f"{S}/go", params={"latent": typed}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, f"{S}/f/7")
    assert client.get(f"{S}/go?latent=48").status_code == 404
    assert client.get(f"{S}/go?latent=lamp").status_code == 400
    assert client.get(f"{S}/random?state=live", follow_redirects=False).headers["location"].startswith(f"{S}/f/")
    assert "clear them" in client.get(f"{S}/random?state=dead").text


def test_tokens(dashboard: Dashboard) -> None:
    app = create_app(dashboard, Access(frozenset({HOST}), "secret"))
    with TestClient(app, base_url=f"http://{HOST}", follow_redirects=False) as client:
        assert client.get("/").status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/static/app.js").status_code == 401
        assert client.get("/", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.post(f"{S}/f/7/star?token=secret", json={"on": True}, headers=WRITE).status_code == 401
        answer = client.get(f"{S}/features?q=a+b&token=secret")
        assert (answer.status_code, answer.headers["location"]) == (303, f"{S}/features?q=a+b")
        assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=strict" in answer.headers["set-cookie"]
        assert client.get("/").status_code == 200
        assert client.get("//evil.example/?token=secret").headers.get("location", "/evil.example").startswith("/evil.example")


def test_who_may_listen() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
    assert access_for("127.0.0.1", 80, "").hosts >= {"127.0.0.1", "127.0.0.1:80", "localhost", "[::1]:80"}
    assert access_for("10.0.0.5", 9000, "t").hosts >= {"10.0.0.5:9000"}
    with pytest.raises(SpecError, match=r"there is no token\n.*--token SECRET"):
        access_for("0.0.0.0", 8777, "")


def test_an_sae_that_changed_is_named(made: Made, tmp_path: Path) -> None:
    """The store shows all that it holds; only the prompt needs the SAE, and says that it is another one."""
    other = dataclasses.replace(made.dictionary, b_dec=made.dictionary.b_dec + 1)
    query = query_of(made, other)
    dashboard = dashboard_of(made, tmp_path / "n", lambda record: query)
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as client:
        answer = client.get(f"{S}/prompt?text=lamp")
        assert answer.status_code == 404
        assert "the store is of SAE" in answer.text and "undertow dashboard build" in answer.text
        assert client.get(f"{S}/f/7").status_code == 200


def test_one_prompt_at_a_time(made: Made, tmp_path: Path) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def slow(record: Mapping[str, Any]) -> Query:
        begun.set()
        assert let_go.wait(20)
        return query_of(made)

    dashboard = dashboard_of(made, tmp_path / "n", slow, wait_s=0.05)
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as client:
        answers: list[int] = []
        first = threading.Thread(target=lambda: answers.append(client.get(f"{S}/prompt?text=lamp").status_code))
        first.start()
        assert begun.wait(20)
        busy = client.get(f"{S}/prompt?text=oil")
        assert busy.status_code == 503 and "another prompt is being read" in busy.text
        assert client.get(f"{S}/f/7").status_code == 200, "other pages go on"
        let_go.set()
        first.join(20)
        assert answers == [200]
        assert client.get(f"{S}/prompt?text=oil").status_code == 200


def test_a_bug_shows_no_traceback(made: Made, tmp_path: Path) -> None:
    def broken(record: Mapping[str, Any]) -> Query:
        raise RuntimeError("the secret inside")

    dashboard = dashboard_of(made, tmp_path / "n", broken)
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}",
                    raise_server_exceptions=False) as client:
        answer = client.get(f"{S}/prompt?text=lamp")
        assert answer.status_code == 500
        assert "secret" not in answer.text and "content-security-policy" in answer.headers
        assert client.get("/").status_code == 200, "the server lives on"


def test_nothing_there_says_what_to_type(made: Made, tmp_path: Path) -> None:
    def home(folder: Path) -> str:
        there = dashboard_of(made, tmp_path / "n" / "n", lambda record: pytest.fail())
        dashboard = dataclasses.replace(there, collection=collect(folder), where=str(folder))
        with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as client:
            return client.get("/").text

    (tmp_path / "empty").mkdir()
    assert "undertow dashboard build smollm2/12 --out" in home(tmp_path / "empty")
    found = collect(made.folder)
    assert list(found.stores) == ["toy-1"] and not found.bare, "the SAE has a store"
    (tmp_path / "bare" / "x").mkdir(parents=True)
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "bare" / "x" / name).write_bytes((made.folder / "sae" / name).read_bytes())
    assert f"undertow dashboard build {tmp_path / 'bare' / 'x'} --out" in home(tmp_path / "bare")
    (tmp_path / "bare" / "damaged").mkdir()
    manifest = '{"kind": "dashboard", "schema": 1, "files": {"x": ""}, "record": {}}'
    (tmp_path / "bare" / "damaged" / "manifest.json").write_text(manifest)
    assert "Not opened." in home(tmp_path / "bare") and "is missing" in home(tmp_path / "bare")


def test_missing_stores_are_built_where_there_is_none(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`undertow dashboard DIR` right after a training: the SAE's store is built in the cache; what cannot be built is said."""
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made.folder / "sae", tmp_path / "runs" / "good")
    nowhere = dataclasses.replace(made.dictionary, provenance=dataclasses.replace(made.dictionary.provenance,
                                                                                  model_name=str(tmp_path / "gone")))
    save_folder(nowhere, tmp_path / "runs" / "lost")
    assert list(_collection(str(tmp_path / "runs"), False).stores) == []
    found = _collection(str(tmp_path / "runs"), None)
    assert [store.dictionary for store in found.stores.values()] == [made.store.dictionary]
    assert next(iter(found.stores.values())).path.parent == tmp_path / "cache" / "dashboards"
    assert not list((tmp_path / "runs").rglob("columns")), "artifacts are read-only"
    # the same weights under another name have the same store; an SAE of its own needs its model
    other = dataclasses.replace(nowhere, b_dec=nowhere.b_dec + 1)
    save_folder(other, tmp_path / "runs" / "other")
    assert any("other" in line and "gone" in line for line in _collection(str(tmp_path / "runs"), True).trouble)


def test_names_in_addresses_are_unique(made: Made) -> None:
    assert list(named([made.store, made.store, made.store])) == ["toy-1-store", "toy-1-store-2", "toy-1-store-3"]


def test_assets_are_small_and_ours() -> None:
    size = sum(path.stat().st_size for path in STATIC.iterdir())
    assert size < 150_000
    for path in (*TEMPLATES.iterdir(), *STATIC.iterdir()):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), path
    assert {path.name for path in DATA.iterdir()} == {"static", "templates"}
    for template in TEMPLATES.iterdir():
        assert "|safe" not in template.read_text(encoding="utf-8").replace(" ", "")


def _luminance(colour: str) -> float:
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_in_both_themes() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#475569", "#34d399") < 4.5, "negative control: a pair known to fail"
    sheet = (STATIC / "style.css").read_text()
    blocks = [block for block in re.findall(r"\{([^{}]*)\}", sheet) if "--h5:" in block]
    light, *dark = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(dark) == 2 and dark[0] == dark[1], "by the system and by choice: the same dark"
    for theme in (light, dark[0]):
        for ground in ("ground", "panel", "h1", "h2", "h3", "h4", "h5", "warn"):
            assert contrast(theme["text"], theme[ground]) >= 4.5, (ground, theme)
        for text in ("quiet", "link"):
            for ground in ("ground", "panel"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground, theme)
        for mark in ("rule", "bar", "below", "focus"):
            assert contrast(theme[mark], theme["ground"]) >= 3, (mark, theme)
