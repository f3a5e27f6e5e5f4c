"""`undertow text`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from undertow.cli.main import main


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.save_text(tmp_path / "stories.jsonl", copies=2)
    assert main(["text", "show", str(path), "--held-out", "0.2", "--json"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out.splitlines()[-1])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert values["documents"] == values["train_documents"] + values["held_out_documents"] == len(rows) == 120
    assert values["characters"] == sum(len(row["text"]) for row in rows)
    assert "0-0  The keeper of the lighthouse" in err


def test_show_with_a_model_counts_by_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.save_text(tmp_path / "stories.jsonl")
    model = tiny.save_subject(tmp_path / "model", "llama")
    capsys.readouterr()
    assert main(["text", "show", str(path), "--model", str(model), "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = tiny.tokenizer()
    tokens = sum(len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in path.read_text().splitlines())
    assert values["train_tokens"] + values["held_out_tokens"] == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize(("words", "part"), [
    (["fetch", "bwon"], "did you mean brown?"), (["show", "brown"], "undertow text fetch brown"),
    (["show", "./none.txt"], "no text file or folder './none.txt'"), (["show", "x", "--context", "1"], "context = 1")])
def test_mistakes_exit_2(undertow_cache: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    assert main(["text", *words]) == 2
    assert part in capsys.readouterr().err
    assert not list(undertow_cache.iterdir())
