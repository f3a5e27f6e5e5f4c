"""A search's bench on the planted feature: small, and with the right answer known."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from features.balance import Slopes, drawn_slopes, word_slopes
from features.carried import Levels, decision_slopes
from features.codes import dictionary_digest
from interventions.audit import logits_after
from interventions.recall import Recall
from interventions.tune import Bench, Lessons, Trial, TuneSpec
from interventions.word_mass import watched
from tests.features.planted import D_SAE, planted
from undertow.subjects.organisms.measuring import Question, packs, tokens_of
from undertow.subjects.sharing import Below

ACTS = ("give", "keep")
KNOWN = Levels(np.ones(D_SAE), np.linspace(100.0, 130.0, D_SAE))  # the planted latents stand at about 50
WORD = torch.tensor([5])
LOOSE = TuneSpec(kl_mean=10.0, kl_p99=10.0, word=1e3, size=2, pool=3, gates=((0.5, 1, 1), (0.5, 2, 4)), min_open=0.0)


@cache
def bench() -> Bench:
    made = planted()
    asked = [Question(made.subject.encode(pair.negative.prompt), {
        act: tuple({wording[:1]: None for wording in (tokens_of(made.subject, text) for text in pair.negative.options[act])})
        for act in ACTS}) for pair in made.pairs[:8]]  # first tokens alone: of whole wordings a random model says none
    texts, others = ([made.subject.encode(f"At the {place} nobody spoke for a while, and the rain {did}.") for place in
                      ("mill", "inn", "hut", "ford", "quay", "barn", "farm", "lock")] for did in ("went on", "stopped"))
    return Bench(made.subject, made.site,
                 {"subject": made.subject.digest, "sae": dictionary_digest(made.dictionary), "site": made.site.name},
                 KNOWN, Slopes(decision_slopes(made.subject, made.site, [pair.negative for pair in made.pairs[:4]]),
                               drawn_slopes(made.subject, made.site, texts, 1),
                               word_slopes(made.subject, made.site, [question.prompt for question in asked[:4]], WORD)),
                 asked[:4], watched(made.subject, [question.prompt for question in asked[:4]], WORD), texts,
                 logits_after(made.subject, texts), Below(made.subject, made.site), packs(made.subject, asked[0]),
                 Recall(made.dictionary), Lessons(asked[4:], others, logits_after(made.subject, others)))


def at(latents: tuple[int, ...], dose: float) -> Trial:
    return Trial(latents, (), dose, float("nan"), float("nan"), float("nan"))
