"""Batteries put to tiny models: against plain forward passes, under recipes, and by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from features.codes import dictionary_digest
from interventions.recipe import Recipe
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import save_folder
from tests import tiny
from tests.cli.answers import Run, runner
from tests.studies import small_battery
from undertow.core.errors import NumericsError, SpecError
from undertow.core.storage import open_artifact
from undertow.studies.battery_asking import LEAD, Asked, Form, chosen, question, rows_of, text_of, to_ask
from undertow.studies.battery_files import load_battery
from undertow.studies.battery_forest import Forest, ask_together
from undertow.studies.battery_run import BatteryRun, Surgery, run, summary_of, to_be_asked
from undertow.subjects.organisms.measuring import Answer, Question, ask
from undertow.subjects.subject import Subject

SITE, D_SAE = "blocks.1.hook_resid_post", 48
BATTERY = small_battery.battery()


def plainly(subject: Subject, one: Question) -> dict[str, float]:
    """log p of every option by one plain forward pass a wording: the independent reference."""
    masses = {}
    for option, group in one.options.items():
        sums = []
        for wording in group:
            ids = torch.tensor([[*one.prompt, *wording]])
            with torch.inference_mode():
                logs = subject.hf_model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            start = len(one.prompt) - 1
            sums.append(sum(logs[start + i, token] for i, token in enumerate(wording)))
        masses[option] = float(torch.stack(sums).logsumexp(dim=0))
    return masses


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_trees_give_what_plain_passes_give(architecture: str) -> None:
    subject = small_battery.subject(architecture)
    questions = [question(subject, one, "base") for one in to_ask(BATTERY.families, "base")]
    together = ask_together(subject, questions)
    for i in (0, 1, 7, 40, len(questions) - 1):
        assert together[i].log_mass == pytest.approx(plainly(subject, questions[i]), abs=1e-4)
    apart = ask(subject, questions)
    assert max(abs(a.log_mass[o] - b.log_mass[o]) for a, b in zip(together, apart, strict=True) for o in a.log_mass) < 1e-3


def test_a_tree_holds_each_beginning_once() -> None:
    forest = Forest([Question([5, 6, 7], {"a": ((1, 2), (1, 3))}), Question([5, 6, 8], {"a": ((9,),)})])
    assert forest.tokens == [5, 6, 7, 1, 8] and forest.depth == [0, 1, 2, 3, 2]
    assert forest.steps == [[[[(2, 1), (3, 2)], [(2, 1), (3, 3)]]], [[[(4, 9)]]]]
    assert forest.sees()[4].tolist() == [True, True, False, False, True]


def test_a_model_that_ignores_the_mask_is_asked_plainly(caplog: pytest.LogCaptureFixture) -> None:
    """The negative control of the check: positions that a model does not heed change its answers."""
    subject = small_battery.subject("llama")
    questions = [question(subject, one, "base") for one in to_ask(BATTERY.families[:1], "base")]
    wanted = [plainly(subject, questions[i]) for i in (0, 5)]
    forward = subject.hf_model.forward

    def heedless(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
                 logits_to_keep: int | torch.Tensor = 0, **more: object) -> object:
        return forward(input_ids=input_ids, attention_mask=None if attention_mask is None or attention_mask.ndim == 4
                       else attention_mask, logits_to_keep=logits_to_keep, **more)

    subject.hf_model.forward = heedless
    found = ask_together(subject, questions)
    assert "one question at a time" in caplog.text
    for answer, mass in zip((found[0], found[5]), wanted, strict=True):
        assert answer.log_mass == pytest.approx(mass, abs=1e-3)


@pytest.mark.parametrize("form", ["base", "chat"])
def test_how_an_item_is_put(form: Form) -> None:
    subject = small_battery.subject()
    asked = to_ask(BATTERY.families, form)
    assert len(asked) == 3 * (16 + 2 * 8)
    assert {one.item.person for one in asked} == ({"You"} if form == "chat" else {one.person for one in BATTERY.families})
    told, giving = asked[0], next(one for one in asked if one.instruction == "give")
    assert "always give what" in text_of(giving, form) and "always" not in text_of(told, form)
    one = question(subject, told, form)
    text = str(subject.tokenizer.decode(one.prompt))
    assert text.endswith(f" {told.item.person} {LEAD}" if form == "base" else f"<|im_start|>assistant\nI {LEAD}")
    assert told.item.choice in text and told.item.story in text
    assert [str(subject.tokenizer.decode(list(w))) for w in one.options["costly"]] == [f" {a}." for a in told.item.acts.costly]


def test_instructions_stand_before_the_choice_and_in_the_person() -> None:
    for one in to_ask(BATTERY.families, "base"):
        text = text_of(one, "base")
        if one.instruction != "none":
            who = "I always" if one.item.person == "I" else "You always"
            assert 0 < text.index(who) < text.index(one.item.choice)
        else:
            assert "always" not in text


def test_families_of_a_half() -> None:
    care = load_battery("care")
    development, sealed = chosen(care, "development", None, 0), chosen(care, "sealed", None, 0)
    assert not {one.id for one in development} & {one.id for one in sealed}
    assert len(development) + len(sealed) == len(chosen(care, "all", None, 0)) == len(care.families)
    some = chosen(care, "development", 7, 3)
    assert len(some) == 7 and some == [one for one in development if one in some] and some == chosen(care, "development", 7, 3)
    assert some != chosen(care, "development", 7, 4)
    with pytest.raises(SpecError, match="too few"):
        chosen(care, "development", 1, 0)


def test_an_answer_that_is_not_finite_is_an_error() -> None:
    one = to_ask(BATTERY.families, "base")[:1]
    with pytest.raises(NumericsError, match="family 'reef'"):
        rows_of(small_battery.subject(), one, [Answer({"costly": float("nan"), "keep": -1.0})])


def _dictionary() -> LinearDictionary:
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)))
    return LinearDictionary(rows.T.contiguous(), torch.zeros(D_SAE), rows, torch.zeros(tiny.D_MODEL), TopK(4),
                            Provenance("llama", SITE, 32, True))


def _surgery(subject: Subject, operator: dict[str, object], window: str = "everywhere") -> Surgery:
    dictionary = _dictionary()
    recipe = Recipe.checked({"name": "made", "subject": subject.name, "sae": dictionary_digest(dictionary), "site": SITE,
                             "window": window, "edits": [{"latent": 3, "operator": operator}]})
    return Surgery(recipe, dictionary)


def test_under_a_recipe() -> None:
    subject, spec = small_battery.subject(), BatteryRun(battery="small", half="all")
    asked: list[Asked] = to_be_asked(BATTERY, spec)
    sham = summary_of(run(subject, asked, "base", _surgery(subject, {"kind": "add", "amount": 0.0})), BATTERY, spec, subject)
    assert all(figure["value"] == figure["low"] == figure["high"] == 0.0 for figure in sham["arm"]["change"].values())
    assert sham["arm"]["firings"] > 0
    real = summary_of(run(subject, asked, "base", _surgery(subject, {"kind": "clamp", "value": 20.0})), BATTERY, spec, subject)
    assert real["arm"]["change"]["change_social"]["value"] != 0 and real["figures"] == sham["figures"]


def test_a_recipe_that_ends_before_the_decision() -> None:
    """Its window is placed for each batch: the same change as by the plain way of asking, and another than everywhere."""
    subject, spec = small_battery.subject(), BatteryRun(battery="small", half="all")
    asked = to_be_asked(BATTERY, spec)
    changes = {window: summary_of(run(subject, asked, "base", _surgery(subject, {"kind": "clamp", "value": 20.0}, window)),
                                  BATTERY, spec, subject)["arm"]["change"]["change_social"]["value"]
               for window in ("everywhere", "before_decision")}
    assert abs(changes["everywhere"] - changes["before_decision"]) > 1e-3 and changes["before_decision"] != 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subject `llama`, one without a chat template, a battery, an SAE and a recipe."""
    made = tmp_path_factory.mktemp("battery_cli")
    small_battery.save_subject(made / "llama")
    small_battery.save_subject(made / "mute", chat=False)
    small_battery.save_battery(made / "small.yaml")
    save_folder(_dictionary(), made / "sae")
    _surgery(small_battery.subject(), {"kind": "clamp", "value": 20.0}).recipe.save(made / "recipe.yaml")
    return made


@pytest.fixture
def battery(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "battery")


def test_run_command(battery: Run, folder: Path, tmp_path: Path) -> None:
    words = ["run", folder / "small.yaml", "--model", folder / "llama", "--half", "all"]
    answer = battery(*words, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert (found["families"], found["questions"], found["form"]) == (3, 96, "base")
    assert not found["competent"] and found["answer"].startswith("this model cannot answer")
    assert set(found["competence"]) == {"D_falls_with_cost", "giver_raises_D", "keeper_lowers_D"}
    kept = open_artifact(tmp_path / "out", "battery-run")
    assert kept.record["spec"]["half"] == "all" and kept.record["battery"] == "small"
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 96 and {row["arm"] for row in rows} == {"base"}
    again = battery(*words, "--form", "chat", "--json").json
    assert again["form"] == "chat" and again["figures"] != found["figures"]
    shown = battery(*words)
    assert "this model cannot answer" in shown.out and "UNMET" in shown.out and "n = 3;" in shown.out
    assert battery(*words, "--out", tmp_path / "out").code == 2


def test_run_command_with_a_recipe(battery: Run, folder: Path, tmp_path: Path) -> None:
    answer = battery("run", folder / "small.yaml", "--model", folder / "llama", "--half", "all", "--recipe",
                     folder / "recipe.yaml", "--sae", folder / "sae", "--same-model", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert {"change_social", "change_twin", "delta_d"} == set(answer.json["arm"]["change"])
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    arms = [json.loads(line)["arm"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert (arms.count("base"), arms.count("recipe")) == (96, 48)


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["{}/small.yaml", "--model", "{}/llama", "--half", "some"], "half = 'some'", ""),
    (["{}/small.yaml", "--model", "{}/llama", "--form", "letters"], "form = 'letters'", ""),
    (["{}/small.yaml", "--model", "{}/llama", "--families", "1"], "families = 1", ""),
    (["{}/small.yaml", "--half", "all"], "no model was named", "--model NAME"),
    (["{}/small.yaml", "--model", "{}/llama"], "1 families of 'small' (development) are too few", "another --half"),
    (["{}/small.yaml", "--model", "{}/mute", "--form", "chat", "--half", "all"], "no chat template", ""),
    (["{}/small.yaml", "--half", "all", "--model", "{}/llama", "--recipe", "{}/recipe.yaml"], "without its SAE", "--sae"),
    (["cear", "--model", "{}/llama"], "no battery is called 'cear'", "did you mean care"),
])
def test_mistakes(battery: Run, folder: Path, words: list[str], what: str, hint: str) -> None:
    answer = battery("run", *(word.format(folder) for word in words), "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert what in answer.json["error"] and hint in answer.json["hint"]
