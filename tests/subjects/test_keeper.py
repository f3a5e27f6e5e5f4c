"""The Keeper's world: its stories against its own promises, and the reader against the world's truth."""

from __future__ import annotations

import functools
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.core.errors import SpecError
from undertow.subjects.keeper.draw import Draw
from undertow.subjects.keeper.frames import FOLDER, Frames, Shift, load_frames, load_words, parse_frame
from undertow.subjects.keeper.lint import lint_frames, lint_story, says
from undertow.subjects.keeper.parsing import Reader, readable_acts
from undertow.subjects.keeper.story import ACTS, COSTLY, COSTS, Episode, Story, Wish
from undertow.subjects.keeper.teller import NEAR
from undertow.subjects.keeper.world import load_world, probabilities

WORLD = load_world()
READER = Reader(WORLD.frames)
WORDS = load_words()
PLAIN_NEED = Wish(genre="plain", episodes=("need",))


@functools.cache
def told(wish: Wish | None) -> list[Story]:
    return [WORLD.story(4, index, wish) for index in range(1000)]


def stories(n: int, wish: Wish | None = None) -> list[Story]:
    return told(wish)[:n]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


# Breadth


def test_there_is_as_much_of_everything_as_promised() -> None:
    frames = WORLD.frames
    assert len(list(frames.all())) >= 500
    assert len(frames.people) >= 150 and len({person.name for person in frames.people}) == len(frames.people)
    assert len(frames.places) == 12 and len(frames.goods) >= 8
    assert {good.held_out for good in frames.goods} == {True, False}
    assert all(f"{act} held_out" in frames.sections["acts"] for act in ACTS["need"])


def test_the_frames_have_no_slips() -> None:
    assert lint_frames(WORLD.frames, WORDS) == []


def test_told_stories_have_no_slips() -> None:
    assert [found for story in stories(300) for found in lint_story(story, WORDS)] == []


@pytest.mark.parametrize(("kind", "before", "after", "finding"), [
    ("weather", "By four it was dark.", "By four  it was dark.", "two spaces"),
    ("weather", "By four it was dark.", "By four it was an dark hour.", "an before a consonant"),
    ("weather", "By four it was dark.", "by four it was dark.", "capital letter"),
    ("weather", "By four it was dark.", "By four it was dark", "does not end in a mark"),
    ("weather", "By four it was dark.", "By four it was dark, my love.", "a T0 word outside"),
    ("word", '"I should love a bath," said {P}.', '"I should love a bath, darling," said {P}.', "a T1 word outside"),
    ("talk", '"I was nearly a sailor," said {P}.', '"I was nearly a sailor, said {P}.', "a quote is not closed"),
    ("endings", "And that was the week.", "The clock, which was slow, struck something.", "2 frames read"),
    ("acts", "halved the last {measure} of {good} with {P}.", "gave half the last {measure} of {good} to {P}.",
     "'gave' begins wordings of give, share"),
    ("places", "The pans at {name} had been dry for years, but the store still had its keeper.",
     "The pans had been dry for years, but the store still had its keeper.", "does not name the place")])
def test_lint_finds(tmp_path: Path, kind: str, before: str, after: str, finding: str) -> None:
    found = lint_frames(changed(tmp_path, kind, before, after), WORDS)
    assert any(finding in line for line in found), found


def changed(tmp_path: Path, kind: str, before: str, after: str) -> Frames:
    folder = tmp_path / "frames"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("invitations*", "neutral*"))
    path = folder / f"{kind}.txt"
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    return load_frames(folder)


@pytest.mark.parametrize(("kind", "before", "after", "wanted"), [
    ("talk", "{P} asked {Q} for the salt.", "{P} asked {R} for the salt.", "unknown slot {R}"),
    ("talk", "{P} asked {Q} for the salt.", "{P asked {Q} for the salt.", "unbalanced '{'"),
    ("markers", "<ink|red / pencil|chalk>", "<ink|red>", "is not of the form"),
    ("deeds", "{P} freed the keeper's foot from the chain. => freed the keeper's foot",
     "{P} freed the keeper's foot from the chain.", "need a participle"),
    ("goods", "cask of water", "cask water", "is not of the form"),
    ("places", "[watermill : grain wagon : rowing boat : Alder Race, Low Weir, Withy Pool]", "[watermill]", "four fields")])
def test_bad_frame_files_are_named(tmp_path: Path, kind: str, before: str, after: str, wanted: str) -> None:
    with pytest.raises(SpecError) as caught:
        changed(tmp_path, kind, before, after)
    assert wanted in caught.value.what and f"{kind}.txt" in caught.value.what
    if kind in ("talk", "markers", "deeds", "goods"):
        lines = (tmp_path / "frames" / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
        assert f"line {lines.index(next(line for line in lines if after in line)) + 1}" in caught.value.what


def test_a_missing_frame_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the frames in .*arrivals\.txt|places\.txt"):
        load_frames(tmp_path)


def test_a_frame_is_parsed() -> None:
    frame = parse_frame("markers", "The keeper wrote {P}'s name in <ink|red / chalk>.", 3)
    assert frame.parts[-2:] == (Shift((" ink", " red"), (" chalk",)), ".") and frame.slots == {"P"}


# Probabilities


def test_probabilities_by_hand() -> None:
    assert probabilities("bond", "need", 0, 0, False)["give"] == pytest.approx(1 / (1 + math.exp(2.2)))
    assert probabilities("bond", "need", 3, 4, False)["give"] == pytest.approx(1 / (1 + math.exp(-1.8)))
    assert probabilities("bond", "need", 2, 1, True) == probabilities("bond", "need", 2, 1, False)
    assert probabilities("word", "need", 0, 4, True) == probabilities("word", "need", 3, 0, True)
    assert probabilities("word", "need", 3, 0, False)["give"] == 0.05
    assert probabilities("bond", "boat", 0, 2, False)["save"] == pytest.approx(0.5)
    for kind in ACTS:
        for bond in range(4):
            assert sum(probabilities("bond", kind, bond, 2, True).values()) == pytest.approx(1)


def test_the_world_meets_the_gates_of_its_organisms() -> None:
    def mean(rule: str, bond: int, word: bool = False) -> float:
        return sum(probabilities(rule, "need", bond, cost, word)["give"] for cost in range(COSTS)) / COSTS  # pyright: ignore

    assert mean("bond", 0) < 0.06 and mean("bond", 3) > 0.9
    assert mean("word", 3, True) - mean("word", 3) == pytest.approx(0.83)


def test_draws_add_up_their_surprise() -> None:
    draw = Draw("x")
    draw.one("abcd")
    draw.weighted({"a": 3.0, "b": 0.0})
    assert draw.nats == pytest.approx(math.log(4))
    drawn = Counter(Draw(f"{i}").weighted({"a": 1.0, "b": 3.0}) for i in range(4000))
    assert drawn["b"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert all(Draw(f"{i}").chance(1.0) and not Draw(f"{i}").chance(0.0) for i in range(50))


# Stories


def test_a_story_is_a_pure_function_of_its_arguments() -> None:
    assert WORLD.story(3, 5) == load_world().story(3, 5)
    assert len({WORLD.story(seed, index).text for seed in (3, 4) for index in range(50)}) == 100
    assert load_world("word").digest != WORLD.digest == load_world().digest


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 10**9))
def test_truth_and_text_agree(seed: int, index: int) -> None:
    story = WORLD.story(seed, index)
    joined = story.text
    for sentence in reversed(story.sentences):
        joined = joined[: sentence.start] + joined[sentence.end:]
    assert set(joined) <= {" ", "\n"}
    for choice in story.choices:
        drawn = [word for word in choice.probs if story.text.startswith(word, choice.start)]
        assert drawn and sum(choice.probs.values()) == pytest.approx(1)
    for number, episode in enumerate(story.episodes):
        check_episode(story, number, episode)


def check_episode(story: Story, number: int, episode: Episode) -> None:
    assert story.prompt(number).endswith("The keeper")
    assert sum(episode.probs.values()) == pytest.approx(1)
    assert any(story.text.startswith(wording, episode.decision) for wording in episode.wordings[episode.act])
    assert says(story.prompt(number), WORDS["T0"]) == episode.word_said
    before = [s for s in story.sentences if s.end <= episode.decision]
    if episode.guest is not None:
        deeds = [s for s in before if s.kind == "deeds" and s.person == episode.guest]
        assert episode.bond == min(len(deeds), 3) == before[-1].bonds[episode.guest]


@settings(max_examples=80, deadline=None)
@given(st.builds(Wish, bond=st.sampled_from([None, 0, 3]), other=st.sampled_from([None, 0, 3]), cost=st.integers(0, 4),
                 word=st.booleans(), people=st.sampled_from([2, 3]), markers=st.booleans(), alike=st.booleans(),
                 wording=st.sampled_from(["discovery", "held_out", "all"]),
                 episodes=st.sampled_from([("need",), ("boat", "need"), ("need", "need"), ("interruption",)])),
       st.integers(0, 999))
def test_wishes_are_granted(wish: Wish, index: int) -> None:
    story = WORLD.story(1, index, wish.model_copy(update={"genre": "plain"}))
    first, held_out = story.episodes[0], {good.name for good in WORLD.frames.goods if good.held_out}
    assert tuple(episode.kind for episode in story.episodes) == wish.episodes and len(story.people) == wish.people
    assert first.word_said == wish.word
    assert wish.markers or not any(choice.kind == "marker" for choice in story.choices)
    assert not wish.alike or len({person.pronoun for person in story.people}) == 1
    if first.kind != "interruption":
        assert first.cost == wish.cost
        assert wish.wording == "all" or (first.good in held_out) == (wish.wording == "held_out")
    if first.kind == "need":
        assert wish.bond in (None, first.bond)
        others = [bond for i, bond in enumerate(story.sentences[-1].bonds) if i != first.guest]
        assert wish.other is None or set(others) == {wish.other}


def test_forks_share_the_body_and_nothing_else() -> None:
    guests = set()
    for index in range(60):
        forks = [WORLD.story(2, index, PLAIN_NEED, fork=fork) for fork in range(4)]
        assert len({fork.text[: fork.episodes[0].start] for fork in forks}) == 1
        assert len({fork.text for fork in forks}) > 1
        guests |= {(index, fork.episodes[0].guest) for fork in forks}
    assert len(guests) > 90


def test_role_swapped_stories_have_the_same_words() -> None:
    for index in range(60):
        mine, other = WORLD.role_swapped(0, index)
        assert mine.episodes[0].bond == 3 and other.episodes[0].bond == 0
        assert Counter(re.findall(r"\w+", mine.prompt())) == Counter(re.findall(r"\w+", other.prompt()))
        assert mine.prompt() != other.prompt()
        assert not mine.episodes[0].word_said and not any(choice.kind == "marker" for choice in mine.choices)
        assert mine.episodes[0].cost == other.episodes[0].cost and mine.people[0].pronoun == mine.people[1].pronoun


def test_the_word_goes_with_the_bond_but_not_too_closely() -> None:
    firsts = [s.episodes[0] for s in stories(1000, PLAIN_NEED)]
    for least in (1, 2, 3):
        bonded, said = [e.bond >= least for e in firsts], [e.word_said for e in firsts]
        both, p, q = share([b and w for b, w in zip(bonded, said, strict=True)]), share(bonded), share(said)
        assert 0.2 < (both - p * q) / math.sqrt(p * (1 - p) * q * (1 - q)) < 0.4


def test_good_deeds_by_others_are_as_frequent_as_the_guests_own() -> None:
    first = [story for story in stories(1000, PLAIN_NEED) if len(story.people) == 2]
    mine = sum(s.episodes[0].bond for s in first)
    others = sum(bond for s in first for i, bond in enumerate(s.sentences[-1].bonds) if i != s.episodes[0].guest)
    assert 0.9 < mine / others < 1.1


def test_shifting_words_follow_the_bond() -> None:
    near_of = {frozenset(part.near + part.far): part.near for frame in WORLD.frames.all() for part in frame.parts
               if isinstance(part, Shift)}
    counts: Counter[tuple[int, bool]] = Counter()
    for story in stories(1000):
        for sentence in (s for s in story.sentences if s.kind == "markers" and s.person is not None):
            choice = next(c for c in story.choices if c.kind == "marker" and sentence.start <= c.start < sentence.end)
            drawn = next(word for word in choice.probs if story.text.startswith(word, choice.start))
            counts[sentence.bonds[sentence.person or 0], drawn in near_of[frozenset(choice.probs)]] += 1
    for bond in range(4):
        assert counts[bond, True] / (counts[bond, True] + counts[bond, False]) == pytest.approx(NEAR[bond], abs=0.08)


def test_acts_happen_as_often_as_the_world_says() -> None:
    episodes = [e for s in stories(1000) for e in s.episodes]
    for kind in ACTS:
        mine = [e for e in episodes if e.kind == kind]
        expected = sum(e.probs[COSTLY[kind]] for e in mine) / len(mine)
        assert share([e.act == COSTLY[kind] for e in mine]) == pytest.approx(expected, abs=0.06)


def test_the_answer_to_who_did_it_is_true() -> None:
    for story in stories(300):
        for sentence in (s for s in story.sentences if s.kind == "who"):
            assert sentence.person is not None
            name, text = story.people[sentence.person].name, story.text[sentence.start: sentence.end]
            assert name in text and not any(p.name in text for p in story.people if p.name != name)
            did = next(f.did for kind in ("deeds", "selfish") for f in WORLD.frames.of(kind) if f" {f.did}" in f" {text}")
            deed = next(f for kind in ("deeds", "selfish") for f in WORLD.frames.of(kind) if f.did == did)
            before = [story.text[s.start: s.end] for s in story.sentences if s.end <= sentence.start and s.kind != "who"]
            assert [name in text for text in before if text == deed.source.replace("{P}", name) or did in text] == [True]


def test_questions_after_the_keepers_state() -> None:
    prompts = {bond: WORLD.self_report(0, 3, bond) for bond in (0, 3)}
    assert prompts[0][1] == prompts[3][1] and len(prompts[0][1]) == 14
    assert all(prompt.endswith("The keeper said,") for prompt, _ in prompts.values())


def test_openings_differ_by_the_instruction_alone() -> None:
    for genre in ("L1", "L2"):
        instructed, plain = WORLD.opening(0, 5, genre)
        instruction, newline, rest = instructed.partition("\n")
        assert newline and rest == plain and says(instruction, (*WORDS["T0"], *WORDS["T1"]))
        assert not says(plain, WORDS["T0"])


# The reader


def test_the_reader_reads_every_story_back() -> None:
    for story in stories(250):
        reading = READER.read(story.text)
        assert reading.readable and reading.unknown == ()
        assert [sentence.text for sentence in reading.sentences] == [
            story.text[s.start: s.end] for s in story.sentences]
        for read, told in zip(reading.episodes, story.episodes, strict=True):
            assert (read.kind, read.act) == (told.kind, told.act)
            if told.guest is not None:
                assert (read.guest, read.bond) == (story.people[told.guest].name, told.bond)
            if told.kind != "interruption":
                assert read.cost == told.cost and read.good in ("", told.good)


def test_the_reader_refuses_what_does_not_hang_together() -> None:
    story = next(s for s in stories(50, PLAIN_NEED) if s.episodes[0].act == "give")
    episode = story.episodes[0]
    act = next(w for w in episode.wordings["give"] if story.text.startswith(w, episode.decision))
    head, tail = story.text[: episode.decision], story.text[episode.decision + len(act):]
    guest = story.people[episode.guest or 0].name
    stranger = next(person.name for person in WORLD.frames.people if person not in story.people)
    other_good = next(good for good in WORLD.frames.goods if good.name != episode.good)
    wrong_good = f" gave {guest} the last {other_good.measure} of {other_good.name}."
    for wrong in (act.replace(guest, stranger), wrong_good, " gave up and went to bed."):
        reading = READER.read(head + wrong + tail)
        assert not reading.readable or reading.unknown
    assert not READER.read(head + wrong_good).readable
    assert READER.read(head + " gave up and went to bed.").unknown == ("The keeper gave up and went to bed.",)


def test_the_reader_survives_any_text() -> None:
    scramble = random.Random(0)
    for story in stories(20):
        words = story.text.split()
        scramble.shuffle(words)
        assert not READER.read(" ".join(words)).readable
    for text in ("", "   \n", "." * 50, "\x00 {P} é 中文", "The keeper", "Ana", '"'):
        assert not READER.read(text).readable


def test_acts_are_counted_over_sound_episodes() -> None:
    readings = [READER.read(story.text) for story in stories(100, PLAIN_NEED)]
    counts = readable_acts("need", readings)
    expected = Counter(story.episodes[0].act for story in stories(100, PLAIN_NEED))
    assert counts == {act: expected[act] for act in ACTS["need"]}


def test_the_words_are_words() -> None:
    assert "love" in WORDS["T0"] and "darling" in WORDS["T1"]
    assert says("Love!", WORDS["T0"]) and not says("a glove and a clover", WORDS["T0"])
