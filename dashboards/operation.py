"""What lies on the operating table: edits, prompt and settings, as the words of an address and as a recipe.

A strength is written in the unit that means the same for every feature: `strengthen` multiplies a feature's own activation;
`floor`, `clamp`, `cap` and `add` count in multiples of the largest activation that the store has seen of it.
"""

from __future__ import annotations

import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field

from dashboards.prompting import MAX_PROMPT, lines
from dashboards.store import FeatureStore, slug
from interventions.operators import Operator
from interventions.recipe import FeatureEdit, Recipe, Trigger, WindowRule
from undertow.core.errors import DictionaryError, SpecError
from undertow.core.spec import Spec
from undertow.subjects.sampling import Sampling

MAX_EDITS, MAX_TURNS, MAX_DOSE, MAX_TOKENS, MAX_NAME = 64, 20, 1_000.0, 512, 60
Kind = Literal["strengthen", "floor", "clamp", "ablate", "cap", "add"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)
Role = Literal["system", "user", "assistant"]


@runtime_checkable
class Words(Protocol):
    """Query words in order; a name may come several times."""

    def multi_items(self) -> list[tuple[str, str]]:
        """(name, value) pairs."""
        ...


class Edit(Spec):
    """One operator on one feature; `dose` is the slider's figure, in the operator's unit."""

    latent: int = Field(ge=0)
    kind: Kind = "strengthen"
    dose: float = Field(default=2.0, ge=-MAX_DOSE, le=MAX_DOSE)


class Turn(Spec):
    """One message of a chat; `role` None is a plain text, not a chat."""

    text: str = ""
    role: Role | None = None


class Operation(Spec):
    """Everything that a view of the operating table shows; each field is made of words of the address.

    Attributes:
        edits: what is done (words f, op, x: one of each an edit).
        turns: the prompt (words text and, for a chat, role).
        seed: of both texts.
        tokens: new tokens at most.
        temperature, top_p: as in `Sampling`.
        window: part of the text in which the recipe acts.
        trigger: where it acts (words only: latents, when, above, times: at_least, within).
        ceiling: norm above which a token is left alone: "" the one that the store was measured with, "none", or a number.
        words: forms whose hazard is followed: "en" English as the tokenizer writes it, "all" every language and spelling.
        name: what the recipe is called.
    """

    edits: tuple[Edit, ...] = Field(default=(), max_length=MAX_EDITS)
    turns: tuple[Turn, ...] = Field(default=(Turn(),), min_length=1, max_length=MAX_TURNS)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    window: WindowRule = "everywhere"
    trigger: Trigger | None = None
    ceiling: str = Field(default="", pattern=r"^(|none|[0-9]{1,12}(\.[0-9]{1,12})?)$")
    words: Literal["en", "all"] = "en"
    name: str = Field(default="surgery", min_length=1, max_length=MAX_NAME)

    @classmethod
    def read(cls, words: Words) -> Operation:
        """From an address; other views' words are passed over.

        Raises SpecError that names the field, says that the prompt is too long, or that an edit is incomplete.
        """
        by_name: dict[str, list[str]] = {}
        for name, value in words.multi_items():
            by_name.setdefault(name, []).append(value)
        given: dict[str, Any] = {name: by_name[name][-1].strip() for name in _SINGLE if by_name.get(name, [""])[-1].strip()}
        given["edits"] = _edits(by_name)
        given["turns"] = _turns(by_name)
        if only := by_name.get("only", [""])[-1].strip():
            given["trigger"] = {"latents": _numbers(only), "when": by_name.get("when", ["above"])[-1],
                                "above": by_name.get("above", [""])[-1].strip() or 0.0,
                                "at_least": by_name.get("times", [""])[-1].strip() or 1,
                                "within": by_name.get("within", [""])[-1].strip() or 1}
        return cls.checked(given, "the address")

    def pairs(self, **changes: Any) -> list[tuple[str, str]]:
        """Words of the address, without those at their default; `changes` replace fields."""
        moved = self.model_copy(update=changes)
        found = [(name, value) for edit in moved.edits
                 for name, value in (("f", str(edit.latent)), ("op", edit.kind), ("x", f"{edit.dose:.12g}"))]
        for turn in moved.turns:
            found += [] if turn.role is None else [("role", turn.role)]
            found += [("text", turn.text)] if turn.text or turn.role else []
        if moved.trigger is not None:
            found += [("only", ",".join(map(str, moved.trigger.latents))), ("when", moved.trigger.when),
                      ("above", f"{moved.trigger.above:.12g}")]
            if moved.trigger.within > 1:
                found += [("times", str(moved.trigger.at_least)), ("within", str(moved.trigger.within))]
        for name in _SINGLE:
            value = getattr(moved, name)
            if value != type(self).model_fields[name].default:
                found.append((name, f"{value:.12g}" if isinstance(value, float) else str(value)))
        return found

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a chat."""
        return self.turns[0].role is not None

    def sampling(self) -> Sampling:
        """How to sample."""
        return Sampling(max_new_tokens=self.tokens, temperature=self.temperature, top_p=self.top_p)

    def known(self, store: FeatureStore) -> Operation:
        """Itself. Raises DictionaryError for a feature that the SAE of `store` does not have."""
        for latent in (*(edit.latent for edit in self.edits), *(self.trigger.latents if self.trigger else ())):
            store.known(latent)
        return self

    def recipe(self, store: FeatureStore) -> Recipe:
        """The recipe, in the features' own units. Raises SpecError without an edit, DictionaryError for an unknown feature."""
        if not self.edits:
            raise SpecError("there is no feature on the operating table", "type a feature's number and press Add")
        self.known(store)
        edits = [FeatureEdit(latent=edit.latent, operator=_operator(edit, unit(store, edit.latent))) for edit in self.edits]
        own = store.record.get("norm_ceiling")
        ceiling = own if self.ceiling == "" else None if self.ceiling == "none" else float(self.ceiling)
        return Recipe.checked({"name": self.name, "subject": store.record["subject_digest"], "sae": store.dictionary,
                               "site": store.record["site"], "edits": edits, "trigger": self.trigger, "window": self.window,
                               "norm_ceiling": ceiling}, "the operating table")


_SINGLE = ("seed", "tokens", "temperature", "top_p", "window", "ceiling", "words", "name")


def defaults() -> dict[str, str]:
    """What the words that come once are if the address does not say, as they are written in a form."""
    fields = {name: Operation.model_fields[name].default for name in _SINGLE}
    return {name: f"{value:.12g}" if isinstance(value, float) else str(value) for name, value in fields.items()}


class Unit(NamedTuple):
    """What dose 1 of floor, clamp, cap and add is: the feature's maximum, or 1 where it never fired."""

    value: float
    fired: bool


def unit(store: FeatureStore, latent: int) -> Unit:
    """The unit of a feature's doses. Raises DictionaryError for an unknown one."""
    maximum = float(store.columns["maximum"][store.known(latent)])
    return Unit(maximum, True) if maximum > 0 else Unit(1.0, False)


def _operator(edit: Edit, of: Unit) -> Operator:
    amount = _amount(edit.dose, of)
    fields: dict[Kind, dict[str, float]] = {"strengthen": {"gain": edit.dose}, "ablate": {}, "add": {"amount": amount}}
    made = FeatureEdit.model_validate({"latent": edit.latent,
                                       "operator": {"kind": edit.kind, **fields.get(edit.kind, {"value": amount})}})
    return made.operator


def from_recipe(recipe: Recipe, store: FeatureStore, before: Operation) -> Operation:
    """The operating table with `recipe` on it; prompt and sampling stay as in `before`.

    Raises:
        DictionaryError: the recipe names features of another SAE, or of another site.
        SpecError: more edits than the table holds, or a dose out of its range.
    """
    if recipe.sae != store.dictionary:
        raise DictionaryError(f"the recipe {recipe.name!r} names features of the SAE {recipe.sae}; this store is of "
                              f"{store.dictionary}",
                              "open the store of that SAE, or build one: undertow dashboard build SAE --out DIR")
    if recipe.site != store.record["site"]:
        raise DictionaryError(f"the recipe {recipe.name!r} operates at {recipe.site}; this store was measured at "
                              f"{store.record['site']}")
    edits = [{"latent": edit.latent, "kind": edit.operator.kind, "dose": _dose(edit.operator, unit(store, edit.latent))}
             for edit in recipe.edits]
    own = store.record.get("norm_ceiling")
    ceiling = "" if recipe.norm_ceiling == own else "none" if recipe.norm_ceiling is None else f"{recipe.norm_ceiling:.12f}"
    kept = before.model_dump(include={"turns", "seed", "tokens", "temperature", "top_p", "words"})
    trigger = None if recipe.trigger is None else recipe.trigger.model_dump()
    return Operation.checked({**kept, "edits": edits, "trigger": trigger, "window": recipe.window, "ceiling": ceiling,
                              "name": recipe.name[:MAX_NAME]}, "the recipe")


def _dose(operator: Operator, of: Unit) -> float:
    figures = operator.model_dump(exclude={"kind"})
    if not figures:
        return 1.0
    [(name, figure)] = figures.items()
    if name == "gain":
        return float(figure)
    tried = [float(f"{figure / of.value:.{digits}g}") for digits in range(1, 13)]
    return next((dose for dose in tried if _amount(dose, of) == figure), tried[-1])


def _amount(dose: float, of: Unit) -> float:
    """A dose in the feature's own units, to nine digits: what was read from a file is written back as it was."""
    return float(f"{dose * of.value:.9g}")


def recipe_file(recipe: Recipe) -> str:
    """The name of the file that a recipe is saved under: its own name and its digest."""
    return f"{slug(recipe.name)}-{recipe.digest()[:8]}.yaml"


def apply_command(operation: Operation, store: FeatureStore, folder: Path) -> str:
    """The command that writes the same two texts, once the recipe is saved in `folder`; "" where there is none.

    The command line has plain texts and chats of one user message.
    """
    chat = operation.is_chat
    text = operation.turns[0].text
    if not operation.edits or not text.strip() or (chat and [turn.role for turn in operation.turns] != ["user"]):
        return ""
    words = ["undertow", "recipe", "apply", "--seed", str(operation.seed), "--max-new-tokens", str(operation.tokens),
             "--temperature", f"{operation.temperature:.12g}", "--top-p", f"{operation.top_p:.12g}",
             *(["--chat"] if chat else []), *place_words(store), "--", str(folder / recipe_file(operation.recipe(store))),
             store.record["spec"]["sae"], text]
    return shlex.join(words)


def place_words(store: FeatureStore) -> list[str]:
    """Options that open the store's subject; none where the SAE itself names it."""
    options = store.record["spec"]["options"]
    found = ["--model", options[options.index("--model") + 1]] if "--model" in options else []
    return [*found, *(["--same-model"] if "--same-model" in options else [])]


def _edits(by_name: dict[str, list[str]]) -> list[dict[str, str]]:
    latents, kinds, doses = (by_name.get(name, []) for name in ("f", "op", "x"))
    if not len(latents) == len(kinds) == len(doses):
        raise SpecError(f"the address has {len(latents)} features (f), {len(kinds)} operators (op) and {len(doses)} strengths "
                        "(x)", "write one of each for every edit: f=7&op=strengthen&x=2")
    return [{"latent": latent.strip(), "kind": kind, "dose": dose.strip()}
            for latent, kind, dose in zip(latents, kinds, doses, strict=True)]


def _turns(by_name: dict[str, list[str]]) -> list[dict[str, Any]]:
    texts, roles = [lines(text) for text in by_name.get("text", [])], by_name.get("role", [])
    if (total := sum(map(len, texts))) > MAX_PROMPT:
        raise SpecError(f"the prompt has {total:,} characters; at most {MAX_PROMPT:,} are read",
                        "shorten it, or use the command line: undertow recipe apply")
    if not roles:
        if len(texts) > 1:
            raise SpecError(f"the address has {len(texts)} texts and no roles", "write role=user before each text of a chat")
        return [{"text": texts[0] if texts else ""}]
    if len(roles) != len(texts):
        raise SpecError(f"the address has {len(roles)} roles and {len(texts)} texts", "write one of each for every turn")
    return [{"role": role, "text": text} for role, text in zip(roles, texts, strict=True)]


def _numbers(text: str) -> Sequence[str]:
    return [part for part in text.replace(",", " ").split() if part]
