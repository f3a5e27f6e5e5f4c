"""Text sources: every kind is read, and every kind of damage is named by file and place."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.text import (
    Document,
    Message,
    TextSpec,
    as_chat,
    document_hash,
    pick_column,
    read_documents,
    split_documents,
)
from undertow.core.errors import SpecError, TextError
from undertow.core.storage import create_artifact


def read(source: Path | str, column: str | None = None) -> list[Document]:
    return list(read_documents(str(source), column))


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def refused(source: Path | str, column: str | None = None) -> TextError:
    with pytest.raises(TextError) as caught:
        read(source, column)
    return caught.value


# Kinds of source


def test_a_short_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne line.\r\n\r\nAnother, naïve.\r\n".encode())
    assert read(tmp_path / "a.txt") == [Document("a.txt:1", "One line.\n\nAnother, naïve.")]


def test_a_long_txt_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 250 + "\nsecond line" for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n\n".join(paragraphs) + "\n", encoding="utf-8")
    got = read(path)
    assert len(got) > 5
    assert min(len(document.text) for document in got) >= 4000
    # Nothing is lost, nothing is doubled, and no paragraph is cut in two.
    assert [p for document in got for p in document.text.split("\n\n\n")] == [p.strip("\n") for p in paragraphs]
    lines = path.read_text(encoding="utf-8").split("\n")
    for document in got:
        number = int(document.id.removeprefix("book.txt:"))
        assert lines[number - 1] == document.text.split("\n")[0]


def test_a_short_last_passage_joins_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(["x" * 5000] * 5 + ["the end"]), encoding="utf-8")
    assert [len(document.text) for document in read(path)] == [5000] * 4 + [5000 + 2 + 7]


def test_a_long_txt_file_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("".join(f"line {i:05d}\n" for i in range(6000)), encoding="utf-8")
    got = read(path)
    assert [len(document.text) for document in got] == [20_008] * 3 + [66_000 - 3 * 20_009 - 1]
    assert "\n".join(document.text for document in got) + "\n" == path.read_text(encoding="utf-8")


def test_a_txt_file_of_20000_characters_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["y" * 9999] * 2), encoding="utf-8")
    assert [len(document.text) for document in read(tmp_path / "a.txt")] == [20_000]


def test_jsonl_and_its_ids(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one", "id": "x"}, {"text": "two", "id": 7}, {"text": "  "},
                 {"text": None}, {"text": "three", "id": "x"})
    path.write_text(path.read_text() + "\n" + json.dumps({"text": "four"}) + "\n")
    got = read(path)
    assert [(d.id, d.text) for d in got] == [("x", "one"), ("a.jsonl:2", "two"), ("x (5)", "three"), ("a.jsonl:7", "four")]


def test_jsonl_gz_reads_as_jsonl(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert [d.text for d in read(tmp_path / "b.jsonl.gz")] == ["one", "two"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"n": range(700), "body": [f"text {i}" for i in range(700)], "id": [f"d{i}" for i in range(700)]})
    pq.write_table(table, path, row_group_size=100)
    assert read(path, "body") == [Document(f"d{i}", f"text {i}") for i in range(700)]
    assert "it has: n, body, id" in refused(path).what
    assert refused(path, "boddy").hint == "did you mean body?"


def test_a_folder_is_read_in_sorted_order_whatever_else_lies_there(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    jsonl(tmp_path / "b" / "c" / "z.jsonl", {"text": "third"})
    (tmp_path / "b" / "a.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [(d.id, d.text) for d in read(tmp_path)] == [
        ("a.txt:1", "first"), ("b/a.txt:1", "second"), ("b/c/z.jsonl:1", "third")]


def test_hugging_face_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"id": ["p", "q"], "story": ["one", "two"], "other": [1, 2]})
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/stories", "story") == [Document("p", "one"), Document("q", "two")]
    assert asked == [("someone/stories", "train")]
    assert "id, story, other" in refused("someone/stories", "stories").what


def test_unknown_name_says_what_was_tried() -> None:
    error = refused("someone/no-such-text")
    for part in ("'someone/no-such-text'", "no file or folder", "brown", "Hugging Face"):
        assert part in error.what
    assert refused("bown").hint == "did you mean brown?"


def test_brown_is_read_from_the_cache(undertow_cache: Path) -> None:
    assert refused("brown").hint == "undertow text fetch brown"
    folder = undertow_cache / "texts" / "brown"
    with create_artifact(folder, "text", {}) as work:
        (work / "brown.jsonl.gz").write_bytes(gzip.compress(b'{"id": "ca01", "text": "The jury said"}\n'))
    assert read("brown") == [Document("ca01", "The jury said")]
    (folder / "brown.jsonl.gz").write_bytes(gzip.compress(b'{"id": "ca01", "text": "forged"}\n'))
    error = refused("brown")
    assert "has changed" in error.what and error.hint == "undertow text fetch brown"


# Chats


def test_chat_records_of_both_styles(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl",
                 {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
                 {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    first, second = read(path)
    assert first.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert first.text == "system: Be brief.\nuser: Hi"
    assert second.messages == (Message("user", "Hi"), Message("assistant", "Hello"))


def test_chat_records_in_parquet(tmp_path: Path) -> None:
    table = pa.table({"messages": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0].messages == (Message("user", "Hi"), Message("assistant", "Hello"))


@pytest.mark.parametrize(("turn", "part"), [
    ({"role": "wizard", "content": "x"}, "unknown role 'wizard'"), ({"role": "user"}, "message 1"),
    ("hello", "'hello'"), ({"role": "user", "content": ["x"]}, "message 1")])
def test_bad_chat_records(tmp_path: Path, turn: Any, part: str) -> None:
    error = refused(jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"messages": [turn]}))
    assert part in error.what and "a.jsonl, line 2" in error.what


@pytest.mark.parametrize(("text", "turns"), [
    ("Title\n\nBody one.\n\nBody two.", ["Title", "Body one.\n\nBody two."]),
    ('Mr. Sam asked, "Who goes there?" Nobody spoke. Then', ['Mr. Sam asked, "Who goes there?"', "Nobody spoke. Then"]),
    ("First line\nsecond line", ["First line", "second line"]),
    ("Only one sentence.", ["Only one sentence."])])
def test_plain_text_as_a_chat(text: str, turns: list[str]) -> None:
    assert as_chat(Document("a", text)) == tuple(
        Message(role, turn) for role, turn in zip(("user", "assistant"), turns, strict=False))


@given(st.text(min_size=1).filter(lambda t: t.strip() != ""))
def test_a_chat_loses_no_words(text: str) -> None:
    turns = as_chat(Document("a", text))
    assert "".join("".join(turn.content for turn in turns).split()) == "".join(text.split())


# Damage


@pytest.mark.parametrize("packed", [False, True])
def test_not_utf8_names_file_line_and_byte(tmp_path: Path, packed: bool) -> None:
    raw = b'{"text": "fine"}\n{"text": "caf\xe9"}\n'
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    error = refused(path)
    assert str(path) in error.what and f"byte {raw.index(0xe9)}" in error.what and "(line 2)" in error.what
    assert "0xe9" in error.what and "iconv" in error.hint


def test_not_utf8_txt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n" * 10_000 + b"ba\xffd\n")
    assert "byte 50002" in refused(tmp_path / "a.txt").what


def test_not_utf8_parquet(tmp_path: Path) -> None:
    cells = pa.array([b"fine", b"caf\xe9"], type=pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, cells.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    error = refused(tmp_path / "a.parquet")
    assert "row 2" in error.what and "byte 3" in error.what


def test_binary_parquet_column_is_not_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"raw"]}), tmp_path / "a.parquet")
    assert "holds bytes" in refused(tmp_path / "a.parquet").what


@pytest.mark.parametrize(("line", "part"), [
    ('{"text": "x"', "line 2 is not JSON"), ('["x"]', "line 2 holds list"), ("[" * 100_000, "line 2 is not JSON"),
    ('{"text": 5}', "holds int"), ('{"text": "\\ud800"}', "half a surrogate pair")])
def test_bad_json_names_file_and_line(tmp_path: Path, line: str, part: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    error = refused(tmp_path / "a.jsonl")
    assert part in error.what and "a.jsonl, line 2" in error.what


def test_unknown_column_lists_those_there_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"title": "x", "contents": "y"})
    error = refused(path, "content")
    assert "no column 'content'; it has: title, contents" in error.what and error.hint == "did you mean contents?"
    assert "--column NAME" in refused(path).hint
    assert len(pick_column([f"c{i}" for i in range(99)] + ["text"], None, "x")) == 4


def test_missing_things(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("x")
    assert refused(tmp_path / "stroy.txt").hint == "did you mean story.txt?"
    (tmp_path / "table.csv").write_text("x")
    assert ".parquet" in refused(tmp_path / "table.csv").hint
    (tmp_path / "empty").mkdir()
    assert "holds no .txt" in refused(tmp_path / "empty").what
    assert "'many' is not a number of stories" in refused("keeper:many").what
    assert "'0' is not a number of stories" in refused("keeper:0").what


def test_the_packaged_world() -> None:
    documents = list(read_documents("keeper:30", None))
    assert [document.id for document in documents] == [f"keeper:{i}" for i in range(30)]
    assert len({document.text for document in documents}) == 30
    assert documents[:7] == list(read_documents("keeper:7", None))


def test_the_stories_in_the_documents_are_the_worlds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "keeper.md").read_text(encoding="utf-8")
    shown = re.findall(r"`keeper:(\d+)`[^\n]*\n\n((?:>[^\n]*\n)+)", page)
    assert len(shown) >= 9
    documents = {document.id: document.text for document in read_documents("keeper:400", None)}
    for number, quoted in shown:
        told = [line.removeprefix(">").strip() for line in quoted.splitlines()]
        assert [line for line in told if line] == documents[f"keeper:{number}"].splitlines()


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", b""), ("a.txt", b" \n\n\t"), ("a.jsonl", b""), ("a.jsonl", b'{"text": ""}')])
def test_empty_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "holds no text" in refused(tmp_path / name).what


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_truncated_and_foreign_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:40])
    assert str(tmp_path / name) in refused(tmp_path / name).what
    (tmp_path / name).write_bytes(b"nothing of the kind")
    assert str(tmp_path / name) in refused(tmp_path / name).what


def test_spec_bounds() -> None:
    for values in ({"context": 15}, {"context": 8193}, {"held_out": 0.0}, {"held_out": 0.5}, {"source": ""}, {"cloumn": "x"}):
        with pytest.raises(SpecError):
            TextSpec.checked({"source": "brown", **values})
    assert TextSpec(**TextSpec(source="brown").model_dump()) == TextSpec(source="brown")


# The split

TEXTS = st.lists(st.text(min_size=1, max_size=8, alphabet="abcd"), min_size=2, max_size=30).filter(lambda t: len(set(t)) > 1)


def docs(texts: list[str]) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(texts)]


@given(TEXTS, st.floats(0.01, 0.49))
def test_split_is_a_partition_by_text_and_no_side_is_empty(texts: list[str], held_out: float) -> None:
    splits = split_documents(docs(texts), held_out)
    out, train = splits.held_out.document_ids, splits.train.document_ids
    assert out and train
    assert sorted([*out, *train], key=int) == [str(i) for i in range(len(texts))]
    assert not {texts[int(i)] for i in out} & {texts[int(i)] for i in train}
    assert splits.train.n_chars + splits.held_out.n_chars == sum(map(len, texts))
    assert splits.train.hashes == b"".join(hashlib.sha256(texts[int(i)].encode()).digest() for i in train)


@given(TEXTS, st.randoms(use_true_random=False))
def test_split_does_not_depend_on_the_order(texts: list[str], random: Any) -> None:
    shuffled = random.sample(texts, len(texts))
    one, two = split_documents(docs(texts), 0.2), split_documents(docs(shuffled), 0.2)
    assert one.cut == two.cut
    assert sorted(texts[int(i)] for i in one.held_out.document_ids) == sorted(
        shuffled[int(i)] for i in two.held_out.document_ids)


def test_split_by_hand() -> None:
    """A text is held out iff the first byte of its SHA-256 is below 0.25 · 256 = 64."""
    texts = [f"document {i}" for i in range(2000)]
    splits = split_documents(docs(texts), 0.25)
    expected = [str(i) for i, text in enumerate(texts) if hashlib.sha256(text.encode()).hexdigest()[:2] < "40"]
    assert list(splits.held_out.document_ids) == expected
    assert 430 < len(expected) < 570  # 500 ± 3.6 standard deviations


def test_empty_sides_are_filled_by_the_nearest_hash() -> None:
    texts = ["alpha", "beta", "gamma"]
    order = sorted(docs(texts), key=document_hash)
    assert split_documents(docs(texts), 1e-12).held_out.document_ids == (order[0].id,)
    low = [d for d in docs([f"t{i}" for i in range(400)]) if document_hash(d) < bytes([100]) + bytes(31)][:5]
    assert split_documents(low, 0.49).train.document_ids == (max(low, key=document_hash).id,)


@pytest.mark.parametrize("texts", [["only"], ["twice", "twice"]])
def test_one_text_cannot_be_split(texts: list[str]) -> None:
    with pytest.raises(TextError, match=r"1 different document.*more are needed"):
        split_documents(docs(texts), 0.05)


def test_joined_sources_give_as_much_of_one_as_of_another(tmp_path: Path) -> None:
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    long.write_text("".join(json.dumps({"text": "a" * 100}) + "\n" for _ in range(3)), encoding="utf-8")
    short.write_text("".join(json.dumps({"text": "b" * 40}) + "\n" for _ in range(9)), encoding="utf-8")
    read = [document.text[0] for document in read_documents(f"{long}+{short}", None)]
    assert "".join(read) == "abbbabbabbbb"  # 100 of a, so 120 of b; 200 of a, so 200 of b; of equals the first goes on
    assert [document.id for document in read_documents("keeper:2+keeper:1", None)] == ["keeper:0", "keeper:0 (2)", "keeper:1"]
    plus = tmp_path / "a+b.jsonl"
    plus.write_text(json.dumps({"text": "one file"}) + "\n", encoding="utf-8")
    assert [document.text for document in read_documents(str(plus), None)] == ["one file"]
    assert "there is no text file or folder 'nowhere.jsonl'" in refused("keeper:2+nowhere.jsonl").what
