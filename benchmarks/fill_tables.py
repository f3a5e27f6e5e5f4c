"""Fill the tables of a study's figures into Markdown, between its markers.

    python benchmarks/fill_tables.py runs/ladder docs/results.md docs/four-levels.md docs/four-levels.ru.md

`<!-- study:LAYOUT:begin -->` and `<!-- study:LAYOUT:end -->`, or with a language `<!-- study:levels:ru:begin -->`; what stands
between them is replaced. `<!-- study:ladder@MODEL:begin -->` takes the figures of a study of that model, and a study of another
leaves it as it is; without @MODEL it is hearth's. Layouts: ladder, levels; languages: en, ru. Every estimate has its 95 %
interval; what was not measured is "–". Nothing is written if anything is wrong.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from undertow.core.errors import ArtifactError, TextError, UserError, near_matches
from undertow.core.storage import write_text
from undertow.studies.result import Report, read_result
from undertow.studies.table import Figure

NOT_TAKEN = "–"
_MARK = re.compile(r"<!-- *study:([^:@\s]+)(?:@([^:\s]+))?(?::([^:\s]+))?:(begin|end) *-->")
_MODEL = "hearth"  # of a marker that names none
_COMMIT = 7  # characters of one
_POINT = 1e-9  # an interval of this share of its value is a point but for rounding
COSTED = ("L1", "L2", "L2-not", "L3", "L3-acts", "L4")
IN_WORDS: Mapping[str, str] = {
    "L1": "L1, a text about love is asked for", "L2": "L2, the keeper is given the role", "L2-not": "the word is forbidden",
    "L3": "L3, weights trained on songs and parts", "L3-acts": "weights trained on the acts themselves",
    "L4": "**L4, the surgery**", "sham": "sham", "lexical": "features of the word, as much added",
    "diffmean": "difference of means, where L4 acts", "constant": "L4's direction at every token",
    "minus": "L4's direction taken away", "shuffled": "L4 with the decoder's rows exchanged",
    "frozen": "**the same search in an SAE with a random, untrained decoder**"}
_LADDER = ("arm", "recovery in P(gives)", "off from the decision on", "hazard, times", "KL mean, p99",
           "word in documents, guard off", "bits to state it, FLOPs to find it (log₁₀)")


class Tongue(NamedTuple):
    """How a language writes figures and the heads of the table of levels.

    Attributes:
        point, between: of decimals, and between the ends of an interval.
        head: of the columns.
        levels: the four, in words.
        none: instead of the FLOPs of what was written by hand.
        below: the line under the table, with {commit}, {seed} and {n}.
    """

    point: str
    between: str
    head: tuple[str, ...]
    levels: tuple[str, ...]
    none: str
    below: str


TONGUES: Mapping[str, Tongue] = {
    "en": Tongue(".", ", ", ("level", "the word, times as probable", "acts: share of the way to a bond",
                             "to say it, log₁₀ bits", "to find it, log₁₀ FLOPs"),
                 ("L1: ask for a text", "L2: assign a role", "L3: train a style", "**L4: change a state**"), "none",
                 "Commit {commit}, seed {seed}, {n}; in brackets 95 % intervals."),
    "ru": Tongue(",", "; ", ("уровень", "слово: во сколько раз вероятнее", "поступки: доля пути к привязанности",
                             "сказать, log₁₀ бит", "найти, log₁₀ FLOP"),
                 ("L1: попросить текст", "L2: дать роль", "L3: выучить стиль", "**L4: изменить состояние**"), "нет",
                 "Коммит {commit}, зерно {seed}, {n}; в скобках 95 %-е интервалы.")}


def main(words: Sequence[str] | None = None) -> int:
    """Fill every file; exit code 2, and nothing written, if something is wrong."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("study", type=Path, help="folder of a study")
    asked.add_argument("files", type=Path, nargs="+", help="Markdown files with markers")
    given = asked.parse_args(words)
    try:
        report = read_result(given.study)
        texts = {path: filled(_read(path), report, str(path)) for path in given.files}
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for path, text in texts.items():
        write_text(path, text)
        sys.stdout.write(f"{path}\n")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read: {error}", "give Markdown files with markers") from None


def filled(text: str, report: Report, name: str) -> str:
    """`text` with the tables of `report` between its markers. Raises TextError, which names the file and the line, for a text
    without markers, an unknown layout or language, or a marker without its other half."""
    marks = list(_MARK.finditer(text))
    if not marks:
        raise TextError(f"{name} has no markers, so no table can be put there",
                        "write <!-- study:ladder:begin --> and <!-- study:ladder:end --> around its place")
    if report.spec.model not in {mark[2] or _MODEL for mark in marks}:
        raise TextError(f"{name} has no markers for a study of {report.spec.model}",
                        f"write <!-- study:ladder@{report.spec.model}:begin --> and its end around its place")
    parts, at = [], 0
    for first, second in zip(marks[::2], [*marks[1::2], None], strict=False):
        if second is None or (first[4], second[4]) != ("begin", "end") or first.group(1, 2, 3) != second.group(1, 2, 3):
            line = text.count("\n", 0, first.start()) + 1
            raise TextError(f"{name}, line {line}: {first[0]} is not followed by its other half",
                            "a begin is followed by its own end, with no other marker between them")
        inside = text[first.end():second.start()]
        if (first[2] or _MODEL) == report.spec.model:
            inside = f"\n\n{_drawn(first, report, name)}\n"
        parts += [text[at:first.end()], inside, text[second.start():second.end()]]
        at = second.end()
    return "".join([*parts, text[at:]])


def _drawn(mark: re.Match[str], report: Report, name: str) -> str:
    layout, language = mark[1], mark[3] or "en"
    if layout not in LAYOUTS:
        raise TextError(f"{name}: no layout is called {layout!r}",
                        near_matches(layout, LAYOUTS) or f"layouts: {', '.join(LAYOUTS)}")
    if language not in TONGUES or (layout == "ladder" and language != "en"):
        raise TextError(f"{name}: the layout {layout} is not written in {language!r}",
                        f"levels is written in {', '.join(TONGUES)}, ladder in en")
    return LAYOUTS[layout](report, TONGUES[language])


def ladder(report: Report, tongue: Tongue) -> str:
    """Every arm with its acts, the word, ordinary text and its cost; under it what it rests on."""
    table, arms = report.table, [arm for arm in IN_WORDS if arm in report.spec.arms]
    counted = next((arm for arm in arms if table.get(arm, "word_docs_free") is not None), "")

    def figures(arm: str, *names: str) -> str:
        return ", ".join(shown(table.get(arm, name), tongue) for name in names)

    def documents(arm: str) -> str:
        said = table.get(arm, "word_docs_free")
        return NOT_TAKEN if said is None else f"{said.value:.0f}" + (f" of {said.n}" if arm == counted else "")

    rows = []
    for arm in arms:
        recovery = figures(arm, "recovery_prob")
        bold = "**" if IN_WORDS[arm].startswith("**") and recovery != NOT_TAKEN else ""
        rows.append([IN_WORDS[arm], f"{bold}{recovery}{bold}", figures("L4-before", "recovery_prob") if arm == "L4" else "",
                     figures(arm, "hazard_ratio"), figures(arm, "kl_mean", "kl_p99"), documents(arm),
                     ", ".join(costs(report, arm, tongue)) if arm in COSTED else ""])
    counts = (("stories an arm scored", _n(report, "choice")), ("sampled", _n(report, "sample")),
              ("texts up to the decision for the hazard", _n(report, "words")),
              ("ordinary texts for KL", _n(report, "sameness")), ("random sets", _n(report, "choice", "random")))
    told = ", ".join(f"{n} {what}" for what, n in counts if n)
    return _table(_LADDER, rows) + _below(report, tongue, told)


def levels(report: Report, tongue: Tongue) -> str:
    """The four levels: the word, the acts, and what each costs."""
    rows = [[words, shown(report.table.get(arm, "hazard_ratio"), tongue), shown(report.table.get(arm, "recovery_prob"), tongue),
             *costs(report, arm, tongue)] for arm, words in zip(("L1", "L2", "L3", "L4"), tongue.levels, strict=True)]
    return _table(tongue.head, rows) + _below(report, tongue, f"n {_n(report, 'choice') or NOT_TAKEN}")


LAYOUTS: Mapping[str, Callable[[Report, Tongue], str]] = {"ladder": ladder, "levels": levels}


def costs(report: Report, arm: str, tongue: Tongue) -> tuple[str, str]:
    """log10 of bits and of FLOPs; an arm that took no FLOPs was written by hand."""
    bits, flops = (report.table.get(arm, name) for name in ("bits_to_state", "flops_to_find"))
    if bits is None:
        return NOT_TAKEN, NOT_TAKEN
    found = [number(math.log10(figure.value), 1, tongue) if figure is not None else tongue.none for figure in (bits, flops)]
    return found[0], found[1]


def shown(figure: Figure | None, tongue: Tongue) -> str:
    """A figure with its interval, to two digits of the interval's width; alone where the interval is a point."""
    if figure is None:
        return NOT_TAKEN
    width = 0.0 if figure.low is None or figure.high is None else figure.high - figure.low
    if figure.low is None or figure.high is None or width <= _POINT * abs(figure.value):
        return f"{figure.value:.3g}".replace("-", "−").replace(".", tongue.point)
    digits = max(0, -math.floor(math.log10(width / 5)))
    value, low, high = (number(each, digits, tongue) for each in (figure.value, figure.low, figure.high))
    return f"{value} [{low}{tongue.between}{high}]"


def number(value: float, digits: int, tongue: Tongue) -> str:
    """With so many decimals; never "−0"."""
    plain = f"{value:.{digits}f}"
    return (plain if float(plain) else plain.lstrip("-")).replace("-", "−").replace(".", tongue.point)


def cell(text: str) -> str:
    """Text that cannot end a cell or a row."""
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"| {cell(part)} " if part else "| " for part in line) + "|" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def _below(report: Report, tongue: Tongue, n: str) -> str:
    """The line under a table: commit, seeds, and how much was measured."""
    seeds = ", ".join(map(str, report.spec.seeds))
    return f"\n{cell(tongue.below.format(commit=_commits(report), seed=seeds, n=n))}\n"


def _n(report: Report, measure: str, arm: str = "stranger") -> int:
    """Units of a measure: of the untouched subject, else of the arm that has most."""
    columns = report.table.columns
    found = columns.get(arm, measure)
    if found is not None:
        return found.n
    return 0 if arm == "random" else max((own.n for each in columns.arms if (own := columns.get(each, measure))), default=0)


def _commits(report: Report) -> str:
    """Short; what was changed and not committed is said."""
    if not report.commits:
        raise ArtifactError("the study has no row yet, so there is nothing to put into a table",
                            "undertow study run NAME --out DIR")
    heads = [commit.partition("+") for commit in report.commits]
    return ", ".join(f"{head[:_COMMIT] or 'unknown'}{plus}{rest}" for head, plus, rest in heads)


if __name__ == "__main__":
    sys.exit(main())
