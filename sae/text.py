"""Text sources: a file, a folder, a fetched corpus, the packaged world, a Hugging Face data set; one document at a time.

    from sae.text import read_documents
    for document in read_documents("notes/", column=None): ...

Text is untrusted data: whatever it holds, it is read as plain characters and never as a command to the tokenizer.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from undertow.core.errors import ArtifactError, TextError, near_matches
from undertow.core.spec import Spec
from undertow.core.storage import cache_dir, open_artifact

log = logging.getLogger(__name__)

Split = Literal["train", "held_out"]
FETCHED = ("brown",)
ARTIFACT_KIND = "text"
WORLD = "keeper"
WORLD_STORIES = 10_000
WORLD_SEED = 20_000  # apart from the seeds that the packaged organisms are trained and judged on
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DEFAULT_COLUMNS = ("text", "messages", "conversations")
LONG_CHARS = 20_000  # a .txt file longer than this is cut into passages
PASSAGE_CHARS = 4_000
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
          "model": "assistant", "bot": "assistant"}
_PARQUET_ROWS = 256


class TextSpec(Spec):
    """What text to read and how to cut it.

    Attributes:
        source: a file or folder (.txt, .jsonl, .jsonl.gz, .parquet), a fetched corpus ("brown"), the Keeper's world
            ("keeper", or "keeper:5000" for so many stories), a Hugging Face data set (its "train" split), or several of these
            joined by "+" ("keeper:3000+brown"), as many characters of one as of another until one ends.
        column: column or key of the text; None takes the first of text, messages, conversations.
        chat: render every document by the tokenizer's chat template.
        context: tokens in a row, position 0 included.
        held_out: share of the documents kept out of training, in (0, 0.5).
    """

    source: str = Field(min_length=1)
    column: str | None = None
    chat: bool = False
    context: int = Field(default=256, ge=16, le=8192)
    held_out: float = Field(default=0.05, gt=0, lt=0.5)


class Message(NamedTuple):
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


class Document(NamedTuple):
    """One document, the unit of the held-out split; `messages` is empty unless the record is a chat."""

    id: str
    text: str
    messages: tuple[Message, ...] = ()


class Side(NamedTuple):
    """One side of the split: document ids in order, their SHA-256 (32 bytes each, joined), characters in all."""

    document_ids: tuple[str, ...]
    hashes: bytes
    n_chars: int


class Splits(NamedTuple):
    """Both sides; a document is held out if its hash, read as bytes, is below `cut`."""

    cut: bytes
    train: Side
    held_out: Side


def read_documents(source: str, column: str | None) -> Iterator[Document]:
    """Documents of `source`, in a fixed order, with unique ids, in bounded memory. Blank ones are left out.

    A record's id is its "id" where that is a string, else `file:line` (`file:row` in Parquet). A `.txt` file is one
    document; one longer than 20,000 characters is cut at blank lines into passages of at least 4,000 characters (at a
    line's end where 20,000 characters pass without a blank line), each a document of its own, named `file:line` by its
    first line: otherwise a book could not be split into training and held-out text.

    Args:
        source: see TextSpec.
        column: see TextSpec.

    Raises TextError: no such source, nothing readable in it, an unknown column, bytes that are not UTF-8 (named by file
    and byte), a bad line of JSON (named by file and line), or no text at all.
    """
    seen: set[str] = set()
    blank = 0
    for document in _open(source, column):
        if not document.text.strip():
            blank += 1
            continue
        name = document.id
        while name in seen:
            name = f"{name} ({len(seen) + blank + 1})"
        seen.add(name)
        yield document._replace(id=name)
    if not seen:
        raise TextError(f"{source} holds no text" + (f" ({blank} blank documents)" if blank else ""),
                        "choose another --text or --column")
    if blank:
        log.info("%s: left out %d blank documents", source, blank)


def document_hash(document: Document) -> bytes:
    """SHA-256 of the text; decides the side of the split."""
    return hashlib.sha256(document.text.encode()).digest()


def split_documents(documents: Iterable[Document], held_out: float) -> Splits:
    """Assign documents to sides by the hash of their text; one pass, only ids and hashes are kept.

    A document is held out if its hash, as a fraction of 2²⁵⁶, is below `held_out`. Equal texts fall on one side, and no
    document's side depends on the order or on the others, with one exception: where a side would be empty, the text
    with the smallest hash is held out, or that with the largest is trained on.

    Raises TextError: fewer than two different documents.
    """
    listed = [(document.id, document_hash(document), len(document.text)) for document in documents]
    hashes = [value for _, value, _ in listed]
    if not hashes or min(hashes) == max(hashes):
        raise TextError(f"the text has {len(set(hashes))} different document(s), and more are needed: "
                        "at least 2 different ones, to train on one and judge on the other",
                        "give a folder, one record a line (.jsonl), or a .txt of more than 20,000 characters")
    cut = int(held_out * 2.0**256).to_bytes(32, "big")
    # One above the smallest hash, or the largest itself: the nearest cuts that leave no side empty.
    smallest_out = (int.from_bytes(min(hashes), "big") + 1).to_bytes(32, "big")
    cut = min(max(cut, smallest_out), max(hashes))
    return Splits(cut, _side([row for row in listed if row[1] >= cut]), _side([row for row in listed if row[1] < cut]))


def _side(rows: list[tuple[str, bytes, int]]) -> Side:
    return Side(tuple(name for name, _, _ in rows), b"".join(value for _, value, _ in rows), sum(n for _, _, n in rows))


def as_chat(document: Document) -> tuple[Message, ...]:
    """The document's own messages; a plain text becomes a user's turn and an assistant's.

    The user's turn is the first paragraph (up to a blank line), or the first sentence or line of a text that has only
    one paragraph; a text of one sentence is a user's turn alone. A mark after fewer than three letters ends no sentence
    ("Mr.").
    """
    if document.messages:
        return document.messages
    text = document.text.strip()
    parts = re.split(r"\n[ \t]*\n", text, maxsplit=1)
    if len(parts) == 1:
        parts = re.split(r"(?<=\w\w\w[.!?])[\"'”’)\]]*\s+|\n", text, maxsplit=1)
        parts = [text[: len(text) - len(parts[1])], parts[1]] if len(parts) == 2 else parts
    turns = (Message("user", parts[0].strip()), Message("assistant", parts[-1].strip()))
    return turns if len(parts) == 2 and all(turn.content for turn in turns) else (Message("user", text),)


# Sources


def _open(source: str, column: str | None) -> Iterator[Document]:
    parts = source.split("+")
    if len(parts) > 1 and all(parts) and not Path(source).expanduser().exists():
        return _mixed([_open(part, column) for part in parts])
    if source == WORLD or source.startswith(f"{WORLD}:"):
        return _world(source)
    if source in FETCHED:
        return _jsonl(_fetched(source), column, source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, column)
    if path.exists():
        return _file(path, column, path.name)
    if path.is_absolute() or source.startswith((".", "~")) or source.endswith(SUFFIXES) or source.count("/") > 1:
        raise TextError(f"there is no text file or folder {source!r}", _near_path(path))
    return _hub(source, column)


def _mixed(sources: Sequence[Iterator[Document]]) -> Iterator[Document]:
    """Always from the source of which the fewest characters were given."""
    given = dict.fromkeys(range(len(sources)), 0)
    while given:
        least = min(given, key=lambda i: given[i])
        document = next(sources[least], None)
        if document is None:
            del given[least]
        else:
            given[least] += len(document.text)
            yield document


def _world(source: str) -> Iterator[Document]:
    from undertow.subjects.keeper.world import load_world

    _, colon, count = source.partition(":")
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise TextError(f"{source!r}: {count!r} is not a number of stories", f"{WORLD}:5000, or {WORLD} for {WORLD_STORIES:,}")
    world = load_world()
    return (Document(f"{WORLD}:{index}", world.story(WORLD_SEED, index).text)
            for index in range(int(count) if colon else WORLD_STORIES))


def _fetched(name: str) -> Path:
    folder = cache_dir() / "texts" / name
    if not folder.exists():
        raise TextError(f"the text {name!r} has not been fetched yet", f"undertow text fetch {name}")
    try:
        return open_artifact(folder, ARTIFACT_KIND).path / f"{name}.jsonl.gz"
    except ArtifactError as error:
        raise TextError(error.what, f"undertow text fetch {name}") from None


def _near_path(path: Path) -> str:
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return near_matches(path.name, names) or "texts are .txt, .jsonl, .jsonl.gz and .parquet files, or a folder of them"


def _folder(path: Path, column: str | None) -> Iterator[Document]:
    files = sorted(((item.relative_to(path).as_posix(), item) for item in path.rglob("*")
                    if item.name.endswith(SUFFIXES) and item.is_file()), key=lambda pair: pair[0])
    if not files:
        raise TextError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    return chain.from_iterable(_file(item, column, name) for name, item in files)


def _file(path: Path, column: str | None, label: str) -> Iterator[Document]:
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        ".txt": lambda: _plain(path, label), ".jsonl": lambda: _jsonl(path, column, label),
        ".jsonl.gz": lambda: _jsonl(path, column, label), ".parquet": lambda: _parquet(path, column, label)}
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise TextError(f"{path} is of a kind that cannot be read",
                        f"texts are {', '.join(SUFFIXES)} files, or a folder of them")
    return readers[suffix]()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with "\\n") of a UTF-8 file, unpacked if it ends in .gz."""
    start = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                yield number, _decode(raw, path, number, start)
                start += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"cannot read {path}: {error}") from None


def _decode(raw: bytes, path: Path, number: int, start: int) -> str:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of the unpacked text" if path.suffix == ".gz" else ""
        raise TextError(
            f"{path} is not UTF-8: byte {start + error.start}{unpacked} (line {number}) is 0x{raw[error.start]:02x}",
            f"convert it: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}") from None
    return (line.removeprefix("\ufeff") if number == 1 else line).replace("\r\n", "\n")


def _plain(path: Path, label: str) -> Iterator[Document]:
    lines = _lines(path)
    head: list[tuple[int, str]] = []
    length = 0
    for number, line in lines:
        head.append((number, line))
        length += len(line)
        if length > LONG_CHARS:
            break
    if length <= LONG_CHARS:
        yield Document(f"{label}:1", "".join(line for _, line in head).strip("\n"))
        return
    held: Document | None = None  # held back, since a short last passage is joined to the one before it
    for number, text in _passages(chain(head, lines)):
        if held is not None and len(text) < PASSAGE_CHARS:
            held = held._replace(text=f"{held.text}\n\n{text}")
            continue
        if held is not None:
            yield held
        held = Document(f"{label}:{number}", text)
    if held is not None:
        yield held


def _passages(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(first line's number, text) of runs that end at a blank line; only the last may be short."""
    run: list[str] = []
    first = length = 0
    for number, line in lines:
        blank = not line.strip()
        if not run and blank:
            continue
        first = first if run else number
        run.append(line)
        length += 0 if blank else len(line)
        if (blank and length > PASSAGE_CHARS) or length > LONG_CHARS:
            yield first, "".join(run).strip("\n")
            run, length = [], 0
    if run:
        yield first, "".join(run).strip("\n")


# Records


def _jsonl(path: Path, column: str | None, label: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{where} is not JSON: {error}", "one JSON object a line is needed") from None
        if not isinstance(values, dict):
            raise TextError(f"{where} holds {type(values).__name__}, not an object",
                            'one object a line is needed: {"text": "..."}')
        yield _document(values, pick_column(list(values), column, where), f"{label}:{number}", where)


def _parquet(path: Path, column: str | None, label: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = pick_column(names, column, str(path))
            wanted = [chosen, *(["id"] if "id" in names and chosen != "id" else [])]
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{path}, row {number}"
                    values = {name: _cell(batch.column(name)[index], name, where) for name in wanted}
                    yield _document(values, chosen, f"{label}:{number}", where)
    except (OSError, pyarrow.ArrowException) as error:
        raise TextError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def _cell(cell: Any, name: str, where: str) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise TextError(f"{where} is not UTF-8: byte {error.start} of column {name!r} is "
                        f"0x{error.object[error.start]:02x}") from None


def _hub(name: str, column: str | None) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(name, split="train")
    except Exception as error:  # noqa: BLE001  (the hub's client raises a dozen kinds)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TextError(
            f"unknown text {name!r}: no file or folder of that name, not a known text ({', '.join(FETCHED)}), and "
            f"Hugging Face's loader says: {reason}",
            near_matches(name, FETCHED) or "give a file or a folder, or: undertow text fetch brown") from None
    chosen = pick_column(list(rows.column_names), column, f"data set {name}")
    kept = [chosen, *(["id"] if "id" in rows.column_names and chosen != "id" else [])]
    for number, values in enumerate(rows.select_columns(kept), start=1):
        yield _document(values, chosen, f"{name}:{number}", f"data set {name}, row {number}")


def pick_column(names: list[str], asked: str | None, where: str) -> str:
    """The column to read: `asked`, else the first default there is. Raises TextError that lists the columns."""
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
    if asked is not None:
        if asked in names:
            return asked
        raise TextError(f"{where} has no column {asked!r}; it has: {listed}", near_matches(asked, names))
    found = next((name for name in DEFAULT_COLUMNS if name in names), None)
    if found is None:
        raise TextError(f"{where} has none of the columns {', '.join(DEFAULT_COLUMNS)}; it has: {listed}",
                        "name the one to read: --column NAME")
    return found


def _document(values: Mapping[str, Any], column: str, place: str, where: str) -> Document:
    value, named = values[column], values.get("id")
    messages: tuple[Message, ...] = ()
    if isinstance(value, list):
        messages = tuple(_message(item, f"{where}, message {i}") for i, item in enumerate(value, start=1))
        value = "\n".join(f"{message.role}: {message.content}" for message in messages)
    if value is not None and not isinstance(value, str):
        raise TextError(f"{where}: column {column!r} holds {type(value).__name__}, not text or messages",
                        "choose the one that holds the text: --column NAME")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{where}: character {error.start} of {column!r} is half a surrogate pair") from None
    return Document(named if isinstance(named, str) and named and column != "id" else place, value or "", messages)


def _message(item: Any, where: str) -> Message:
    role, content = (None, None)
    if isinstance(item, dict):
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise TextError(f"{where} is {str(item)[:60]!r}",
                        'a message is {"role": ..., "content": ...} or {"from": ..., "value": ...}')
    if role.lower() not in _ROLES:
        raise TextError(f"{where} has the unknown role {role!r}", f"roles are {', '.join(_ROLES)}")
    return Message(_ROLES[role.lower()], content)
