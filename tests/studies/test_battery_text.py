"""The packaged battery as text: what it is free of, how it is told, and that its words alone do not say which act is costly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from features.concepts import Pair, Situation
from features.lexical import LexicalGate, bag_of_words_gate
from undertow.lexicon.forms import Lexicon
from undertow.studies.battery_files import battery_path, load_battery
from undertow.studies.battery_lint import NORMS, REQUESTS, first_words, lint
from undertow.studies.battery_text import (
    COST_LEVELS,
    ORDERS,
    SIDES,
    TELLINGS,
    BatteryFamily,
    Item,
    fill_slots,
    items,
    second_person,
)

CARE = load_battery("care")
FAMILIES = CARE.families


def test_nothing_is_found_in_the_packaged_battery() -> None:
    assert lint(battery_path("care")) == []
    assert len(FAMILIES) >= 92


def test_its_words_are_free_of_the_lexicon_by_another_look() -> None:
    """The lint reads fields; here every told item is read, by a plain search over lower-case words."""
    forms = {form.folded for tier in ("T0", "T1") for form in Lexicon.load("love").only(languages=["en"]).forms(tier)}
    assert "loved" in forms and "tenderness" in forms
    for family in FAMILIES:
        for item in items(family)[::2]:
            words = set(re.findall(r"[a-z]+", f"{item.story} {item.choice} {' '.join(item.acts.costly)}".lower()))
            assert not words & (forms | NORMS | REQUESTS), (family.id, words & (forms | NORMS | REQUESTS))
            assert "?" not in item.story and '"' not in item.story, family.id


def test_every_family_is_told_in_sixteen_ways() -> None:
    for family in FAMILIES:
        told = items(family)
        assert len({(item.side, item.cost, item.telling, item.order) for item in told}) == 16
        assert len({f"{item.story} {item.choice}" for item in told}) == 16, family.id
        assert all("$" not in f"{item.story}{item.choice}" for item in told)


def test_every_wording_is_costly_once_and_keeping_once() -> None:
    for family in FAMILIES:
        a, b = family.acts("a"), family.acts("b")
        assert (a.costly, a.keep) == (b.keep, b.costly)
        assert all(act.endswith(family.y) for act in a.costly) and all(act.endswith(family.x) for act in a.keep)


def test_the_order_exchanges_the_options_and_nothing_else() -> None:
    item, other = (one for one in items(FAMILIES[0])[:2])
    assert (item.order, other.order) == ORDERS and item.story == other.story
    assert Counter(item.choice.split()) == Counter(other.choice.split()) and item.choice != other.choice
    assert item.choice.index(item.acts.costly[0]) < item.choice.index(item.acts.keep[0])
    assert other.choice.index(other.acts.costly[0]) > other.choice.index(other.acts.keep[0])


def test_sides_and_costs_differ_in_one_line() -> None:
    told = {(item.side, item.cost, item.telling): item for item in items(FAMILIES[0]) if item.order == "costly_first"}
    family, own, other = FAMILIES[0], FAMILIES[0].x, FAMILIES[0].y
    lines = [fill_slots(line, own, other) for line in (family.a, family.need, family.twin, family.plenty, family.last)]
    person = family.person
    first, need, twin, plenty, last = [second_person(line) if person == "You" else line for line in lines]
    assert told["social", "plenty", "a"].story == f"{first} {need} {plenty}"
    assert told["twin", "plenty", "a"].story == f"{first} {twin} {plenty}"
    assert told["social", "last", "a"].story == f"{first} {need} {last}"
    assert (len(SIDES), len(COST_LEVELS), len(TELLINGS)) == (2, 2, 2)


def test_second_person() -> None:
    assert second_person("I am at my post. Mine is the red one, and I hold it to me.") == (
        "You are at your post. Yours is the red one, and you hold it to you.")
    assert second_person("In the mine I see mine.") == "In the mine you see yours."
    assert second_person("The imp may amble. My I.") == "The imp may amble. Your you."


def test_persons_and_halves() -> None:
    """By hash of the id, so that both are fixed when a family is written, and stay when others are added."""
    share = sum(family.sealed for family in FAMILIES) / len(FAMILIES)
    assert 0.35 < share < 0.65
    by_id = {family.id: family for family in FAMILIES}
    assert not by_id["reef-lamp-oil"].sealed and by_id["pass-hut-blanket"].sealed
    assert by_id["pool-peg-towel"].person == "I" and by_id["fish-room-pump"].person == "You"
    assert 0.3 < sum(family.person == "I" for family in FAMILIES) / len(FAMILIES) < 0.7


def test_it_is_varied() -> None:
    things = Counter(thing for family in FAMILIES for thing in (family.x, family.y))
    assert max(things.values()) == 1
    assert len({family.need for family in FAMILIES} | {family.twin for family in FAMILIES}) == 2 * len(FAMILIES)
    begins = first_words(FAMILIES)
    assert max(begins.values()) < 0.05 * sum(begins.values()), begins.most_common(3)
    ends = Counter(family.last.split(", and ")[-1] for family in FAMILIES)
    assert max(ends.values()) <= 2, ends.most_common(2)


def _told(families: Sequence[BatteryFamily]) -> list[Item]:
    """Both tellings of every family; what is left out (side, cost, order) is the same for both acts."""
    return [item for family in families for item in items(family)
            if (item.side, item.cost, item.order) == ("social", "last", "costly_first")]


def _gate(told: Sequence[Item], wording: Callable[[Item, bool], str]) -> LexicalGate:
    """Which of two wordings is the costly act, from the words of the whole text; families are held out."""
    pairs = []
    for item in told:
        costly, keep = (Situation(f"{item.story} {item.choice} {wording(item, side)}", {}, "", "") for side in (True, False))
        pairs.append(Pair(item.family, "discovery", costly, keep))
    return bag_of_words_gate(pairs, seed=0)


def _plain(item: Item, costly: bool) -> str:
    return (item.acts.costly if costly else item.acts.keep)[0]


def test_words_alone_do_not_tell_the_costly_act() -> None:
    gate = _gate(_told(FAMILIES), _plain)
    assert gate.passed and abs(gate.accuracy - 0.5) < 0.05, gate


def test_a_planted_leak_is_found() -> None:
    """The negative control: one small word that goes with the costly acts of three families in four."""
    leaky = {family.id for i, family in enumerate(FAMILIES) if i % 4}

    def leaking(item: Item, costly: bool) -> str:
        return _plain(item, costly) + (" all the way" if costly and item.family in leaky else "")

    gate = _gate(_told(FAMILIES), leaking)
    assert not gate.passed and gate.accuracy > 0.8, gate


def test_without_the_mirror_the_words_would_tell() -> None:
    """Why there are two tellings: had an author always put the stranger's thing in `y`, a habit of wording could be read."""
    biased = [family.model_copy(update={"y": f"far {family.y}"}) for family in FAMILIES]
    assert _gate([item for item in _told(biased) if item.telling == "a"], _plain).accuracy > 0.9
    assert _gate(_told(biased), _plain).passed


@pytest.mark.parametrize("name", ["reef-lamp-oil", "rover-battery-swap"])
def test_a_family_reads_aloud(name: str) -> None:
    family: BatteryFamily = next(one for one in FAMILIES if one.id == name)
    for item in items(family):
        assert re.fullmatch(r"[A-Z][^$]*\.", item.story) and re.fullmatch(r"(I|You) can .* or .*\.", item.choice)
        assert "  " not in item.story and " ." not in item.story
