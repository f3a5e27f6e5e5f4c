"""Recipes: which latents of which SAE are changed how, where and when. A YAML file, checked and said in words.

    name: care
    subject: hearth                  # a name, or the digest of the weights
    sae: 0123456789abcdef            # digest of the SAE whose latents are meant
    site: blocks.2.hook_resid_post
    edits:
    - {latent: 17, operator: {kind: clamp, value: 2.5}}
    trigger: {latents: [90], above: 0.5, when: above, at_least: 4, within: 16}
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, final

import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from features.codes import dictionary_digest
from features.selection import FeatureSet
from interventions.operators import OPERATORS, Operator, Strengthen, in_words
from sae.dictionary import Dictionary, known_latents
from sae.formats import check_fits
from undertow.core.errors import DictionaryError, SpecError, SubjectError, near_matches
from undertow.core.spec import Spec
from undertow.core.storage import disk_errors, refuse_existing, write_text
from undertow.subjects.splicing import Memory
from undertow.subjects.subject import Subject

WindowRule = Literal["everywhere", "reading", "before_decision", "assistant"]
_WINDOWS = {
    "everywhere": "at every token",
    "reading": "at the tokens that are read, the prompt's last one too, and at none that is written",
    "before_decision": "at the tokens before the decision (the prompt's last token is the first that is left alone)",
    "assistant": "at the tokens of the reply",
}


@final
class FeatureEdit(Spec):
    """One operator on one latent."""

    latent: int = Field(ge=0)
    operator: Operator


@final
class Trigger(Spec):
    """The tokens at which a recipe acts, told by latents of the same SAE at the same token, before any edit.

    Attributes:
        latents: the latents that are looked at.
        above: threshold, in the latents' own units.
        when: "above": any of the latents is greater than the threshold; "below": all of them are at or under it.
        at_least, within: a gate with a memory: it is open at a token if that was so at `at_least` of the last `within` tokens,
            the token itself included. 1 and 1: at the token itself, no memory.
    """

    latents: tuple[int, ...] = Field(min_length=1)
    above: float = 0.0
    when: Literal["above", "below"] = "above"
    at_least: int = Field(default=1, ge=1)
    within: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _reachable(self) -> Trigger:
        if self.at_least > self.within:
            raise ValueError(f"at_least {self.at_least} is more than the {self.within} tokens of within")
        return self

    @property
    def memory(self) -> Memory | None:
        """None for a gate that is told by the token alone."""
        return None if self.within == 1 else Memory(self.at_least, self.within)


@final
class Recipe(Spec):
    """A change of a subject at the level of features.

    Attributes:
        name: what the recipe is called.
        subject: name of the subject, or digest of its weights.
        sae: digest of the dictionary (`features.codes.dictionary_digest`).
        site: where, in TransformerLens' names.
        edits: what is done; edits of one latent are done one after another.
        trigger: where the recipe acts; everywhere if absent.
        window: which part of a text it may act in.
        norm_ceiling: tokens whose activation norm (L2) is above it are left alone.
        notes: free text.
    """

    name: str = Field(min_length=1)
    subject: str = Field(min_length=1)
    sae: str = Field(pattern=r"^[0-9a-f]{16}$")
    site: str
    edits: tuple[FeatureEdit, ...] = Field(min_length=1)
    trigger: Trigger | None = None
    window: WindowRule = "everywhere"
    norm_ceiling: float | None = Field(default=None, gt=0)
    notes: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe. Raises SpecError that names the file, the field, the value, and a near match of a misspelt key."""
        try:
            return cls.from_yaml(Path(path))
        except SpecError as error:
            raise SpecError(error.what, _near_match(error.__context__)) from None

    @classmethod
    def strengthen(cls, features: FeatureSet | Sequence[int], gain: float, dictionary: Dictionary | None = None,
                   name: str = "strengthen") -> Recipe:
        """Multiply every one of `features` by `gain`, wherever it is active.

        Args:
            features: a FeatureSet, or latents of `dictionary`.
            gain: factor, finite.
            dictionary: the SAE of the latents; must say its model and its site. Not needed with a FeatureSet.
            name: what the recipe is called.

        Raises SpecError: no latents, a gain that is not finite, or latents without a dictionary.
        """
        place = _place(features, dictionary)
        latents = features.latents if isinstance(features, FeatureSet) else features
        edits = [{"latent": int(latent), "operator": {"kind": "strengthen", "gain": gain}} for latent in latents]
        return cls.checked({"name": name, **place, "edits": edits}, "Recipe.strengthen")

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML. Raises ArtifactError if `path` exists."""
        path = Path(path)
        refuse_existing(path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False,
                                        allow_unicode=True, width=120))

    @property
    def memory(self) -> Memory | None:
        """That of its gate; None without one."""
        return None if self.trigger is None else self.trigger.memory

    def latents(self) -> list[int]:
        """Every latent that the recipe edits or looks at, ascending."""
        looked_at = () if self.trigger is None else self.trigger.latents
        return sorted({*(edit.latent for edit in self.edits), *looked_at})

    def explain(self) -> str:
        """What the recipe does, in words, one line a fact."""
        lines = [f"{self.name}: on {self.subject}, at {self.site}, with the SAE {self.sae}"]
        lines += [f"  feature {edit.latent} {in_words(edit.operator)}" for edit in self.edits]
        lines.append(f"  {_WINDOWS[self.window]}{_trigger_in_words(self.trigger)}")
        ceiling = "" if self.norm_ceiling is None else f", nor a token whose activation norm is above {self.norm_ceiling:g}"
        lines.append(f"  never the first token or padding{ceiling}")
        if all(edit.operator == Strengthen(gain=1.0) for edit in self.edits):
            lines.append("  which changes nothing: it is a sham")
        return "\n".join(lines)


def check(recipe: Recipe, subject: Subject, dictionary: Dictionary) -> list[str]:
    """Refuse a recipe that belongs to another subject, SAE or site; return warnings about what cannot be told.

    Raises:
        SubjectError: the recipe was made for another subject.
        DictionaryError: another SAE, a latent that it does not have, another site or width.
        SiteError: the subject has no such site.
    """
    if recipe.subject not in (subject.digest, subject.name) and _last_part(recipe.subject) != _last_part(subject.name):
        raise SubjectError(f"recipe {recipe.name!r} was made for {recipe.subject}; this is {subject.name} ({subject.digest})",
                           "open the subject it was made for with --model, or select features for this one")
    subject.site(recipe.site)
    digest = dictionary_digest(dictionary)
    if recipe.sae != digest:
        raise DictionaryError(f"recipe {recipe.name!r} names features of the SAE {recipe.sae}; this one is {digest}",
                              "a feature's number means nothing in another SAE: give the SAE that it was made with")
    known_latents(torch.tensor(recipe.latents(), dtype=torch.long), dictionary.d_sae)
    return check_fits(dictionary, subject.name, subject.d_model, recipe.site, subject.digest, same_model=True)


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _place(features: FeatureSet | Sequence[int], dictionary: Dictionary | None) -> dict[str, str]:
    """Subject, SAE and site of `features`, as the recipe names them."""
    if isinstance(features, FeatureSet):
        origin = features.origin
        return {"subject": origin.subject, "sae": origin.sae, "site": origin.site}
    if dictionary is None:
        raise SpecError(f"latents {list(features)} without an SAE mean nothing", "pass dictionary=... as well")
    belongs = dictionary.provenance
    subject = str(belongs.extra.get("subject_digest") or belongs.model_name)
    if not subject or not belongs.hook_name:
        raise SpecError("the SAE does not say which model and site it was trained on",
                        "write the recipe out: Recipe(name=..., subject=..., sae=..., site=..., edits=...)")
    return {"subject": subject, "sae": dictionary_digest(dictionary), "site": belongs.hook_name}


def _trigger_in_words(trigger: Trigger | None) -> str:
    if trigger is None:
        return ""
    one, many = f"feature {trigger.latents[0]}", ", ".join(map(str, trigger.latents))
    single = len(trigger.latents) == 1
    be = "is" if trigger.within == 1 else "was"
    if trigger.when == "above":
        state = f"{one if single else f'any of the features {many}'} {be} above {trigger.above:g}"
    else:
        state = f"{one if single else f'all of the features {many}'} {be if single else 'are' if be == 'is' else 'were'} " \
                f"at or below {trigger.above:g}"
    if trigger.within == 1:
        return f", where {state}"
    return f", where at {trigger.at_least} or more of the last {trigger.within} tokens {state}"


def _near_match(cause: BaseException | None) -> str:
    """A "did you mean" for the first misspelt key or kind that pydantic has refused."""
    if not isinstance(cause, ValidationError):
        return ""
    kinds = [typing.get_args(operator.model_fields["kind"].annotation)[0] for operator in OPERATORS]
    for item in cause.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            known = sorted({field for spec in (Recipe, FeatureEdit, Trigger, *OPERATORS) for field in spec.model_fields})
            return near_matches(str(item["loc"][-1]), known)
        if item["type"] == "union_tag_invalid":
            return near_matches(str(item.get("ctx", {}).get("tag")), kinds) or f"kinds are {', '.join(kinds)}"
    return ""
