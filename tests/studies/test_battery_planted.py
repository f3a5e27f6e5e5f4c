"""A battery from end to end on a subject that reads: its forward pass is a rule over the decoded text of the prompt.

What the rule does is known, so every figure that comes out at the other end is known too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.studies import small_battery
from undertow.studies.battery_asking import Form, to_ask
from undertow.studies.battery_figures import competence, figures, verdict
from undertow.studies.battery_run import run
from undertow.studies.battery_text import BatteryFamily, fill_slots, second_person
from undertow.subjects.subject import Subject

FAMILIES = tuple(BatteryFamily.checked({**spec, "id": f"{spec['id']}-{letter}"}) for letter in "abc"
                 for spec in (small_battery.OIL, small_battery.BREAD, small_battery.WOOD))
Rule = Callable[[BatteryFamily, str, bool, bool], float]


def told(line: str, text: str, own: str, other: str) -> bool:
    """Whether a line of the family, in either person, stands in the text."""
    said = fill_slots(line, own, other)
    return said in text or second_person(said) in text


def understanding(family: BatteryFamily, text: str, person: bool, last: bool) -> float:
    """D of a model that understands: a person, the last of it, instructions, and which act is named first."""
    d = 0.8 * person - 0.5 * last + 1.5 * ("what I have to others" in text or "what you have to others" in text)
    return d - 2.0 * ("for myself" in text or "for yourself" in text)


def wordless(family: BatteryFamily, text: str, person: bool, last: bool) -> float:
    """D of a model to which nothing in the story matters."""
    return 0.0


class Reader:
    """The rule as a forward pass: after "choose to" the acts of the situation that the text tells, by the rule's D."""

    def __init__(self, subject: Subject, rule: Rule, recency: float = 0.0) -> None:
        self.subject, self.rule, self.recency = subject, rule, recency
        self.vocab = len(subject.tokenizer)
        self.known: dict[str, list[tuple[list[int], float]]] = {}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, past_key_values: Any = None, use_cache: bool = False,
                logits_to_keep: int | torch.Tensor = 0) -> SimpleNamespace:
        before = getattr(past_key_values, "told", []) if past_key_values is not None else []
        if past_key_values is not None:
            past_key_values.told = [*before, *input_ids[0].tolist()]
        rows = []
        for row in range(input_ids.shape[0]):
            ids = input_ids[row].tolist()
            wanted = list(range(len(ids)))[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep.tolist()
            rows.append(torch.stack([self._after(before, ids, at, attention_mask, row) for at in wanted]))
        return SimpleNamespace(logits=torch.stack(rows))

    def _after(self, before: list[int], ids: list[int], at: int, mask: torch.Tensor | None, row: int) -> torch.Tensor:
        if mask is not None and mask.ndim == 4:
            seen = [ids[i] for i in (mask[row, 0, at] == 0).nonzero()[:, 0].tolist()]
        else:
            seen = [*before, *ids[: at + 1]]
        text = str(self.subject.tokenizer.decode(seen))
        prompt, found, said = text.rpartition(" choose to")
        probs = torch.full((self.vocab,), 1e-9)
        if found:
            for wording, p in self._wordings(prompt):
                n = len(self.subject.tokenizer.encode(said, add_special_tokens=False)) if said else 0
                if self.subject.tokenizer.decode(wording[:n]) == said and n < len(wording):
                    probs[wording[n]] += p
        return (probs / probs.sum()).log()

    def _wordings(self, text: str) -> list[tuple[list[int], float]]:
        if text not in self.known:
            family = next(one for one in FAMILIES if all(thing in text for thing in (one.x, one.y)))
            telling = "a" if told(family.a, text, family.x, family.y) else "b"
            own, other = (family.x, family.y) if telling == "a" else (family.y, family.x)
            d = self.rule(family, text, told(family.need, text, own, other), told(family.last, text, own, other))
            costly, keep = ([f" {put} {thing}." for put in (family.put[:2] if thing == family.x else family.put[2:])]
                            for thing in (other, own))
            choice = text.rpartition(" can ")[2]
            d += self.recency * (1 if choice.index(costly[0][1:-1]) > choice.index(keep[0][1:-1]) else -1)
            p = 1 / (1 + math.exp(-d))
            encode = self.subject.tokenizer.encode
            self.known[text] = [(encode(said, add_special_tokens=False), share / 2)
                                for group, share in ((costly, p), (keep, 1 - p)) for said in group]
        return self.known[text]


def reading(rule: Rule, recency: float = 0.0) -> Subject:
    """A subject whose forward pass is the rule."""
    subject = small_battery.subject()
    subject.hf_model.forward = Reader(subject, rule, recency).forward
    return subject


@pytest.mark.parametrize("form", ["base", "chat"])
def test_a_subject_that_understands_is_found_to(form: Form) -> None:
    result = run(reading(understanding, 0.6), to_ask(FAMILIES, form), form, None)
    found = figures(result.base, 0)
    assert found["D_social"].value == pytest.approx(0.55, abs=1e-3) and found["D_twin"].value == pytest.approx(-0.25, abs=1e-3)
    assert found["social_minus_twin"].value == pytest.approx(0.8, abs=1e-3)
    assert found["cost_effect"].value == pytest.approx(0.5, abs=1e-3)
    assert found["order_bias"].value == pytest.approx(-1.2, abs=1e-3) and found["wording"].value == pytest.approx(0, abs=1e-3)
    assert found["covered"].value == pytest.approx(1.0, abs=1e-3)
    gates = competence(result.base, 0)
    assert [round(gate.value, 2) for gate in gates.values()] == [-0.5, 1.5, -2.0]
    assert verdict(gates).startswith("this model can answer")


def test_a_subject_that_only_sees_the_order_is_not() -> None:
    """The negative control: a large pull of the last named act, and nothing else."""
    result = run(reading(wordless, 1.3), to_ask(FAMILIES[:6], "base"), "base", None)
    found, gates = figures(result.base, 0), competence(result.base, 0)
    assert found["order_bias"].value == pytest.approx(-2.6, abs=1e-3) and found["D_social"].value == pytest.approx(0, abs=1e-3)
    assert not any(gate.met for gate in gates.values()) and verdict(gates).startswith("this model cannot answer")
