"""Operators, recipes, their application to a subject, the guard, the audit and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from interventions.applying import FeatureSurgery, Operated, apply, apply_direction, trigger_gate
    from interventions.audit import Audit
    from interventions.guard import LexiconProcessor
    from interventions.operators import Ablate, Add, Cap, Clamp, Floor, Operator, Strengthen, operate
    from interventions.recipe import FeatureEdit, Recipe, Trigger, check
    from interventions.verdict import Evidence, Verdict

__all__ = ["Ablate", "Add", "Audit", "Cap", "Clamp", "Evidence", "FeatureEdit", "FeatureSurgery", "Floor", "LexiconProcessor",
           "Operated", "Operator", "Recipe", "Strengthen", "Trigger", "Verdict", "apply", "apply_direction", "check",
           "operate", "trigger_gate"]
__getattr__ = lazy_names(__name__, {
    "FeatureSurgery": "applying", "Operated": "applying", "apply": "applying", "apply_direction": "applying",
    "trigger_gate": "applying",
    "Audit": "audit", "LexiconProcessor": "guard",
    "Ablate": "operators", "Add": "operators", "Cap": "operators", "Clamp": "operators", "Floor": "operators",
    "Operator": "operators", "Strengthen": "operators", "operate": "operators",
    "FeatureEdit": "recipe", "Recipe": "recipe", "Trigger": "recipe", "check": "recipe",
    "Evidence": "verdict", "Verdict": "verdict",
})
