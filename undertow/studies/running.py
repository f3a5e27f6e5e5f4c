"""Running the demo from a subject and an SAE to a folder: summary, report, recipe."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from features.concepts import Concept
from features.lexical import LexicalGate
from interventions.tune import Trial
from interventions.verdict import Evidence, Verdict, verdict
from undertow.core.record import run_record
from undertow.core.storage import create_artifact, write_json, write_text
from undertow.studies.arms import evidence, examples, run_arms
from undertow.studies.demo import MIN_REFERENCE, DemoSpec, Found, Outcome, Setting, find, run_gates
from undertow.studies.report import Dose, report_html
from undertow.studies.scenes import COSTLY_ACT
from undertow.subjects.subject import Subject

KIND = "demo"
NOTHING_FOUND = ("no feature of this SAE, held up before the decision, raises D while ordinary text stays within the limits, "
                 "so nothing was operated")


def gates_of(subject: Subject, concept: Concept, spec: DemoSpec, site: str) -> tuple[dict[str, Any], Outcome | None]:
    """The gates, which need no SAE; and the outcome, if they end the study: a subject that cannot answer is not trained on."""
    lexical, competence = run_gates(subject, concept, spec, site)
    figures = {"competence": competence, "lexical_gates": {name: _gate(gate) for name, gate in lexical.items()},
               "forced": spec.force and not all(gate.passed for gate in lexical.values())}
    if competence["met"]:
        return figures, None
    judged = verdict(Evidence(arms=frozenset(), competent=False))
    reason = (f"the subject fails the competence gate: D rises by {competence['D_change']:.3g} nats "
              f"[{competence['low']:.3g}, {competence['high']:.3g}], p = {competence['p']:.2g}, from the negative to the "
              f"positive situation of a pair and P({COSTLY_ACT}) by {competence['act_prob_change']:.3g}; p < 0.01 and "
              f"a rise of {MIN_REFERENCE:g} are asked for; no arm was run")
    return figures, Outcome(figures, judged._replace(reason=reason), None, [], [], [])


def _gate(gate: LexicalGate) -> dict[str, Any]:
    return {"accuracy": gate.accuracy, "p": gate.p, "passed": gate.passed}


def run_demo(setting: Setting, site: str, gates: dict[str, Any]) -> Outcome:
    """Find, operate, measure, judge. `gates` is what `gates_of` returned."""
    found = find(setting, site)
    if not found.trials:
        return Outcome(gates, Verdict("no-effect", NOTHING_FOUND, 3), None, [], [], [])
    arms = run_arms(setting, found.bench, found.trials[-1])
    judged, figures = evidence(setting, arms, gates["competence"])
    judged = replace(judged, lexical_pairs=bool(gates["forced"]))
    return Outcome(gates | figures, verdict(judged), arms.recipes["L4"], examples(arms, setting.spec.seed),
                   _features(found), found.trials)


def _features(found: Found) -> list[dict[str, Any]]:
    """What was measured of every chosen feature. Features have no names: the id is the SAE's digest and a number."""
    bench, chosen, attribution = found.bench, found.trials[-1], found.attribution
    rank = {int(latent): place for place, latent in enumerate(np.argsort(-attribution, kind="stable"), start=1)}
    return [{"id": f"{bench.place['sae'][:4]}-{latent}", "latent": latent, "attribution": float(attribution[latent]),
             "rank": rank[latent], "of": bench.dictionary.d_sae, "rate": float(bench.known.rate[latent]),
             "typical_activation": float(bench.known.high[latent]), "floor": height}
            for latent, height in zip(chosen.latents, chosen.heights(bench.known), strict=True)]


def _figures(trial: Trial) -> dict[str, Any]:
    """A trial as JSON values; what was not measured is absent."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in trial._asdict().items()
            if not (isinstance(value, float) and math.isnan(value))}


def curve(trials: list[Trial]) -> list[Dose]:
    """The chosen set and gate, which are the last, at every dose that was tried."""
    def what(trial: Trial) -> Trial:
        return trial._replace(dose=0, kl_mean=0, kl_p99=0, d=0, acts=0, word=0)

    doses = [trial for trial in trials if what(trial) == what(trials[-1])]
    return [Dose(trial.dose, trial.d, kl_mean=trial.kl_mean) for trial in sorted(doses, key=lambda trial: trial.dose)]


def summary_of(outcome: Outcome, spec: DemoSpec, subject: Subject, wall_s: float, sae: dict[str, Any]) -> dict[str, Any]:
    """What summary.json holds."""
    record = run_record(spec.model_dump(mode="json"), spec.seed)
    return {"title": f"Feature surgery on {subject.name}", "verdict": outcome.verdict.verdict,
            "verdict_reason": outcome.verdict.reason, "verdict_row": outcome.verdict.row, **outcome.summary,
            "features": outcome.features, "model": subject.name, "model_digest": subject.digest, "concept": spec.concept,
            "seed": spec.seed, "sae": sae, "wall_s": wall_s, "versions": record["versions"], "git": record["git"]}


def write(outcome: Outcome, summary: dict[str, Any], out: Path) -> None:
    """Write summary.json, report.html, stories.json, trials.json and recipe.yaml into a new artifact."""
    record = {name: summary[name] for name in ("model", "concept", "seed", "verdict")}
    with create_artifact(out, KIND, record) as work:
        write_json(work / "summary.json", summary)
        write_json(work / "stories.json", [{"prompt": example.prompt, "seed": example.seed, "texts": dict(example.texts)}
                                           for example in outcome.examples])
        write_json(work / "trials.json", [_figures(trial) for trial in outcome.trials])
        write_text(work / "report.html", report_html(summary, outcome.examples, outcome.features, curve(outcome.trials)))
        if outcome.recipe is not None:
            outcome.recipe.save(work / "recipe.yaml")
