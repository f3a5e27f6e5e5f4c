"""The audit: what an arm does to the model's words, guard off, measured on given texts and counted in sampled ones.

On given texts (teacher-forced, the same tokens for both), at every token but the first of a row:

    KL        Σ_v p_base(v) · log(p_base(v) / p_arm(v)), nats: how far ordinary text is from being the same
    hazard    the probability that a form of the lexicon starts in the next token (`undertow.lexicon.hazard`), in [0, 1]

The hazard ratio is Σ hazard of the arm over Σ hazard of the base; the unit of inference is the document, not the token, so its
interval resamples whole documents. An arm that changes nothing gives KL 0 and ratio 1 exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.stats import beta
from torch import Tensor

from interventions.guard_automaton import GuardMasks
from interventions.scoring_ahead import NextLogits
from undertow.core.errors import EditError, NumericsError, SpecError
from undertow.core.spec import Spec
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.hazard import hazard_bound, hazard_exact
from undertow.lexicon.trie import TokenTrie
from undertow.lexicon.vocabulary import Vocabulary, read_vocabulary
from undertow.subjects.organisms.measuring import Progress
from undertow.subjects.organisms.statistics import Estimate, bootstrap
from undertow.subjects.padding import batches, pad
from undertow.subjects.sampling import Generated
from undertow.subjects.subject import Subject

MIN_CLUSTERS = 8
_FLOOR = 1e-12  # probability mass; both sums of a ratio have it added, so that 0/0 is 1
_BLOCK = 1 << 22  # logits that are held of one round of the hazard, over the branches of one token


@final
class AuditSpec(Spec):
    """How to audit.

    Attributes:
        tolerance: hazard that need not be followed, mean over the tokens of a row (of a long one: of a part of it); None takes
            the upper bound of one forward pass instead.
        relative: the same as a share of the mean hazard found there; the larger of the two holds.
        depth: tokens that a spelling may have, at most.
        batch_tokens: tokens in one forward pass, padding included.
    """

    tolerance: float | None = Field(default=1e-5, ge=0, lt=1)
    relative: float = Field(default=0.0, ge=0, lt=1)
    depth: int = Field(default=8, ge=1)
    batch_tokens: int = Field(default=1_024, ge=1)


@final
@dataclass(frozen=True, eq=False)
class Audit:
    """Figures of every audited token, in the order of the rows.

    Attributes:
        row: the row that the token stands in.
        kl: KL(base‖arm) of what follows it, nats.
        hazard: of the arm; a lower bound within `slack`, or an upper bound if `exact` is False.
        hazard_base: of the base.
        slack: mass that was not followed, mean over the tokens, of the arm or of the base, whichever is more.
        exact: whether forms were followed to their ends.
    """

    row: Int[np.ndarray, "token"]
    kl: Float[np.ndarray, "token"]
    hazard: Float[np.ndarray, "token"]
    hazard_base: Float[np.ndarray, "token"]
    slack: float
    exact: bool

    @property
    def change(self) -> float:
        """The largest absolute change of any figure; exactly 0 for a sham arm."""
        return float(max(self.kl.max(), np.abs(self.hazard - self.hazard_base).max()))

    def hazard_ratio(self, seed: int, clusters: Sequence[int] | None = None) -> Estimate:
        """Σ hazard / Σ base hazard with its 95 % interval, by a bootstrap over documents.

        Args:
            seed: of the bootstrap.
            clusters: for every row the document (or family) that it is a part of; each row is one if absent.

        Raises SpecError for fewer than MIN_CLUSTERS documents, of which no interval can be had.
        """
        n_rows = int(self.row.max()) + 1
        if clusters is not None and len(clusters) != n_rows:
            raise SpecError(f"{len(clusters)} cluster labels for {n_rows} rows: need one a row")
        names, place = np.unique(np.arange(n_rows) if clusters is None else np.asarray(clusters), return_inverse=True)
        arm, base = (np.bincount(place[self.row], values, len(names)) for values in (self.hazard, self.hazard_base))
        return ratio_of_sums(arm, base, seed)

    def figures(self, seed: int, clusters: Sequence[int] | None = None) -> dict[str, float]:
        """The figures under the names that summaries use."""
        ratio = self.hazard_ratio(seed, clusters)
        return {"kl_mean": float(self.kl.mean()), "kl_median": float(np.median(self.kl)),
                "kl_p99": float(np.quantile(self.kl, 0.99)), "hazard_mean": float(self.hazard.mean()),
                "hazard_p999": float(np.quantile(self.hazard, 0.999)), "hazard_max": float(self.hazard.max()),
                "hazard_ratio": ratio.value, "hazard_ratio_lower": ratio.low, "hazard_ratio_upper": ratio.high,
                "tokens": len(self.kl)}


def ratio_of_sums(arm: Float[np.ndarray, "cluster"], base: Float[np.ndarray, "cluster"], seed: int) -> Estimate:
    """Σ arm / Σ base over clusters with a 95 % percentile interval; 0/0 is 1, and x/0 very large.

    Raises SpecError for fewer than MIN_CLUSTERS clusters.
    """
    if len(arm) < MIN_CLUSTERS:
        raise SpecError(f"a ratio over {len(arm)} documents has no interval worth the name",
                        f"audit at least {MIN_CLUSTERS}, better hundreds")
    return bootstrap(lambda drawn: float((arm[drawn].sum() + _FLOOR) / (base[drawn].sum() + _FLOOR)), len(arm), seed,
                     "hazard_ratio")


def audit(subject: Subject, arm: AbstractContextManager[Any], rows: Sequence[Sequence[int]], trie: TokenTrie,
          spec: AuditSpec | None = None, base_hazard: Float[np.ndarray, "token"] | None = None,
          progress: Progress = lambda done, total: None) -> Audit:
    """Compare an arm with its base on `rows`.

    Args:
        subject: the base.
        arm: entered once; yields the operated Subject, or a value that has it as `subject` (`apply` does). It may be the base
            itself under a splice, or another model of the same vocabulary. Its counters also count the continuations that
            hazard asks for.
        rows: token ids, one document a row, BOS first as `Subject.encode` gives them.
        trie: spellings of the lexicon (`spellings`).
        spec: how to audit; the defaults if absent.
        base_hazard: `hazard_base` of an earlier audit of the same rows with the same spec; spares its computation.
        progress: called with (rows done, of how many).

    Raises:
        SpecError: a row of fewer than two tokens, no rows, or an arm that yields no subject.
        EditError: the arm alters the weights of the base in place, or (from the splice) fired nowhere in these rows.
        NumericsError: logits that are NaN.
    """
    if not rows or min(map(len, rows)) < 2:
        raise SpecError(f"an audit needs rows of two tokens or more, and got lengths {sorted(map(len, rows))[:3]}",
                        "pass token ids as subject.encode(text) gives them")
    base, first, how = unhooked(subject), rows[0], spec or AuditSpec()
    before = _logits(base, [first])
    with arm as yielded:
        operated = _subject_of(yielded)
        if not torch.equal(_logits(base, [first]), before):
            raise EditError("the arm alters the weights of the base in place, so that there is no base to compare with",
                            "let it yield a Subject with a model of its own")
        measured = _measure(base, operated, rows, _Way(trie, how, base_hazard), progress)
    kl, value, known, *slack = (np.concatenate([measured[i][part] for i in range(len(rows))]) for part in range(5))
    row = np.repeat(np.arange(len(rows)), [len(ids) - 1 for ids in rows])
    return Audit(row, kl, value, known, float(max(map(np.mean, slack))), how.tolerance is not None)


def logits_after(subject: Subject, rows: Sequence[Sequence[int]], batch_tokens: int = 1_024
                 ) -> list[Float[Tensor, "token vocab"]]:
    """Logits after every token of every row but its first, in the order of the rows."""
    found: dict[int, Tensor] = {}
    for batch in batches(rows, batch_tokens):
        logits = _logits(subject, [rows[i] for i in batch])
        found |= {i: logits[place, 1:len(rows[i])].clone() for place, i in enumerate(batch)}
    return [found[i] for i in range(len(rows))]


def kl_on(base: Sequence[Float[Tensor, "_ vocab"]], operated: Subject, rows: Sequence[Sequence[int]],
          batch_tokens: int = 1_024) -> Float[np.ndarray, "token"]:
    """`kl_after(base, logits_after(operated, rows))`, of whose logits those of one batch are held."""
    found: dict[int, np.ndarray] = {}
    for batch in batches(rows, batch_tokens):
        logits = _logits(operated, [rows[i] for i in batch])
        found |= {i: _kl(base[i], logits[place, 1:len(rows[i])]) for place, i in enumerate(batch)}
    return np.concatenate([found[i] for i in range(len(rows))])


def kl_after(base: Sequence[Float[Tensor, "_ vocab"]], arm: Sequence[Float[Tensor, "_ vocab"]]) -> Float[np.ndarray, "token"]:
    """KL(base‖arm) in nats after every token, from what `logits_after` gave for both on the same rows.

    Raises NumericsError for logits that are not finite.
    """
    return np.concatenate([_kl(*pair) for pair in zip(base, arm, strict=True)])


def spellings(subject: Subject, lexicon: Lexicon, canonical: bool = False) -> TokenTrie:
    """The trie of a lexicon in a subject's tokens: of all tokenisations, or of those that the tokenizer itself writes."""
    def encode(text: str) -> list[int]:
        return subject.tokenizer.encode(text, add_special_tokens=False)

    return TokenTrie(read_vocabulary(subject.tokenizer), lexicon, encode if canonical else None)


def unhooked(subject: Subject) -> Subject:
    """The same weights (shared, not copied) in modules of their own, which later hooks on `subject` do not reach."""
    model = subject.hf_model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return replace(subject, hf_model=copy.deepcopy(model, shared))


def _subject_of(yielded: Any) -> Subject:
    found = yielded if isinstance(yielded, Subject) else getattr(yielded, "subject", None)
    if not isinstance(found, Subject):
        raise SpecError(f"the arm yields {type(yielded).__name__}, in which no operated subject is found",
                        "it has to yield a Subject, or a value with one as .subject")
    return found


class _Way(NamedTuple):
    trie: TokenTrie
    spec: AuditSpec
    base_hazard: np.ndarray | None


class _Row(NamedTuple):
    """Figures of one row, its first token left out."""

    kl: Float[np.ndarray, "token"]
    hazard: Float[np.ndarray, "token"]
    hazard_base: Float[np.ndarray, "token"]
    slack: Float[np.ndarray, "token"]
    slack_base: Float[np.ndarray, "token"]


def _measure(base: Subject, operated: Subject, rows: Sequence[Sequence[int]], way: _Way, progress: Progress) -> dict[int, _Row]:
    starts = np.cumsum([0, *(len(ids) - 1 for ids in rows)])
    if way.base_hazard is not None and len(way.base_hazard) != starts[-1]:
        raise SpecError(f"base_hazard has {len(way.base_hazard)} figures and the rows have {starts[-1]} audited tokens",
                        "pass hazard_base of an audit of the same rows")
    ahead = [NextLogits(model, rows[0], way.spec.batch_tokens) for model in (base, operated)]
    measured: dict[int, _Row] = {}
    for batch in batches(rows, way.spec.batch_tokens):
        both = [_logits(model, [rows[i] for i in batch]) for model in (base, operated)]
        if both[0].shape != both[1].shape:
            raise SpecError(f"the arm has {both[1].shape[-1]} tokens in its vocabulary and the base {both[0].shape[-1]}")
        for place, i in enumerate(batch):
            mine = [logits[place, 1:len(rows[i])] for logits in both]
            value, slack = _hazard(mine[1], rows[i], ahead[1], way)
            if way.base_hazard is None:
                known, slack_base = _hazard(mine[0], rows[i], ahead[0], way)
            else:
                known, slack_base = way.base_hazard[starts[i]:starts[i + 1]], np.zeros_like(slack)
            measured[i] = _Row(_kl(*mine), value, known, slack, slack_base)
        progress(len(measured), len(rows))
    return measured


def _logits(subject: Subject, rows: Sequence[Sequence[int]]) -> Float[Tensor, "row pos vocab"]:
    """Logits after every token; rows are padded on the right, where a causal model does not look."""
    tokens, attend = pad(rows, subject, "right")
    with torch.inference_mode():
        return subject.hf_model(input_ids=tokens, attention_mask=attend, use_cache=False).logits.float()


def _kl(base: Float[Tensor, "token vocab"], arm: Float[Tensor, "token vocab"]) -> Float[np.ndarray, "token"]:
    """KL(base‖arm), nats."""
    logs = [logits.log_softmax(dim=-1) for logits in (base, arm.to(base.device))]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1, dtype=torch.float64)
    if bool(kl.isnan().any()):
        raise NumericsError("the logits of the base or the arm are not finite, so KL cannot be computed",
                            "a recipe of a smaller gain, or a model in float32, may do")
    return kl.clamp(min=0).cpu().numpy()


def _hazard(logits: Float[Tensor, "token vocab"], ids: Sequence[int], ahead: NextLogits,
            way: _Way) -> tuple[Float[np.ndarray, "token"], Float[np.ndarray, "token"]]:
    """Hazard and slack after every token of a row but the first."""
    contexts = way.trie.contexts(ids)[1:]
    if way.spec.tolerance is None:
        bound = hazard_bound(logits, contexts, way.trie).double().cpu().numpy()
        return bound, np.zeros_like(bound)
    step, values, slacks = max(1, _BLOCK // logits.shape[-1]), [], []
    for start in range(0, len(contexts), step):
        part = slice(start, start + step)
        found = hazard_exact(logits[part], contexts[part], way.trie, ahead.after(ids, start + 2), way.spec.tolerance,
                             way.spec.depth, way.spec.relative)
        values.append(found.value)
        slacks.append(found.slack)
    return torch.cat(values).double().numpy(), torch.cat(slacks).double().numpy()


@final
class WordCount(NamedTuple):
    """Words said in sampled documents, guard off.

    Attributes:
        n: documents.
        word_docs: those in which a T0 form stands, wholly or partly in the sampled part.
        guard_hits: sampled tokens that the strict guard would have refused.
        rate_upper: one-sided 95 % upper bound of the share of documents with a form (Clopper and Pearson), in (0, 1].
    """

    n: int
    word_docs: int
    guard_hits: int
    rate_upper: float


def count_words(documents: Sequence[Generated], vocabulary: Vocabulary, lexicon: Lexicon,
                masks: GuardMasks | None = None) -> WordCount:
    """Count T0 forms in what was sampled; forms within the prompts do not count.

    Args:
        documents: sampled with the guard off.
        vocabulary: of the subject's tokenizer.
        lexicon: the forms.
        masks: of the strict guard, where they are at hand.

    Raises SpecError without documents.
    """
    if not documents:
        raise SpecError("no documents were sampled, so no words can be counted")
    strict = GuardMasks(vocabulary, lexicon) if masks is None else masks
    said = sum(_says(document, vocabulary, lexicon) for document in documents)
    hits = sum(_refusals(document, strict) for document in documents)
    n = len(documents)
    return WordCount(n, said, hits, 1.0 if said == n else float(beta.ppf(0.95, said + 1, n - said)))


def _says(document: Generated, vocabulary: Vocabulary, lexicon: Lexicon) -> bool:
    prompt = len(vocabulary.text(document.prompt_ids))
    text = vocabulary.text([*document.prompt_ids, *document.token_ids])
    return any(match.tier == "T0" and match.end > prompt for match in lexicon.find(text))


def _refusals(document: Generated, masks: GuardMasks) -> int:
    ids, hits = list(document.prompt_ids), 0
    place, _ = masks.read(ids)
    for token in document.token_ids:
        ids.append(token)
        after = masks.after(place, token)
        if masks.permits(after):
            place = after
        else:
            hits += 1
            place, _ = masks.read(ids)  # goes on from where the form is forgiven
    return hits
