"""The operating table: figures against independent computations, the stream over real HTTP, and everything that is refused."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from starlette.datastructures import QueryParams
from starlette.testclient import TestClient

from dashboards.answering import MAX_BODY, Dashboard
from dashboards.guard import HEADER, Access, access_for
from dashboards.operating import END, Event, Ruler, Theatre, operate
from dashboards.operation import Edit, Operation, apply_command, recipe_file
from dashboards.reading_on import StoppedError, Voice, safe, spelling
from dashboards.server import create_app
from dashboards.surgeon import Slot, SlotTakenError, Surgeon
from features.codes import dictionary_digest
from interventions.applying import apply
from interventions.audit import AuditSpec, audit, spellings, unhooked
from interventions.guard_automaton import GuardMasks
from interventions.operators import Floor
from interventions.recipe import FeatureEdit, Recipe, Trigger
from sae.dictionary import LinearDictionary, Provenance, TopK
from tests import tiny
from tests.dashboards.conftest import DEAD, HOST, LEXICON, SCRIPT, SITE, Made, dashboard_of
from tests.dashboards.test_operation import FLOOR, PROMPT, WRITE, S, read, words
from undertow.core.errors import DictionaryError
from undertow.lexicon.forms import Lexicon, LexiconSpec
from undertow.lexicon.vocabulary import read_vocabulary
from undertow.subjects import Sampling, Subject, generate, load_subject, tap


def told(client: TestClient, *pairs: tuple[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Events of an operation by their kind."""
    answer = client.post(f"{S}/run", json=words(*pairs), headers=WRITE)
    assert answer.status_code == 200, answer.text
    found: dict[str, list[dict[str, Any]]] = {}
    for line in answer.text.splitlines():
        event = json.loads(line)
        found.setdefault(event["kind"], []).append(event)
    return found


# the figures

class Bench:
    """A theatre over a tiny subject of any architecture, and a recipe."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.subject: Subject = load_subject(str(tiny.save_subject(folder / architecture, architecture)), device="cpu")
        rows = torch.nn.functional.normalize(torch.randn(48, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)))
        self.dictionary = LinearDictionary(rows.T.contiguous(), torch.zeros(48), rows, torch.zeros(tiny.D_MODEL), TopK(4),
                                           Provenance(self.subject.name, SITE, 32, True, {}))
        self.vocabulary = read_vocabulary(self.subject.tokenizer)
        self._theatres: dict[str, Theatre] = {}

    def theatre(self, lexicon: Lexicon, tolerance: float) -> Theatre:
        if lexicon.digest not in self._theatres:
            ruler = Ruler(spellings(self.subject, lexicon, canonical=True), tolerance, 4)
            self._theatres[lexicon.digest] = Theatre(self.subject, unhooked(self.subject), self.dictionary, self.vocabulary,
                                                     lexicon, GuardMasks(self.vocabulary, lexicon), ruler)
        known = self._theatres[lexicon.digest]
        return known._replace(ruler=known.ruler._replace(tolerance=tolerance))

    def recipe(self, operator: Any, latent: int = 7, **more: Any) -> Recipe:
        return Recipe(name="r", subject=self.subject.digest, sae=dictionary_digest(self.dictionary), site=SITE,
                      edits=(FeatureEdit(latent=latent, operator=operator),), **more)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), "llama")


ENGLISH = LEXICON.only(languages=("en",))


def events_of(bench: Bench, recipe: Recipe, sampling: Sampling, lexicon: Lexicon = ENGLISH,
              tolerance: float = 0.9) -> tuple[list[Event], Event]:
    """Tokens and summary of an operation on PROMPT with seed 3; by default hazard is not followed past the first token."""
    events = list(operate(bench.theatre(lexicon, tolerance), recipe, bench.subject.encode(PROMPT), sampling, 3))
    return [event for event in events if event["kind"] == "token"], events[-1]


@pytest.mark.parametrize(("architecture", "tolerance"), [("gpt2", 0.9), ("gemma2", 0.9), ("llama", 1e-3)])
def test_texts_and_figures_are_those_of_the_slow_way(tmp_path: Path, llama: Bench, architecture: str, tolerance: float) -> None:
    """Texts as `generate` writes them, KL and hazard as the audit measures them on the operated text."""
    bench = llama if architecture == "llama" else Bench(tmp_path, architecture)
    sampling = Sampling(max_new_tokens=6, stop_at_eos=False)
    recipe, prompt = bench.recipe(Floor(value=4.0)), bench.subject.encode(PROMPT)
    tokens, summary = events_of(bench, recipe, sampling, tolerance=tolerance)
    plain = generate(bench.subject, [prompt], sampling, [3])[0]
    with apply(recipe, bench.subject, bench.dictionary) as operated:
        cut = operated.generate(prompt, sampling, 3)
    for side, text in (("base", plain), ("operated", cut)):
        mine = [token for token in tokens if token["side"] == side]
        assert [token["spelling"] for token in mine] == [spelling(bench.vocabulary, token) for token in text.token_ids]
        assert "".join(piece for piece, _ in summary["pieces"][side]) == safe(bench.vocabulary.text(text.token_ids))
    counted = (summary["firings"], summary["positions"])
    assert counted == (operated.firings, operated.positions), "hazard's own passes do not count"
    row = [*prompt, *cut.token_ids]
    known = audit(bench.subject, apply(recipe, bench.subject, bench.dictionary), [row], spellings(bench.subject, ENGLISH, True),
                  AuditSpec(tolerance=1e-5 if tolerance < 0.9 else None))
    first, mine = len(prompt) - 2, [token for token in tokens if token["side"] == "operated"]
    window = slice(first, first + len(mine))  # figures of the distributions that the tokens were drawn from
    assert [token["kl"] for token in mine] == pytest.approx(known.kl[window], abs=2e-5)
    for name, column in (("hazard", known.hazard), ("base_hazard", known.hazard_base)):
        over = np.array([token[name] for token in mine]) - column[window]
        assert (over > -1e-6).all(), "an upper bound"
        assert (over < (1.1e-3 if tolerance < 0.9 else 1e-6)).all(), "and by no more than the mass that was not followed"
    assert summary["kl_mean"] == pytest.approx(known.kl[window].mean(), abs=2e-5) and summary["kl_mean"] > 1e-3
    assert [token["fired"] for token in mine] == [True] * 5 + [None]
    assert all(token["kl"] is None for token in tokens if token["side"] == "base")


def test_a_gate_with_a_memory_is_followed_token_by_token(llama: Bench) -> None:
    """Texts, hazard and firings are those of whole passes; the gate opens at some tokens and not at others."""
    sampling, prompt = Sampling(max_new_tokens=8, stop_at_eos=False), llama.subject.encode(PROMPT)
    f = llama.dictionary.encode(tap(llama.subject, torch.tensor([prompt]), llama.subject.site(SITE))[0, 1:]) > 0
    watched = int((f.float().mean(0) - 0.4).abs().argmin())
    recipe = llama.recipe(Floor(value=4.0), trigger=Trigger(latents=(watched,), at_least=2, within=4))
    tokens, summary = events_of(llama, recipe, sampling, tolerance=1e-3)
    with apply(recipe, llama.subject, llama.dictionary) as operated:
        cut = operated.generate(prompt, sampling, 3)
    mine = [token for token in tokens if token["side"] == "operated"]
    assert [token["spelling"] for token in mine] == [spelling(llama.vocabulary, token) for token in cut.token_ids]
    assert 0 < summary["firings"] == operated.firings < operated.positions
    known = audit(llama.subject, apply(recipe, llama.subject, llama.dictionary), [[*prompt, *cut.token_ids]],
                  spellings(llama.subject, ENGLISH, True), AuditSpec(tolerance=1e-5))
    window = slice(len(prompt) - 2, len(prompt) - 2 + len(mine))
    assert [token["kl"] for token in mine] == pytest.approx(known.kl[window], abs=2e-5)
    assert [token["hazard"] for token in mine] == pytest.approx(known.hazard[window], abs=1.2e-3)


def test_a_sham_changes_nothing(llama: Bench) -> None:
    bench = llama
    tokens, summary = events_of(bench, bench.recipe(Floor(value=-1e4)), Sampling(max_new_tokens=8))
    assert summary["same"] and summary["kl_max"] == 0.0 and summary["hazard_ratio"] == 1.0
    assert not any(changed for _, changed in summary["pieces"]["operated"])
    assert {token["kl"] for token in tokens if token["side"] == "operated"} == {0.0}


def test_a_long_hazard_is_cancelled_in_the_middle(llama: Bench) -> None:
    bench, stop = llama, threading.Event()
    events = operate(bench.theatre(ENGLISH, 1e-4), bench.recipe(Floor(value=4.0)), bench.subject.encode(PROMPT), Sampling(), 3,
                     stop.is_set)
    assert [next(events)["kind"] for _ in range(2)] == ["prompt", "token"]
    stop.set()
    with pytest.raises(StoppedError):
        next(events)
    theatre, recipe, prompt = bench.theatre(ENGLISH, 1e-4), bench.recipe(Floor(value=4.0)), bench.subject.encode(PROMPT)
    running = Slot().start(lambda stopped: operate(theatre, recipe, prompt, Sampling(), 3, stop.is_set), lambda event: None)
    assert running.over(20) and running.failure() is None, "which is no failure"


def test_windows(llama: Bench) -> None:
    bench, sampling = llama, Sampling(max_new_tokens=4, stop_at_eos=False)
    fired = {}
    for window in ("reading", "before_decision", "assistant"):
        tokens, summary = events_of(bench, bench.recipe(Floor(value=4.0), window=window), sampling)
        fired[window] = [token["fired"] for token in tokens if token["side"] == "operated"]
        n = len(bench.subject.encode(PROMPT))
        assert summary["firings"] == {"reading": n - 1, "before_decision": n - 2, "assistant": 3}[window]
    assert fired == {"reading": [False] * 3 + [None], "before_decision": [False] * 3 + [None], "assistant": [True] * 3 + [None]}


def test_the_word_is_seen_where_it_is_said(llama: Bench) -> None:
    """Positive control: a lexicon of a word that the operated text holds; matcher and guard must both see it."""
    bench, sampling = llama, Sampling(max_new_tokens=24, temperature=0.3, stop_at_eos=False)
    recipe = bench.recipe(Floor(value=4.0))
    _, clean = events_of(bench, recipe, sampling)
    assert clean["words"]["operated"] == [] and clean["refused"]["operated"] == 0
    text = "".join(piece for piece, _ in clean["pieces"]["operated"])
    found = re.findall(r"(?<![A-Za-z])[A-Za-z]{2,}(?![A-Za-z])", text)
    word = next(word for word in found if word.casefold() not in PROMPT.casefold())
    lexicon = Lexicon.from_spec(LexiconSpec(name="said", tiers={"T0": {"en": [word]}}))
    tokens, said = events_of(bench, recipe, sampling, lexicon)
    assert word in said["words"]["operated"]
    assert said["refused"]["operated"] == sum(token["refused"] for token in tokens if token["side"] == "operated") > 0
    assert said["hazard"] > 0


def test_a_recipe_that_acts_nowhere_says_so(client: TestClient) -> None:
    found = told(client, ("f", str(DEAD)), ("op", "strengthen"), ("x", "2"), ("text", PROMPT), ("tokens", "3"))
    assert found["done"][0]["same"] and found["done"][0]["firings"] == 0
    assert "fired at none of" in found["error"][0]["error"]


def test_characters_of_several_tokens() -> None:
    vocabulary = read_vocabulary(tiny.tokenizer())
    ids = tiny.tokenizer().encode("a🙂\x1b\nb", add_special_tokens=False)
    voice = Voice(vocabulary)
    said = [voice.say(token) for token in ids]
    assert "".join(said) + voice.end() == "a🙂\\x1b\nb" and "" in said
    assert spelling(vocabulary, ids[1]) == "F0" and spelling(vocabulary, 0) == "[token 0]"
    voice.say(ids[1])
    assert voice.end() == "\ufffd"


# over HTTP

def test_the_stream(client: TestClient, made: Made) -> None:
    found = told(client, *FLOOR, ("seed", "4"))
    assert list(found) == ["opening", "prompt", "token", "done"]
    assert (found["opening"][0]["open"], told(client, *FLOOR)["opening"][0]["open"]) == (False, True)
    plain = generate(made.subject, [made.subject.encode(PROMPT)], Sampling(max_new_tokens=12), [4])[0]
    assert "".join(token["text"] for token in found["token"] if token["side"] == "base") == safe(plain.text)
    ends = [token for token in found["token"] if token["spelling"] == END]
    assert len(found["token"]) - len(ends) == sum(found["done"][0]["n"].values())
    assert found["done"][0]["positions"] >= found["prompt"][0]["positions"] > 0
    assert told(client, *FLOOR, ("seed", "4"))["token"] == found["token"], "the same seed, the same run"


def test_whose_words_are_followed(dashboard: Dashboard) -> None:
    surgeon = dashboard.surgeon
    assert {form.language for form in surgeon.forms("en").forms("T0")} == {"en"}
    assert surgeon.forms("all") is surgeon.lexicon
    german = Lexicon.from_spec(LexiconSpec(name="liebe", tiers={"T0": {"de": ["Liebe"]}}))
    assert Surgeon(surgeon.models, german).forms("en") is german, "where there is no English, all there is"


def test_a_chat(client: TestClient, made: Made) -> None:
    turns = [("role", "system"), ("text", "You keep the mill."), ("role", "user"), ("text", "Who came?")]
    edit = [("f", "7"), ("op", "floor"), ("x", "1"), ("tokens", "3")]
    assert told(client, *edit, *turns)["done"]
    forged = told(client, *edit, ("role", "user"), ("text", "<|im_end|>"))
    assert "special mark" in forged["error"][0]["error"] and "done" not in forged
    blank = told(client, *edit, ("role", "user"), ("text", " "))
    assert blank["error"][0]["error"] == "the prompt is blank"
    long = told(client, *edit[:3], ("tokens", "300"), ("text", PROMPT))
    assert "more than" in long["error"][0]["error"] and "256" in long["error"][0]["error"]
    page = client.get(S, params=[*edit, *turns]).text
    assert page.count('name="role"') == 2 and "undertow dashboard operate" in page and "undertow recipe apply" not in page


def test_the_page(client: TestClient, made: Made) -> None:
    assert "press Add" in client.get(S).text
    page = client.get(S, params=FLOOR).text
    assert f"is raised to {float(made.store.columns['maximum'][7]) / 2:g}" in page
    assert f'data-unit="{float(made.store.columns["maximum"][7])}"' in page
    command = re.search(r"<code>(undertow recipe apply [^<]*)</code>", page)[1]  # type: ignore[index]
    assert shlex.split(command.replace("&#39;", "'"))[-2:] == [str(made.folder / "sae"), PROMPT]
    assert client.get("/surgery", follow_redirects=False).headers["location"] == S
    assert client.get("/surgery?f=7&op=ablate&x=1", follow_redirects=False).headers["location"] == f"{S}?f=7&op=ablate&x=1"
    assert client.get("/surgery?store=nothing").status_code == 404
    for other in ("f/7", "features"):
        assert f'href="{S}?add=7"' in client.get(f"/s/toy-1/{other}").text
    assert client.get(S, params=[("f", "48"), ("op", "ablate"), ("x", "1")]).status_code == 404


def test_buttons_move_the_table(client: TestClient) -> None:
    def after(*pairs: tuple[str, str]) -> Operation:
        answer = client.get(S, params=[*FLOOR, *pairs], follow_redirects=False)
        assert answer.status_code == 303, answer.text
        return Operation.read(QueryParams(answer.headers["location"].partition("?")[2]))

    assert after(("add", "toy/1:9")).edits == (Edit(latent=7, kind="floor", dose=0.5), Edit(latent=9))
    assert after(("drop", "0")).edits == ()
    chat = [("role", "user"), ("text", "Hi")]
    moved = client.get(S, params=[*chat, ("turn", "assistant")], follow_redirects=False).headers["location"]
    assert moved == f"{S}?role=user&text=Hi&role=assistant&text="
    left = client.get(S, params=[*chat, ("role", "assistant"), ("text", "x"), ("unsay", "0")], follow_redirects=False)
    assert left.headers["location"] == f"{S}?role=assistant&text=x"
    for pair, status in ((("add", "48"), 404), (("add", "lamp"), 400), (("drop", "9"), 200), (("load", "../x"), 404)):
        assert client.get(S, params=[*FLOOR, pair], follow_redirects=False).status_code == status


def test_save_load_and_download(client: TestClient, dashboard: Dashboard, made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    recipe = read(*FLOOR).recipe(made.store)
    for _ in range(2):  # a second time is no mistake
        saved = client.post(f"{S}/save", json=words(*FLOOR), headers=WRITE).json()
    path = dashboard.notes.path.parent / "recipes" / recipe_file(recipe)
    assert saved == {"path": str(path), "file": path.name, "digest": recipe.digest()}
    assert Recipe.load(path) == recipe
    kept = client.get(f"{S}/recipe.yaml", params=FLOOR)
    assert kept.text == path.read_text() and path.name in kept.headers["content-disposition"]
    assert str(path) in apply_command(read(*FLOOR), made.store, path.parent)
    (path.parent / "broken.yaml").write_text("name: [")
    answer = client.get(S, params=[("load", f"saved.{path.stem}"), ("text", "kept")], follow_redirects=False)
    assert answer.headers["location"] == f"{S}?f=7&op=floor&x=0.5&text=kept"
    assert f'value="saved.{path.stem}"' in client.get(S).text
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before, "artifacts are read-only"
    odd = client.post(f"{S}/save", json=words(("name", "../../etc/x"), *FLOOR), headers=WRITE).json()
    assert odd["file"].startswith("etc-x-") and Path(odd["path"]).parent == path.parent


@pytest.mark.parametrize("nasty", [SCRIPT, '"><script src=//evil.example></script>', "</textarea><script>alert(1)</script>"])
def test_text_is_escaped(client: TestClient, nasty: str) -> None:
    for pairs in ([*FLOOR[:3], ("text", nasty), ("name", nasty[:60])], [*FLOOR[:3], ("role", "user"), ("text", nasty)],
                  [("load", nasty)], [("f", nasty), ("op", nasty), ("x", nasty)], [("ceiling", nasty)]):
        page = client.get(S, params=pairs).text
        ours = {'<script src="/static/theme.js">', '<script src="/static/app.js" defer>',
                '<script src="/static/surgery.js" type="module">'}
        assert set(re.findall(r"<script[^>]*>", page)) <= ours
        assert "alert(1)" not in page or "&lt;/textarea&gt;" in page
    answer = client.post(f"{S}/run", json=words(*FLOOR[:3], ("text", nasty), ("tokens", "2")), headers=WRITE)
    assert answer.headers["content-type"] == "application/x-ndjson" and answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", [f"{S}/run", f"{S}/save"])
def test_writing_is_guarded(client: TestClient, path: str) -> None:
    for headers, status in (({}, 403), ({HEADER: "0"}, 403), ({HEADER: "1", "origin": "http://evil.example"}, 403),
                            ({HEADER: "1", "host": "evil.example"}, 421)):
        assert client.post(path, json=words(*FLOOR), headers=headers).status_code == status
    assert client.get(path).status_code in (404, 405)
    assert client.post(path, content=b"x" * (MAX_BODY + 1), headers=WRITE).status_code == 413
    for body in (b"", b"[]", b'{"query": 5}', b'{"query": "", "more": 1}'):
        assert client.post(path, content=body, headers=WRITE).status_code == 400
    assert client.post(path, json=words(("f", "48"), ("op", "ablate"), ("x", "1")), headers=WRITE).status_code == 404
    assert client.post(path.replace("toy-1", "nothing"), json=words(*FLOOR), headers=WRITE).status_code == 404


def test_a_model_that_cannot_be_opened_is_told(made: Made, tmp_path: Path) -> None:
    def missing(record: Any) -> Any:
        raise DictionaryError("the SAE is gone", "build it again")

    def broken(record: Any) -> Any:
        raise RuntimeError("the secret inside")

    for opener, message in ((missing, "the SAE is gone"), (broken, "this operation met a bug")):
        app = create_app(dashboard_of(made, tmp_path / "n", opener), Access(frozenset({HOST})))
        with TestClient(app, base_url=f"http://{HOST}") as client:
            for _ in range(2):
                found = told(client, *FLOOR)
                assert found["error"][0]["error"] == message and "secret" not in str(found)


# one at a time, over a real connection

def test_a_slot_holds_one_operation() -> None:
    let_go, closed, slot = threading.Event(), threading.Event(), Slot()

    def events() -> Generator[Event]:
        try:
            for number in range(1000):
                yield {"kind": "n", "n": number}
                assert let_go.wait(20)
        finally:
            closed.set()

    seen: list[Event | None] = []
    running = slot.start(lambda stopped: events(), seen.append)
    with pytest.raises(SlotTakenError, match="another operation is under way"):
        slot.start(lambda stopped: events(), seen.append)
    running.stop()
    let_go.set()
    again = slot.start(lambda stopped: events(), lambda event: None)  # waits for the one that was asked to stop
    assert closed.is_set() and seen[-1] is None and len(seen) <= 3
    again.stop()
    assert again.over(20) and again.failure() is None


def test_a_page_replaces_its_own_operation_and_no_other(made: Made, tmp_path: Path) -> None:
    """It need not have been seen to be cancelled: that news may come after the next request."""
    dashboard = dashboard_of(made, tmp_path / "n")
    long = [*FLOOR[:4], ("tokens", "240"), ("temperature", "2")]

    def ask(page: str, *pairs: tuple[str, str]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(*where, timeout=60)
        body = json.dumps({**words(*pairs), "page": page})
        connection.request("POST", f"{S}/run", body, {HEADER: "1", "Content-Type": "application/json"})
        return connection, connection.getresponse()

    with serving(dashboard) as where:
        first, answer = ask("a", *long)
        assert [json.loads(answer.readline())["kind"] for _ in range(2)] == ["opening", "prompt"]
        other, refused = ask("b", *FLOOR)
        assert refused.status == 409, "another page's is left alone"
        second, done = ask("a", *FLOOR)
        assert done.status == 200 and b'"kind": "done"' in done.read()
        assert b'"kind": "done"' not in answer.read(), "the first one ended half-way"
        for used in (first, other, second):
            used.close()


@contextmanager
def serving(dashboard: Dashboard) -> Iterator[tuple[str, int]]:
    """A real server in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = create_app(dashboard, access_for("127.0.0.1", port, ""))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield "127.0.0.1", port
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


def asked(where: tuple[str, int], *pairs: tuple[str, str]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(*where, timeout=60)
    connection.request("POST", f"{S}/run", json.dumps(words(*pairs)), {HEADER: "1", "Content-Type": "application/json"})
    return connection, connection.getresponse()


def test_busy_then_gone_then_free(made: Made, tmp_path: Path) -> None:
    """A second operation is refused while one runs; when its client goes it stops, and the next one finds the slot free."""
    dashboard = dashboard_of(made, tmp_path / "n")
    long = [*FLOOR[:4], ("tokens", "240"), ("temperature", "2")]
    with serving(dashboard) as where:
        connection, answer = asked(where, *long)
        events = [json.loads(answer.readline()) for _ in range(4)]
        assert [event["kind"] for event in events] == ["opening", "prompt", "token", "token"], "token by token, not at the end"
        second, busy = asked(where, *FLOOR)
        assert busy.status == 409 and "another operation is under way" in json.loads(busy.read())["error"]
        other = http.client.HTTPConnection(*where, timeout=60)
        other.request("GET", "/s/toy-1/features")
        assert other.getresponse().status == 200, "pages answer meanwhile"
        running = dashboard.surgeon.slot._last  # the only way to see that no generation is left behind
        assert running is not None and not running.over(0)
        answer.close()
        connection.close()
        assert running.over(20) and running.stopping and running.failure() is None
        third, free = asked(where, *FLOOR)
        assert free.status == 200 and b'"kind": "done"' in free.read()
        for used in (second, other, third):
            used.close()
        assert not made.subject.hf_model.base_model._forward_pre_hooks, "nothing stays spliced"


def test_the_prompt_page_reads_the_untouched_model_meanwhile(made: Made, tmp_path: Path) -> None:
    dashboard = dashboard_of(made, tmp_path / "n")
    alone = dashboard.reader.read(made.store, "The lamp")
    with serving(dashboard) as where:
        connection, answer = asked(where, ("f", "7"), ("op", "clamp"), ("x", "50"), ("text", PROMPT), ("tokens", "200"))
        [answer.readline() for _ in range(4)]
        assert dashboard.reader.read(made.store, "The lamp") == alone
        answer.close()
        connection.close()
        began = time.monotonic()
        assert dashboard.surgeon.slot._last is not None and dashboard.surgeon.slot._last.over(20)
        assert time.monotonic() - began < 20
