"""Naming screens: does a latent have to do with the forbidden word, more than latents that are like it?

Three measures, each against the same measure of at least 100 matched latents (firing rate, mean activation, decoder norm):
what it writes into the logits of the word, how often the word stands where it fires, and what it does to the word's
probability when it is added. A latent fails where fewer than one in twenty of its matches reaches its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from features.deciding import Primed, Progress, silent
from features.examples import ExampleTable
from features.ranking import AFTER, BEFORE, Examples
from sae.dictionary import Dictionary
from undertow.core.errors import DictionaryError, SpecError, TextError
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.vocabulary import read_vocabulary
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.unembed import UnembedView, final_norm_and_unembed

MATCHES = 100
ALPHA = 0.05
_TINY_LOG = -60.0  # stands for the log of a probability of zero


@final
class Screen(NamedTuple):
    """One measure of one latent.

    Attributes:
        value: the measure.
        matched: its median over the matched latents.
        p: (1 + number of matches with at least the value) / (1 + number of matches), in (0, 1].
    """

    value: float
    matched: float
    p: float

    @property
    def passed(self) -> bool:
        """True unless the latent has more to do with the word than all but one in twenty of its matches."""
        return self.p >= ALPHA


@final
class Names(NamedTuple):
    """What the measures need.

    Attributes:
        subject, dictionary, site: where.
        table: firing statistics and contexts of the same SAE on ordinary text.
        lexicon: the words: T0 for logits and probabilities, T0 and T1 for contexts.
        prompts: texts at whose end a latent is added.
    """

    subject: Subject
    dictionary: Dictionary
    site: Site
    table: ExampleTable
    lexicon: Lexicon
    prompts: Sequence[str]


def screens(names: Names, latents: Sequence[int], n_matches: int = MATCHES, progress: Progress = silent
            ) -> dict[int, dict[str, Screen]]:
    """Every measure ("logit", "contexts", "output") of every latent, by latent and name.

    Raises:
        DictionaryError: too few latents fire to find `n_matches` for each, or the table is of another SAE.
        SpecError: no form of the lexicon can be written with the tokenizer.
        TextError: there is no prompt.
    """
    if names.table.d_sae != names.dictionary.d_sae:
        raise DictionaryError(f"a table of {names.table.d_sae} latents given with an SAE of {names.dictionary.d_sae}")
    if not latents:
        return {}
    matches = matched_latents(names.table, names.dictionary, latents, n_matches)
    wanted = sorted({*latents, *(int(i) for row in matches.values() for i in row)})
    place = {latent: i for i, latent in enumerate(wanted)}
    measured = _measured(names, wanted, progress)
    return {latent: {name: _screen(values[place[latent]], values[[place[int(i)] for i in matches[latent]]])
                     for name, values in measured.items()} for latent in latents}


def _measured(names: Names, latents: Sequence[int], progress: Progress) -> dict[str, Float64[ndarray, "k"]]:
    tokens = word_tokens(names.subject, names.lexicon)
    near = names.lexicon.only(tiers=[t for t in ("T0", "T1") if names.lexicon.forms(t)])
    directions = names.dictionary.directions(torch.tensor(latents, dtype=torch.long)).float().cpu()
    means = names.table.means
    typical = np.where(means > 0, means, np.median(means[means > 0]))[list(latents)]  # some never fire on ordinary text
    added = torch.from_numpy(typical).float()[:, None] * directions
    return {"logit": logit_scores(directions, final_norm_and_unembed(names.subject), tokens),
            "contexts": context_scores(names.subject, names.table, near, latents),
            "output": output_scores(names.subject, names.site, names.prompts, added, tokens, progress)}


def named(screens: Mapping[int, Mapping[str, Screen]]) -> set[int]:
    """Latents that fail at least one screen."""
    return {latent for latent, measured in screens.items() if not all(screen.passed for screen in measured.values())}


def _screen(value: float, matched: Float64[ndarray, "match"]) -> Screen:
    return Screen(float(value), float(np.median(matched)), (1 + int(np.sum(matched >= value))) / (1 + len(matched)))


def matched_latents(table: ExampleTable, dictionary: Dictionary, latents: Sequence[int], n: int
                    ) -> dict[int, Int64[ndarray, "match"]]:
    """For each latent the `n` nearest others in log firing rate, log mean activation and log decoder norm.

    Each is measured in standard deviations over the latents that fire; none of `latents` is a match.
    Raises DictionaryError if fewer than `n` others fire.
    """
    norms = dictionary.W_dec.norm(dim=-1).double().numpy(force=True)
    facts = np.log(np.maximum(np.column_stack([table.density, table.means, norms]), 1e-12))
    others = np.setdiff1d(np.flatnonzero(table.counts > 0), np.array(list(latents), dtype=np.int64))
    if len(others) < n:
        raise DictionaryError(f"{len(others)} latents fire besides those under test; {n} matches are needed",
                              "measure on more text, or use an SAE with more live latents")
    scale = facts[others].std(axis=0)
    facts = facts / np.where(scale > 1e-4, scale, 1.0)  # rows of one norm differ in the last bits
    return {latent: others[np.argsort(np.square(facts[others] - facts[latent]).sum(axis=1), kind="stable")[:n]]
            for latent in latents}


def word_tokens(subject: Subject, lexicon: Lexicon, share: float = 0.5) -> Int64[Tensor, "token"]:
    """Tokens that begin a T0 form and say at least `share` of it (in bytes), as the tokenizer itself would spell it.

    Where no token says as much of a form, all first tokens of spellings are given. Raises SpecError if there is none at all.
    """
    vocabulary = read_vocabulary(subject.tokenizer)
    most, firsts = set(), set()
    for form in lexicon.forms("T0"):
        for text in (form.text, form.text.capitalize(), form.text.upper()):
            for spelt in (text, f" {text}"):
                ids = subject.tokenizer.encode(spelt, add_special_tokens=False, split_special_tokens=True)
                if not ids or ids[0] in vocabulary.special or not vocabulary.tokens[ids[0]].strip():
                    continue
                firsts.add(ids[0])
                if len(vocabulary.tokens[ids[0]].strip()) >= share * len(text.encode()):
                    most.add(ids[0])
    if not firsts:
        raise SpecError(f"no form of lexicon {lexicon.name!r} can be written with the tokenizer of {subject.name}",
                        "use a lexicon in the language and script of the model")
    return torch.tensor(sorted(most or firsts))


def logit_scores(directions: Float[Tensor, "k d_model"], unembed: UnembedView, tokens: Int64[Tensor, "token"]
                 ) -> Float64[ndarray, "k"]:
    """Largest direct effect (see `logit_effect`) on a token of the word, in standard deviations over the vocabulary."""
    scores = []
    for part in directions.to(unembed.W_U).split(64):
        written = part - part.mean(dim=1, keepdim=True) if unembed.centred else part
        effect = (written * unembed.gamma) @ unembed.W_U.T
        effect = effect - effect.mean(dim=1, keepdim=True)
        scores.append(effect[:, tokens].amax(dim=1) / effect.std(dim=1).clamp_min(1e-12))
    return torch.cat(scores).double().numpy(force=True)


def context_scores(subject: Subject, table: ExampleTable, lexicon: Lexicon, latents: Sequence[int]) -> Float64[ndarray, "k"]:
    """Share of a latent's kept firings (strongest and uniform) with a form of the lexicon within reach, in [0, 1]; 0 if none.

    Within reach is up to 20 tokens before and 10 after, as examples show them.
    """
    said: dict[tuple[int, int], bool] = {}

    def says(row: int, position: int) -> bool:
        if (row, position) not in said:
            ids = table.tokens[row, max(0, position - BEFORE): position + AFTER + 1]
            text = subject.tokenizer.decode(ids[ids >= 0].tolist(), clean_up_tokenization_spaces=False)
            said[row, position] = bool(lexicon.find(str(text)))
        return said[row, position]

    def places(examples: Examples, latent: int) -> list[tuple[int, int]]:
        return [(int(row), int(position)) for row, position in
                zip(examples.rows[latent], examples.positions[latent], strict=True) if row >= 0]

    found = []
    for latent in latents:
        at = {*places(table.top, latent), *places(table.uniform, latent)}
        found.append(sum(says(*place) for place in at) / len(at) if at else 0.0)
    return np.array(found)


def output_scores(subject: Subject, site: Site, prompts: Sequence[str], deltas: Float[Tensor, "k d_model"],
                  tokens: Int64[Tensor, "token"], progress: Progress = silent) -> Float64[ndarray, "k"]:
    """Change of the log probability, in nats, that a token of the word comes next, where a delta is added to the last token.

    Mean over `prompts`. Raises TextError if there is none.
    """
    if not prompts:
        raise TextError("the output screen needs at least one prompt")
    changes = []
    for text in prompts:
        logits = Primed(subject, subject.encode(text)).next_logits(site, torch.cat([torch.zeros_like(deltas[:1]), deltas]))
        mass = logits.log_softmax(dim=-1)[:, tokens].logsumexp(dim=1).clamp_min(_TINY_LOG)
        changes.append((mass[1:] - mass[0]).double().cpu())
        progress(len(changes), len(prompts))
    return torch.stack(changes).mean(dim=0).numpy()
