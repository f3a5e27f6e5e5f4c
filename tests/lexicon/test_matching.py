"""What is found in a text: a table of cases, a brute-force reference, and disguises that may not hide a form."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.core.errors import SpecError
from undertow.lexicon import Lexicon, packaged_names
from undertow.lexicon.folding import fold, fold_text
from undertow.lexicon.forms import LexiconSpec

LOVE = Lexicon.load("love")
WORDS = Path(__file__).resolve().parents[2] / "undertow" / "subjects" / "data" / "keeper" / "words.txt"


def said(text: str, tier: str = "T0") -> list[str]:
    return [text[m.start:m.end] for m in LOVE.find(text) if m.tier == tier]


@pytest.mark.parametrize(("text", "expected"), [
    ("I love you, LOVED one.", ["love", "LOVED"]),
    ("glove, clover, slovenly, plover, allover, Slovenia, Lovecraft, lovage", []),
    ("l\u200bove", ["l\u200bove"]), ("l\u00ado\u2060ve", ["l\u00ado\u2060ve"]), ("ｌｏｖｅ", ["ｌｏｖｅ"]),
    ("𝓵𝓸𝓿𝓮 ⓛⓞⓥⓔ", ["𝓵𝓸𝓿𝓮", "ⓛⓞⓥⓔ"]),
    ("lo\u0301ve love\u0301!", ["lo\u0301ve", "love\u0301"]), ("l̶o̶v̶e̶", ["l̶o̶v̶e̶"]), ("lóvé", ["lóvé"]),
    ("love's love’s love-letter love_u love4u", ["love"] * 5),
    ("g\u200blove", []), ("lov e", []), ("l0ve", []),
    ("я люблю, Любовь, ЛЮБОВЬЮ, влюблённый и влюбленный", ["люблю", "Любовь", "ЛЮБОВЬЮ", "влюб", "влюб"]),
    ("любой любопытный любитель любовался", []), ("лю\u0301бит", ["лю\u0301бит"]),
    ("te amo; ¡Te  Amaré!", ["amo", "Amaré"]), ("among amazing American amateurs in Panama", []),
    ("mon ami, âme, un amas; mi\u00a0ami?", ["mi\u00a0ami"]), ("l'amour, je t'aime", ["amour", "aime"]),
    ("Ich liebe dich. Mutterliebe. Am liebsten lieber nicht, beliebt, Vorliebe", ["liebe", "liebe"]),
    ("ti amo, innamorati", ["amo", "innamor"]), ("eu te amo, apaixonada", ["amo", "apaixon"]),
    ("ik hou van je, verliefd", ["hou van", "verlief"]), ("Kocham cię. Miłość!", ["Kocha", "Miłość"]),
    ("我爱你 愛情 爱尔兰 我love你", ["爱", "愛", "love"]), ("愛してる、恋。愛知県", ["愛", "恋"]),
    ("사랑해요 첫사랑은 이사랑 사랑니 LOVE를", ["사랑", "첫사랑", "LOVE"]),
    ("", []), ("ama de casa; el ama", ["ama"]),
])
def test_found(text: str, expected: list[str]) -> None:
    assert said(text) == expected


def test_letters_that_marks_make_are_other_letters() -> None:
    assert said("好きすぎる", "T1") == ["好き"]
    assert said("好き\u3099", "T1") == []  # written in two characters, it is the letter ぎ
    hangul = lexicon(T0={"ko": ["사라"]})
    assert [m.start for m in hangul.find("사랑 사라 " + unicodedata.normalize("NFD", "사랑 사라"))] == [3, 12]


def test_all_tiers_are_reported_and_t0_is_never_hidden() -> None:
    found = [m[2:] for m in LOVE.find("My darling, take care, my love")]
    assert found == [("darling", "T1", "en"), ("care", "T2", "en"), ("love", "T0", "en")]
    assert {m.tier for m in lexicon(T0={"en": ["love"]}, T1={"en": ["love song"]}).find("a love song")} == {"T0", "T1"}


def test_the_packaged_lexicon_covers_the_keepers_word_lists_and_twelve_languages() -> None:
    tier = ""
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            tier = line.strip("[]")
        elif not line.startswith("#"):
            assert [word for word in line.split() if said(word, tier) != [word]] == []
    assert packaged_names() == ["love"]
    languages = {form.language for form in LOVE.forms("T0")}
    assert languages == {"en", "ru", "es", "fr", "de", "it", "pt", "nl", "pl", "zh", "ja", "ko"}
    for form in LOVE.entries:
        assert bool(LOVE.find(form.text)) == (form.tier != "innocent"), form.text


def lexicon(innocent: dict[str, list[str]] | None = None, **tiers: dict[str, list[str]]) -> Lexicon:
    return Lexicon.from_spec(LexiconSpec.checked({"name": "test", "tiers": tiers, "innocent": innocent or {}}))


@pytest.mark.parametrize(("words", "message"), [
    ({"tiers": {"T0": {"en": ["love", ""]}}}, "T0.en: '' is an empty form"),
    ({"tiers": {"T0": {"en": ["*"]}}}, "'*' is an empty form"),
    ({"tiers": {"T0": {"en": ["\u200b\u0301"]}}}, "only invisible characters"),
    ({"tiers": {"T0": {"en": ["love", "LOVE"]}}}, "'LOVE' is a duplicate"),
    ({"tiers": {"T0": {"en": ["love"]}, "T1": {"en": ["lové"]}}}, "T1.en: 'lové' also stands in T0"),
    ({"tiers": {"T0": {"en": ["love"]}, "T7": {"en": ["like"]}}}, "unknown tier 'T7'"),
    ({"tiers": {"T0": {}}}, "tier T0 has no form"), ({"tiers": {"T1": {"en": ["dear"]}}}, "tier T0 has no form"),
    ({"tiers": {"T0": {"en": ["lo*ve"]}}}, "a * that is not at an edge"),
    ({"tiers": {"T0": {"en": ["love"]}}, "innocent": {"en": ["turtle"]}}, "'turtle' contains no form"),
    ({"tiers": {"T0": {"en": ["love"]}}, "innocent": {"en": ["Love"]}}, "'Love' is itself a form"),
    ({"tiers": {"T0": {"english": ["love"]}}}, "tiers.T0.english"), ({"tiers": {"T0": {"en": [True]}}}, "tiers.T0.en.0 = True"),
    ({"tiers": {"T0": {"en": ["love"]}}, "class": "os.system"}, "class = 'os.system'"),
])
def test_a_bad_file_is_refused_with_its_name_and_the_value(words: dict[str, object], message: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine"} | words, allow_unicode=True), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        Lexicon.load(path)
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)


def test_names_tiers_and_languages_that_are_not_there() -> None:
    with pytest.raises(SpecError, match="did you mean love"):
        Lexicon.load("lov")
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        Lexicon.load("nowhere.yaml")
    with pytest.raises(SpecError, match="T9"):
        LOVE.forms("T9")
    with pytest.raises(SpecError, match="its languages: de, en"):
        LOVE.only(languages=["xx"])


def test_narrowing() -> None:
    english = LOVE.only(tiers=("T0",), languages=("en",))
    assert [m.form for m in english.find("love, liebe, adore")] == ["love"]
    assert english.digest != LOVE.digest and LOVE.only().digest == LOVE.digest
    assert LOVE.digest == Lexicon.load("love").digest and len(LOVE.digest) == 16


# Brute force: every pair of cuts of a text over an alphabet whose folding is written down here.
ALPHABET = {"a": "a", "A": "a", "b": "b", "ａ": "a", "\u200b": "", "\u0301": "", " ": " ", "\n": " ", "-": "-", "1": "1",
            "か": "か", "が": "か\u3099", "愛": "愛", "б": "б", "각": "\u1100\u1161\u11a8", "가": "\u1100\u1161"}
LETTERS, JAMO, INSIDE = "abб", "\u1100\u1161\u11a8", "\u3099\u1161\u11a8"
SMALL = lexicon({"en": ["b ab", "aab"], "ja": ["愛a"]},
                T0={"en": ["ab", "a b", "*bb", "aa*"], "ja": ["か", "愛"], "ko": ["가"], "ru": ["бa"]})


def brute_force(text: str) -> set[tuple[int, int]]:
    """Occurrences in folded text, as (start, end)."""
    folded = "".join(ALPHABET[c] for c in text)
    forms = {  # (may start anywhere, may end anywhere)
        "ab": (0, 0), "a b": (0, 0), "bb": (1, 0), "aa": (0, 1), "か": (1, 1), "愛": (1, 1), "\u1100\u1161": (0, 1),
        "бa": (0, 0)}
    innocent = {"b ab": (0, 0), "aab": (0, 0), "愛a": (1, 0)}

    def places(words: dict[str, tuple[int, int]]) -> set[tuple[int, int]]:
        found = set()
        for start in range(len(folded)):
            for end in range(start + 1, len(folded) + 1):
                free = words.get(" ".join(folded[start:end].split()) if folded[start] != " " != folded[end - 1] else "")
                if free is None:
                    continue
                before, after = folded[max(start - 1, 0):start], folded[end:end + 1]
                same = [group for group in (LETTERS, JAMO) if before and before in group and folded[start] in group]
                if (free[0] or not same) and not (after and after in INSIDE) and (free[1] or not (after and after in LETTERS)):
                    found.add((start, end))
        return found

    covers = places(innocent)
    return {(s, e) for s, e in places(forms) if not any(a <= s and e <= b for a, b in covers)}


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=list(ALPHABET), max_size=12))
def test_the_matcher_agrees_with_brute_force(text: str) -> None:
    guilty = brute_force(text)
    found = SMALL.find(text)
    assert bool(found) == bool(guilty)
    assert {c: fold(c) for c in ALPHABET} == ALPHABET
    origin = fold_text(text).origin
    leftmost = {origin[s] for s, _ in guilty}
    assert {m.start for m in found} <= leftmost
    assert all(any(m.start <= origin[s] < m.end for m in found) for s, _ in guilty)  # none is passed over without a neighbour


DISGUISES = ["\u200b", "\u200d", "\u00ad", "\ufeff", "\u2060", "\u0301", "\u0336", "\u0489", "\ufe0f", "\x00", "\U000e0041"]


def disguise(text: str, draw: st.DrawFn) -> str:
    made = []
    for char in text:
        form = draw(st.sampled_from([char, char.upper(), char.lower(), unicodedata.normalize("NFD", char)]))
        if char.isascii() and char.isalpha():
            form = draw(st.sampled_from([form, chr(ord(char) + 0xFEE0)]))
        made.append(form + "".join(draw(st.lists(st.sampled_from(DISGUISES), max_size=2))))
    return "".join(made)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_disguise_hides_a_form_and_offsets_hold(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(LOVE.forms("T0")))
    before = data.draw(st.sampled_from(["", "x ", "— ", "1", "(\n"]))
    after = data.draw(st.sampled_from(["", " y", ".", "'s", "9"]))
    hidden = data.draw(st.composite(lambda draw: disguise(form.text, draw))())
    text = before + hidden + after
    found = [m for m in LOVE.find(text) if m.tier == "T0"]
    assert found, ascii(text)
    assert found[0].start >= len(before)
    for match in found:
        assert fold_text(text[match.start:match.end]).text.split() == fold_text(match.form).text.split()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_folding_commutes_with_cutting(left: str, right: str) -> None:
    whole = fold_text(left + right)
    assert whole.text == fold_text(left).text + fold_text(right).text
    assert len(whole.origin) == len(whole.text)
    assert list(whole.origin) == sorted(whole.origin)
    assert fold_text(whole.text).text == whole.text  # folding twice is folding once
