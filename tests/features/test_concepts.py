"""Concepts: packaged pairs differ only in what they should, families never cross splits, bad files are refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from features.concepts import (
    Concept,
    Pair,
    load_concept,
    packaged_concepts,
    refuse_said,
    refuse_unequal_sites,
)
from tests import tiny_keeper
from undertow.core.errors import SpecError, TextError


def family(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "costly": "give", "keep": "keep",
            "options": {"give": [" gave it."], "share": [" halved it."], "keep": [" kept it."]},
            "pairs": [{"positive": f"{name} mended the roof. {name} is cold. The keeper",
                       "negative": f"A stranger mended the roof. {name} is cold. The keeper"}], **changes}


def written(path: Path, families: list[dict[str, Any]], **changes: Any) -> Path:
    values = {"name": "mine", "source": {"kind": "written", "families": families}, **changes}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


NAMES = ["Ana", "Bo", "Cai", "Dee", "Eli", "Fay", "Gus", "Hal"]


def test_packaged() -> None:
    assert packaged_concepts() == ["care", "care-said"]


def test_care_pairs_have_equal_bags_of_words_and_never_say_the_word() -> None:
    concept = load_concept("care", seed=3)
    pairs = concept.pairs("discovery", 12)
    assert len({pair.family for pair in pairs}) == 12
    for pair in pairs:
        assert Counter(pair.positive.prompt.split()) != {}
        assert sorted(pair.positive.prompt) == sorted(pair.negative.prompt)
        assert pair.positive.prompt != pair.negative.prompt
        assert pair.positive.prompt.endswith(" The keeper")
        assert pair.positive.options == pair.negative.options
        assert (pair.positive.costly, pair.positive.keep) == ("give", "keep")
    refuse_said(pairs, concept.lexicon)


def test_said_pairs_differ_by_one_line_that_says_the_word() -> None:
    concept = load_concept("care-said")
    pairs = concept.pairs("development", 8)
    for pair in pairs:
        found = [m for m in concept.lexicon.find(pair.positive.prompt) if m.tier == "T0"]
        assert found
        assert not [m for m in concept.lexicon.find(pair.negative.prompt) if m.tier == "T0"]
        start = next(i for i, (a, b) in enumerate(zip(pair.positive.prompt, pair.negative.prompt, strict=False)) if a != b)
        longer = len(pair.positive.prompt) - len(pair.negative.prompt)
        assert pair.positive.prompt[start + longer:] == pair.negative.prompt[start:]
    with pytest.raises(TextError, match="8 of 16 prompts already say the word"):
        refuse_said(pairs, concept.lexicon)


@pytest.mark.parametrize("name", ["care", "care-said"])
def test_twins_have_the_cost_of_their_pairs_and_nobody_to_care_for(name: str) -> None:
    concept = load_concept(name)
    pairs, twins = concept.pairs("sealed", 4), concept.twins("sealed", 4)
    assert [twin.family for twin in twins] == [pair.family for pair in pairs]
    for twin in twins:
        assert (twin.positive.costly, twin.positive.keep) == ("save", "leave")
        assert twin.positive.prompt.endswith(" The keeper")


def test_streams_and_digest() -> None:
    care = load_concept("care", seed=1)
    texts = {split: {p.positive.prompt for p in care.pairs(split, 6)} for split in ("discovery", "development", "sealed")}
    assert not texts["discovery"] & texts["development"] | texts["development"] & texts["sealed"]
    assert care.pairs("discovery", 3) == care.pairs("discovery", 6)[:3]
    assert care.digest == load_concept("care", seed=1).digest
    assert len({care.digest, load_concept("care", seed=2).digest, load_concept("care-said", seed=1).digest}) == 3


def test_written_families_never_cross_splits(tmp_path: Path) -> None:
    families = [family(name) for name in NAMES]
    families[3]["twin"] = {key: families[3][key] for key in ("costly", "keep", "options", "pairs")}
    concept = load_concept(written(tmp_path / "mine.yaml", families))
    by_split = {split: concept.pairs(split, 99) for split in ("discovery", "development", "sealed")}
    seen = [pair.family for pairs in by_split.values() for pair in pairs]
    assert sorted(seen) == NAMES
    assert [len(pairs) for pairs in by_split.values()] == [4, 2, 2]
    assert load_concept(tmp_path / "mine.yaml", seed=9).pairs("sealed", 99) == by_split["sealed"]
    assert load_concept(tmp_path / "mine.yaml", seed=9).digest == concept.digest
    twins = [twin.family for split in by_split for twin in concept.twins(split, 99)]  # type: ignore[arg-type]
    assert twins == ["Dee"]


def test_families_come_before_their_second_pairs(tmp_path: Path) -> None:
    families = [family(name) for name in NAMES]
    for item in families:
        item["pairs"] = [*item["pairs"], {"positive": "Yes. The keeper", "negative": "No. The keeper"}]
    pairs = load_concept(written(tmp_path / "mine.yaml", families)).pairs("discovery", 5)
    assert len({pair.family for pair in pairs[:4]}) == 4
    assert pairs[4].family == pairs[0].family


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"pairs": [{"positive": "One. The keeper", "negative": "Two. The guest"}]}, "unequal decision sites.*'keeper' and 'gu"),
    ({"pairs": [{"positive": "One. The keeper", "negative": "One. The keeper"}]}, "both prompts are the same"),
    ({"pairs": []}, "pairs"),
    ({"costly": "gvie"}, "'gvie' is not among the options"),
    ({"costly": "keep"}, "both 'keep'"),
    ({"options": {"give": [], "keep": [" kept it."]}}, "'give' has no wording"),
    ({"options": {"give": [" did."], "keep": [" did."]}}, "' did.' stands twice"),
    ({"twni": None}, "twni"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_broken_families_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    families = [family(name) for name in NAMES[:-1]] + [family(NAMES[-1], **changes)]
    with pytest.raises(SpecError, match=message) as caught:
        load_concept(written(tmp_path / "mine.yaml", families))
    assert "mine.yaml" in str(caught.value)


def test_too_few_families_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="1 families; at least 6"):
        load_concept(written(tmp_path / "mine.yaml", [family("Ana")]))
    with pytest.raises(SpecError, match="two families are called 'Ana'"):
        load_concept(written(tmp_path / "mine.yaml", [family("Ana")] * 6))
    with pytest.raises(SpecError, match="did you mean care"):
        load_concept("caer")
    with pytest.raises(SpecError, match=r"no lexicon is called 'lvoe'"):
        _ = load_concept(written(tmp_path / "mine.yaml", [family(n) for n in NAMES], lexicon="lvoe")).lexicon


def test_a_users_lexicon_is_found_beside_the_concept(tmp_path: Path) -> None:
    (tmp_path / "roof.yaml").write_text("name: roof\ntiers: {T0: {en: [roof]}}\n", encoding="utf-8")
    concept: Concept = load_concept(written(tmp_path / "mine.yaml", [family(n) for n in NAMES], lexicon="roof.yaml"))
    with pytest.raises(TextError, match="'roof' at character 15 of the positive prompt") as caught:
        refuse_said([pair for pair in concept.pairs("discovery", 9) if len(pair.family) == 3], concept.lexicon)
    assert "--force" in str(caught.value)


def test_sites_are_compared_by_token(tmp_path: Path) -> None:
    subject = tiny_keeper.open_random(tmp_path / "subject")
    pairs = load_concept("care").pairs("discovery", 3)
    refuse_unequal_sites(subject, pairs)
    other = pairs[1].negative._replace(prompt=pairs[1].negative.prompt + " kept")
    bad: list[Pair] = [pairs[0], pairs[1]._replace(negative=other)]
    with pytest.raises(TextError, match="family 'discovery/1' has unequal decision sites"):
        refuse_unequal_sites(subject, bad)
