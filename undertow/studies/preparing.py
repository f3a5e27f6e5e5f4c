"""What a study makes once for each seed, before the arms that need it: an SAE, the search in it, recipes and directions.

It is an artifact in the study's folder. A run that goes on later, or a table that is made again, uses the same one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from features.carried import lexical_direction
from features.deciding import read_last
from features.naming import word_tokens
from interventions.recipe import Recipe
from interventions.tune import floors
from sae.dictionary import Dictionary
from sae.formats import check_fits, load
from undertow.core.errors import ArtifactError
from undertow.core.record import run_record
from undertow.core.storage import MANIFEST, cache_dir, create_artifact, open_artifact, write_json
from undertow.studies.demo import LANGUAGES, DemoSpec, Found, Progress, Setting, find, lexical_recipe, random_sets
from undertow.studies.sources import Source
from undertow.studies.spec import StudySpec
from undertow.studies.trials import search_facts, search_size
from undertow.studies.variants import added, renamed
from undertow.subjects.keeper.world import World
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.unembed import final_norm_and_unembed

KIND = "study-search"
SEARCH, RECIPES, DIRECTIONS = "search.json", "recipes.json", "directions.safetensors"
SAE_STORIES, SAE_TOKENS, SAE_WIDTH, SAE_K, SAE_EPOCHS, SAE_BATCH = 900, 200_000, 2_048, 16, 4.0, 1_024
WORD_TEXTS, WORD_AXES = 6, 3
NOTHING_FOUND = "no feature of this SAE raises D before the decision within the limits on ordinary text, so there is no surgery"
NOT_COMPETENT = "the subject fails the competence gate: D does not answer to what the concept is about"
Stop = Callable[[], bool]


@final
class Tools(NamedTuple):
    """What preparing needs besides the spec.

    Attributes:
        subject: the model.
        source: where the pairs and the gates come from.
        world: the source of ordinary text.
        progress: called with (phase, done, total).
        should_stop: whether a stop was asked for.
    """

    subject: Subject
    source: Source
    world: World
    progress: Progress
    should_stop: Stop


@final
@dataclass(frozen=True, eq=False)
class Prepared:
    """What a search has come to.

    Attributes:
        dictionary: the SAE; None if nothing was searched.
        recipes: "L4" and "lexical"; empty without a surgery.
        random: the matched random recipes.
        directions: "means" (of the contrast, at the decision) and "word.N" (axes of the word after block N, orthonormal rows).
        facts: gates, chosen features, trials of the search, cost; what search.json holds.
    """

    dictionary: Dictionary | None
    recipes: dict[str, Recipe]
    random: list[Recipe]
    directions: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def absent(self) -> str:
        """Why there is no surgery; "" if there is one."""
        return str(self.facts["absent"])


def prepared(spec: StudySpec, seed: int, folder: Path, tools: Tools) -> Prepared:
    """Open what was prepared for one seed, or prepare it.

    Raises:
        TextError: the pairs are lexical, and the study does not force.
        ArtifactError: what was prepared belongs to another subject or was changed.
        sae.run.Interrupted: a stop was asked for while an SAE was trained.
    """
    place = folder / f"search-{seed}"
    if (place / MANIFEST).is_file():
        return _opened(spec, place, tools.subject)
    counter = TokenCounter()
    with counter.counting(tools.subject):
        made, tensors, recipes = _made(spec, seed, folder, (tools, counter))
    with create_artifact(place, KIND, run_record(search_facts(spec, seed), seed, subject=tools.subject.digest)) as work:
        write_json(work / SEARCH, made)
        write_json(work / RECIPES, {name: [recipe.model_dump(mode="json") for recipe in group]
                                    for name, group in recipes.items()})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, work / DIRECTIONS)
    return _opened(spec, place, tools.subject)


def _opened(spec: StudySpec, place: Path, subject: Subject) -> Prepared:
    record = open_artifact(place, KIND).record
    if record["subject"] != subject.digest:
        raise ArtifactError(f"{place} was made on the weights {record['subject']}, and {subject.name} now has {subject.digest}",
                            "run the study into a folder of its own with --out")
    facts = json.loads((place / SEARCH).read_text(encoding="utf-8"))
    groups = {name: [Recipe.checked(values, str(place / RECIPES)) for values in group]
              for name, group in json.loads((place / RECIPES).read_text(encoding="utf-8")).items()}
    random = groups.pop("random", [])
    source = facts.get("sae", "")
    dictionary = None if not source else load(source if spec.sae else place.parent / source)
    return Prepared(dictionary, {name: group[0] for name, group in groups.items()}, random,
                    {name: tensor.clone() for name, tensor in load_file(place / DIRECTIONS).items()}, facts)


_Made = tuple[dict[str, Any], dict[str, Tensor], dict[str, list[Recipe]]]


def _made(spec: StudySpec, seed: int, folder: Path, with_: tuple[Tools, TokenCounter]) -> _Made:
    """Facts, directions and recipes."""
    tools, counter = with_
    subject, demo = tools.subject, demo_spec(spec, seed)
    site = site_of(spec, subject)
    gates, competence = tools.source.gates(subject, demo, site, tools.progress)
    facts: dict[str, Any] = {
        "site": site, "competence": competence, "absent": "", "parameters": parameters(subject),
        "lexical_gates": {name: gate._asdict() for name, gate in gates.items()},
        "forced": spec.force and not all(gate.passed for gate in gates.values())}
    if not competence["met"]:
        return facts | {"absent": competence.get("why", NOT_COMPETENT)}, {}, {}
    dictionary, source, training = _sae(spec, subject, site, (folder, seed), tools)
    counter.reset()
    setting = Setting(subject, dictionary, tools.source.concept(seed), tools.world, demo, tools.progress, tools.source.acted_on)
    found = find(setting, site)
    facts |= {"sae": source, "d_sae": dictionary.d_sae, "training": training, "search_tokens": counter.forward,
              "search_gradient_tokens": counter.with_gradient}
    if not found.trials:
        return facts | {"absent": NOTHING_FOUND}, {}, {}
    recipes = _recipes(setting, found, spec.size.sets)
    facts |= {"chosen": chosen_facts(found), "tried": [json.loads(json.dumps(trial._asdict())) for trial in found.trials]}
    return facts, _directions(setting, found), recipes


def demo_spec(spec: StudySpec, seed: int) -> DemoSpec:
    """The settings of a search."""
    return DemoSpec.checked({"concept": spec.concept, "seed": seed, "force": spec.force, **search_size(spec)}, "study")


def _recipes(setting: Setting, found: Found, sets: int) -> dict[str, list[Recipe]]:
    bench, chosen = found.bench, found.trials[-1]
    l4 = floors(bench, chosen, name="L4")
    size = float(added(l4, setting.dictionary).norm())
    drawn = random_sets(chosen, bench.known, sets, setting.spec.seed)
    return {"L4": [l4], "lexical": [renamed(lexical_recipe(setting, bench, size), "lexical")],
            "random": [floors(bench, chosen._replace(latents=latents), name=f"random-{i}") for i, latents in enumerate(drawn)]}


def _directions(setting: Setting, found: Found) -> dict[str, Tensor]:
    subject, site = setting.subject, found.bench.site
    pairs = setting.concept.pairs("discovery", setting.spec.discovery)
    read = read_last(subject, site, [subject.encode(side.prompt) for pair in pairs for side in (pair.positive, pair.negative)])
    made = {"means": (read[0::2] - read[1::2]).mean(dim=0)}
    tokens = word_tokens(subject, setting.concept.lexicon.only(languages=LANGUAGES))
    for layer in range(site.layer + 1, subject.n_layers):
        raises = lexical_direction(subject, Site(layer, "resid_post"), found.bench.texts[:WORD_TEXTS], tokens).float().cpu()
        made[f"word.{layer}"] = word_axes(subject, raises, tokens)
    return made


def word_axes(subject: Subject, raises: Float[Tensor, "d_model"], tokens: Tensor) -> Float[Tensor, "axis d_model"]:
    """Orthonormal axes of the word: the direction that raises it, and the WORD_AXES along which the unembedding rows of its
    tokens, as the final norm scales them, are longest."""
    view = final_norm_and_unembed(subject)
    rows = ((view.W_U - view.W_U.mean(dim=0)) * view.gamma)[tokens.to(view.W_U.device)].float().cpu()
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    stacked = torch.cat([raises[None], axes[:WORD_AXES]])
    return torch.linalg.qr(stacked.T).Q.T.contiguous()


def chosen_facts(found: Found) -> dict[str, Any]:
    """What is worth knowing of the set that a search chose."""
    chosen, known = found.trials[-1], found.bench.known
    return {"latents": list(chosen.latents), "trigger": list(chosen.trigger),
            "at_least": chosen.at_least, "within": chosen.within, "dose": chosen.dose, "kl_mean": chosen.kl_mean,
            "kl_p99": chosen.kl_p99, "attribution": [float(found.attribution[latent]) for latent in chosen.latents],
            "floors": chosen.heights(known), "typical": [float(known.high[latent]) for latent in chosen.latents],
            "rate": [float(known.rate[latent]) for latent in chosen.latents]}


def site_of(spec: StudySpec, subject: Subject) -> str:
    """Where to operate: where the given SAE reads, else after the block below the middle."""
    if spec.sae is None:
        return Site(max(0, (subject.n_layers - 1) // 2), "resid_post").name
    dictionary = load(spec.sae)
    name = dictionary.provenance.hook_name
    if not name:
        raise ArtifactError(f"{spec.sae} does not say at which site it reads", "train one with undertow sae train")
    check_fits(dictionary, subject.name, subject.d_model, name, subject.digest, same_model=False)
    return subject.site(name).name


def _sae(spec: StudySpec, subject: Subject, site: str, where: tuple[Path, int], tools: Tools
         ) -> tuple[Dictionary, str, dict[str, Any]]:
    """The SAE, where it lies (from the study's folder, if it was trained there), and what its training cost."""
    if spec.sae is not None:
        return load(spec.sae), spec.sae, {}
    folder, seed = where
    name = f"sae-{seed}"
    if not (folder / name / MANIFEST).is_file():
        _train(spec.model, subject, site, (folder / name, seed), tools)
    dictionary = load(folder / name)
    steps = int(SAE_TOKENS * SAE_EPOCHS) // SAE_BATCH
    per_row = 2 * dictionary.d_in * dictionary.d_sae + 10 * SAE_K * dictionary.d_in
    return dictionary, name, {"harvest_tokens": SAE_TOKENS, "steps": steps, "flops": steps * SAE_BATCH * per_row}


def _train(model: str, subject: Subject, site: str, where: tuple[Path, int], tools: Tools) -> None:
    """Train an SAE on the Keeper's world; an interrupted training goes on."""
    from sae.plan import open_inputs
    from sae.run import LOG, SPEC_FILE, Watch, claim, partial_folder, run
    from sae.sinks import JsonlSink
    from sae.spec import RunSpec

    out, seed = where
    wanted = RunSpec.checked({
        "model": model, "site": site, "tokens": SAE_TOKENS, "eval_tokens": 8_192, "ce_tokens": 2_048, "seed": seed,
        "text": {"source": f"keeper:{SAE_STORIES}", "context": 384},
        "learn": {"width": SAE_WIDTH, "k": SAE_K, "epochs": SAE_EPOCHS, "batch_size": SAE_BATCH}}, "study")
    inputs = open_inputs(wanted, subject)
    if not (partial_folder(out) / SPEC_FILE).exists():
        claim(out, wanted)
    sink = JsonlSink(partial_folder(out) / LOG)
    try:
        run(wanted, inputs, out, cache_dir(), Watch(tools.progress, sink, tools.should_stop))
    finally:
        sink.close()


def parameters(subject: Subject) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in subject.hf_model.parameters())


@final
@dataclass
class TokenCounter:
    """Tokens that go through a model, from which the cost of a search is reckoned.

    Attributes:
        forward: without a gradient.
        with_gradient: with one, which costs three times as much.
    """

    forward: int = 0
    with_gradient: int = 0
    _hooks: list[Any] = field(default_factory=list)

    def reset(self) -> None:
        """Count from 0 again."""
        self.forward = self.with_gradient = 0

    @contextlib.contextmanager
    def counting(self, subject: Subject) -> Iterator[TokenCounter]:
        """Count while the block runs."""
        def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor):
                if torch.is_grad_enabled():
                    self.with_gradient += ids.numel()
                else:
                    self.forward += ids.numel()

        hook = subject.hf_model.register_forward_pre_hook(on_call, with_kwargs=True)
        try:
            yield self
        finally:
            hook.remove()
