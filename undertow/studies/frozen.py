"""The control of the dictionary: the same search in an SAE whose decoder is random and never trained.

Such SAEs come near trained ones on many figures (arXiv 2602.14111), so a surgery that they give as well says nothing about what
the trained features are. The encoder alone is trained, to reconstruct as well as the random directions allow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.recipe import Recipe
from interventions.tune import floors
from sae.dictionary import Dictionary, LinearDictionary, Provenance, TopK
from sae.formats import load, save_folder
from undertow.core.errors import ArtifactError
from undertow.core.record import run_record
from undertow.core.seeds import derive_seed, generator
from undertow.core.storage import MANIFEST, create_artifact, open_artifact, write_json
from undertow.studies.demo import Setting, find
from undertow.studies.preparing import NOTHING_FOUND, SAE_K, Prepared, TokenCounter, Tools, chosen_facts, demo_spec, parameters
from undertow.studies.spec import StudySpec
from undertow.studies.trials import search_facts
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap

KIND = "study-frozen"
STORIES, STEPS, BATCH, LR = 240, 300, 1_024, 2e-3


def frozen_search(spec: StudySpec, seed: int, trained: Prepared, folder: Path, tools: Tools) -> Prepared:
    """Open or make the search in a frozen-decoder SAE as wide as the trained one, at the same site."""
    place = folder / f"frozen-{seed}"
    if not (place / MANIFEST).is_file():
        _make(spec, seed, trained, place, tools)
    record = open_artifact(place, KIND).record
    if record["subject"] != tools.subject.digest:
        raise ArtifactError(f"{place} was made on other weights than {tools.subject.name} has now",
                            "run the study into a folder of its own with --out")
    facts = json.loads((place / "search.json").read_text(encoding="utf-8"))
    recipes = {} if facts["absent"] else {"L4": Recipe.load(place / "recipe.yaml")}
    return Prepared(load(place / "sae"), recipes, [], {}, facts)


def _make(spec: StudySpec, seed: int, trained: Prepared, place: Path, tools: Tools) -> None:
    assert trained.dictionary is not None
    subject, counter = tools.subject, TokenCounter()
    with counter.counting(subject):
        rows = [subject.encode(tools.world.story(derive_seed(seed, "frozen"), i).text) for i in range(STORIES)]
        x = activations(subject, trained.facts["site"], rows)
        made = frozen_dictionary(x, trained.dictionary.d_sae, derive_seed(seed, "frozen"))
        belongs = Provenance(spec.model, trained.facts["site"], trained.dictionary.provenance.context_size,
                             subject.bos_id is not None, {"subject_digest": subject.digest, "decoder": "random, never trained"})
        made = dataclasses.replace(made, provenance=belongs)
        with create_artifact(place, KIND, run_record(search_facts(spec, seed), seed, subject=subject.digest)) as work:
            save_folder(made, work / "sae")
            dictionary = load(work / "sae")
            concept, demo = tools.source.concept(seed), demo_spec(spec, seed)
            setting = Setting(subject, dictionary, concept, tools.world, demo, tools.progress, tools.source.acted_on)
            found = find(setting, trained.facts["site"])
            facts = {"absent": "" if found.trials else NOTHING_FOUND, "fvu": unexplained(dictionary, x), "parameters":
                     parameters(subject), "search_tokens": counter.forward, "search_gradient_tokens": counter.with_gradient,
                     **({"chosen": chosen_facts(found)} if found.trials else {})}
            write_json(work / "search.json", facts)
            if found.trials:
                floors(found.bench, found.trials[-1], name="frozen").save(work / "recipe.yaml")


def activations(subject: Subject, site: str, rows: Sequence[Sequence[int]]) -> Float[Tensor, "token d_in"]:
    """Activations of texts at a site, their first tokens left out, in float32 on the CPU."""
    return torch.cat([tap(subject, torch.tensor([list(ids)]), subject.site(site))[0, 1:].float().cpu() for ids in rows])


def frozen_dictionary(x: Float[Tensor, "token d_in"], d_sae: int, seed: int) -> LinearDictionary:
    """A TopK SAE with unit decoder rows drawn at random, whose encoder was trained on `x` for STEPS steps of Adam."""
    random = generator(seed, "frozen")
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], generator=random), dim=1)
    centre = x.mean(dim=0)
    encoder = decoder.T.clone().requires_grad_()
    bias = torch.zeros(d_sae, requires_grad=True)
    optimizer = torch.optim.Adam([encoder, bias], lr=LR)
    scale = float((x - centre).square().sum(dim=1).mean())
    k = min(SAE_K, d_sae)
    for _ in range(STEPS):
        batch = x[torch.randint(len(x), (BATCH,), generator=random)] - centre
        with torch.enable_grad():
            values, places = torch.relu(batch @ encoder + bias).topk(k, dim=1)
            made = torch.zeros(len(batch), d_sae).scatter(1, places, values) @ decoder
            loss = (made - batch).square().sum(dim=1).mean() / scale
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return LinearDictionary(encoder.detach(), bias.detach(), decoder, centre, TopK(k), Provenance.unknown())


def unexplained(dictionary: Dictionary, x: Float[Tensor, "token d_in"]) -> float:
    """Share of the variance of `x` that the reconstruction leaves, in [0, ∞); 1 for the mean alone."""
    with torch.inference_mode():
        rest = sum(float((dictionary.decode(dictionary.encode(part)) - part).square().sum()) for part in x.split(2_048))
    return rest / float((x - x.mean(dim=0)).square().sum())
