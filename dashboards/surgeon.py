"""Who operates: opens what an operation needs, at first use, and sees to it that there is one operation at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import final

from dashboards.models import Models
from dashboards.operating import Event, Ruler, Theatre, operate
from dashboards.operation import Operation
from dashboards.reading_on import StoppedError
from dashboards.store import FeatureStore
from interventions.audit import spellings, unhooked
from interventions.guard_automaton import GuardMasks
from undertow.core.errors import SpecError, TextError, UserError
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.vocabulary import read_vocabulary
from undertow.subjects.chat import render
from undertow.subjects.subject import Subject

STOPPING_S = 20.0
"""How long a new operation waits for one that was cancelled: the model may be in the middle of being opened."""
_FAST = "en"
Begin = Callable[[Callable[[], bool]], Generator[Event]]
"""Begins an operation; it is given a way to ask whether it should stop."""


class SlotTakenError(UserError):
    """Another operation is under way."""


@final
class Surgeon:
    """Operates on the models of the stores.

    Args:
        models: the models.
        lexicon: the word that must not be said.
    """

    def __init__(self, models: Models, lexicon: Lexicon) -> None:
        self.models, self.lexicon = models, lexicon
        self.slot = Slot()
        self._theatres: dict[tuple[str, str], Theatre] = {}

    def events(self, store: FeatureStore, operation: Operation,
               stopped: Callable[[], bool] = lambda: False) -> Generator[Event]:
        """Open the model if need be, then operate (see `operating.operate`). The first event says whether it is open already.

        Raises any UserError of opening the model, of the recipe, of the prompt; see `operate`.
        """
        recipe = operation.recipe(store)
        yield {"kind": "opening", "open": (store.dictionary, operation.words) in self._theatres}
        theatre = self._theatre(store, operation.words)
        prompt = encode(theatre.subject, operation)
        _require_room(theatre.subject, len(prompt), operation.tokens)
        yield from operate(theatre, recipe, prompt, operation.sampling(), operation.seed, stopped)

    def forms(self, words: str) -> Lexicon:
        """Forms whose hazard is followed: English ones if there are any and "en" is asked for, else all."""
        known = {form.language for form in self.lexicon.forms("T0")}
        return self.lexicon.only(languages=(_FAST,)) if words == _FAST and _FAST in known else self.lexicon

    def _theatre(self, store: FeatureStore, words: str) -> Theatre:
        key = (store.dictionary, words)
        if key not in self._theatres:
            known = self.models.open(store)
            alike = next((theatre for (digest, _), theatre in self._theatres.items() if digest == store.dictionary), None)
            # English as the tokenizer writes it needs no long look ahead; every spelling of every language does
            fast = words == _FAST
            ruler = Ruler(spellings(known.subject, self.forms(words), canonical=fast), *((1e-4, 4) if fast else (1e-5, 8)))
            if alike is None:
                vocabulary = read_vocabulary(known.subject.tokenizer)
                alike = Theatre(known.subject, unhooked(known.subject), known.dictionary, vocabulary, self.lexicon,
                                GuardMasks(vocabulary, self.lexicon), ruler)
            self._theatres[key] = alike._replace(ruler=ruler)
        return self._theatres[key]


def encode(subject: Subject, operation: Operation) -> list[int]:
    """The prompt as token ids. Raises TextError for a blank one, and for a chat that the tokenizer cannot write."""
    if not any(turn.text.strip() for turn in operation.turns):
        raise TextError("the prompt is blank", "type the beginning of a text, then press Operate")
    if not operation.is_chat:
        return subject.encode(operation.turns[0].text)
    return render(subject.tokenizer, [(str(turn.role), turn.text) for turn in operation.turns], reply=True).ids


def _require_room(subject: Subject, prompt: int, new: int) -> None:
    room = getattr(subject.hf_model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(room, int) and prompt + new > room:
        raise SpecError(f"a prompt of {prompt:,} tokens and {new:,} new ones are more than {subject.name} reads: {room:,}",
                        "shorten the prompt, or ask for fewer tokens")


@final
class Running:
    """An operation under way in the worker thread. Its events go to `put`, and then None."""

    def __init__(self, pool: ThreadPoolExecutor, begin: Begin, put: Callable[[Event | None], None]) -> None:
        self._stopped = threading.Event()
        self._future: Future[None] = pool.submit(self._run, begin, put)

    def stop(self) -> None:
        """Ask it to stop after the token that it is at."""
        self._stopped.set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopped.is_set()

    def over(self, timeout_s: float) -> bool:
        """Whether it has ended, or ends within so many seconds."""
        return bool(wait_for([self._future], timeout_s).done)

    def failure(self) -> BaseException | None:
        """What it ended with; to be asked once it has ended."""
        return self._future.exception()

    def _run(self, begin: Begin, put: Callable[[Event | None], None]) -> None:
        try:
            with contextlib.suppress(StoppedError), contextlib.closing(begin(self._stopped.is_set)) as events:
                for event in events:  # closed here, so that the splice is undone in the thread that made it
                    if self._stopped.is_set():
                        break
                    put(event)
        finally:
            put(None)


@final
class Slot:
    """Room for one operation at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "surgery")
        self._lock = threading.Lock()
        self._last: Running | None = None
        self._page = ""

    def start(self, begin: Begin, put: Callable[[Event | None], None], page: str = "") -> Running:
        """Begin an operation in the worker thread. It replaces one of the same `page` ("" is none).

        Raises SlotTakenError if another page's is under way; one that was asked to stop is waited for.
        """
        with self._lock:
            if self._last is not None and page and page == self._page:
                self._last.stop()
            if self._last is not None and not self._last.over(STOPPING_S if self._last.stopping else 0.0):
                raise SlotTakenError("another operation is under way, and there is room for one",
                                     "press Cancel there, or wait until it is done, then press Operate again")
            self._last, self._page = Running(self._pool, begin, put), page
            return self._last
