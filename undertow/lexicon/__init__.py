"""Word forms, the reference matcher, the automaton over tokens, and the probability that a model says a form (hazard)."""

from undertow.lexicon.forms import Lexicon, packaged_names
from undertow.lexicon.matching import Match

__all__ = ["Lexicon", "Match", "packaged_names"]
