"""Every figure of a store against brute force on dense codes; texts, places and size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashboards.building import Source, build_store
from dashboards.geometry import logit_block, nearest
from dashboards.layout import BYTES_PER_FEATURE, HEAT, LOGIT_BINS, N_INTERVALS, PER_INTERVAL
from dashboards.moments import look_again
from dashboards.store import build_command, open_feature_store, slug
from dashboards.strings import Strings, write_strings
from features.codes import dictionary_digest
from features.examples import N_TOP, collect_examples
from features.logit_lens import logit_effect, promoted, suppressed
from features.ranking import AFTER, BEFORE
from tests.dashboards.conftest import D_SAE, DEAD, SCRIPT, Made
from undertow.core.errors import ArtifactError, DictionaryError
from undertow.core.storage import MANIFEST
from undertow.subjects.unembed import UnembedView


@pytest.fixture(scope="module")
def dense(made: Made) -> np.ndarray:
    """Codes at every (row, position); 0 where nothing is measured."""
    store = made.activations
    codes = torch.zeros(*store.tokens.shape, D_SAE)
    codes[store.measured] = made.dictionary.encode(torch.cat([block for _, block in store.chunks(512)]))
    return codes.numpy()


def test_columns_against_brute_force(made: Made, dense: np.ndarray) -> None:
    columns, n = made.store.columns, int(made.activations.measured.sum())
    assert made.store.n_tokens == n > 500
    assert columns["count"][DEAD] == 0
    for latent in range(D_SAE):
        values = dense[:, :, latent][dense[:, :, latent] > 0].astype(np.float64)
        assert columns["count"][latent] == len(values)
        assert made.store.density[latent] == len(values) / n
        if len(values) < 2:
            continue
        assert columns["maximum"][latent] == pytest.approx(values.max(), rel=1e-5)
        assert columns["mean"][latent] == pytest.approx(values.mean(), rel=1e-5)
        assert columns["variance"][latent] == pytest.approx(values.var(), rel=1e-4, abs=1e-9)
        assert columns["skewness"][latent] == pytest.approx(scipy.stats.skew(values), rel=1e-3, abs=1e-3)
        assert columns["kurtosis"][latent] == pytest.approx(scipy.stats.kurtosis(values), rel=1e-3, abs=1e-3)


def test_the_dead_feature_has_zeros_and_no_examples(made: Made) -> None:
    detail = made.store.details[DEAD]
    for name in ("count", "maximum", "mean", "variance", "skewness", "kurtosis"):
        assert made.store.columns[name][DEAD] == 0
    assert made.store.columns["peak_token"][DEAD] == -1
    assert all((detail[kind]["row"] == -1).all() for kind in ("top", "uniform", "strata"))
    assert detail["histogram"].sum() == detail["intervals"].sum() == 0


def test_intervals_and_samples_against_brute_force(made: Made, dense: np.ndarray) -> None:
    for latent in range(D_SAE):
        detail, values = made.store.details[latent], dense[:, :, latent]
        assert detail["histogram"].sum() == detail["intervals"].sum() == (values > 0).sum()
        if not (values > 0).any():
            continue
        share = np.minimum((values[values > 0].astype(np.float64) * N_INTERVALS / values.max()).astype(int), N_INTERVALS - 1)
        off = detail["intervals"].astype(int) - np.bincount(share, minlength=N_INTERVALS)
        assert np.abs(off).max() <= 1  # last bits at an edge
        for number, group in enumerate(detail["strata"]):
            found = group[group["row"] >= 0]
            assert len(found) == min(PER_INTERVAL, detail["intervals"][number])
            low, high = number / N_INTERVALS * values.max(), (number + 1) / N_INTERVALS * values.max()
            assert ((found["value"] >= low * (1 - 1e-5)) & (found["value"] <= high * (1 + 1e-5))).all()
            assert len({(int(e["row"]), int(e["position"])) for e in found}) == len(found)


def test_top_examples_heat_and_peak_against_brute_force(made: Made, dense: np.ndarray) -> None:
    for latent in range(D_SAE - 1):
        values = dense[:, :, latent]
        best = np.sort(values.max(axis=1))[::-1]
        expected = best[best > 0][:N_TOP]
        top = made.store.details[latent]["top"]
        np.testing.assert_allclose(top["value"][:len(expected)], expected, rtol=1e-5)
        detail = made.store.details[latent]
        examples = [*top[:len(expected)], *detail["strata"].ravel(), *detail["uniform"]]
        for example in [found for found in examples if found["row"] >= 0]:
            row, position = int(example["row"]), int(example["position"])
            assert example["value"] == pytest.approx(values[row, position], rel=1e-5)
            assert position > 0, "position 0 is never measured"
            around = np.zeros(BEFORE + 1 + AFTER)
            low, high = max(0, position - BEFORE), min(values.shape[1], position + AFTER + 1)
            around[low - position + BEFORE:high - position + BEFORE] = values[row, low:high]
            error = example["heat"] / HEAT * values.max() - around
            assert (error > -1e-4 * values.max()).all() and (error < values.max() * (1 / HEAT + 1e-4)).all()
            assert ((example["heat"] > 0) == (around > 0)).all()
        peak = made.store.columns["peak_token"][latent]
        assert peak == made.activations.tokens[int(top[0]["row"]), int(top[0]["position"])]


def test_logits_against_one_at_a_time(made: Made) -> None:
    store = made.store
    for latent in (0, 7, DEAD):
        effect = logit_effect(made.dictionary.W_dec[latent], made.lens.unembed)
        for name, expected in (("promoted", promoted(effect, 10)), ("suppressed", suppressed(effect, 10))):
            pairs = store.details[latent][name]
            assert pairs["id"].tolist() == [item.token_id for item in expected]
            np.testing.assert_allclose(pairs["value"], [item.effect for item in expected], rtol=1e-4, atol=1e-6)
        counts, edges = np.histogram(effect.numpy(), LOGIT_BINS)
        assert np.abs(store.details[latent]["logits"].astype(int) - counts).max() <= 1  # last bits at an edge
        assert store.details[latent]["logits"].sum() == len(effect)
        assert store.details[latent]["logit_low"] == pytest.approx(edges[0], rel=1e-4)
        assert store.columns["promoted_token"][latent] == promoted(effect, 1)[0].token_id


def test_equal_logits_come_lower_token_first() -> None:
    unembed = UnembedView(torch.ones(2), False, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-2.0, -1.0]]))
    found = logit_block(torch.tensor([[1.0, 0.0]]), unembed)
    assert found.promoted["id"][0].tolist() == [1, 2, 0, 3] + [-1] * 6
    assert found.promoted["value"][0, :4].tolist() == [1.0, 1.0, 0.0, -2.0]
    assert found.suppressed["id"][0, :4].tolist() == [3, 0, 1, 2]
    assert found.histogram[0].sum() == 4


def test_neighbours_against_all_cosines(made: Made) -> None:
    unit = torch.nn.functional.normalize(made.dictionary.W_dec)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    for latent in range(D_SAE):
        pairs = made.store.details[latent]["neighbours"]
        values, ids = cosines[latent].topk(len(pairs))
        np.testing.assert_allclose(pairs["value"], values, atol=1e-5)
        assert pairs["id"].tolist() == ids.tolist()
        assert latent not in pairs["id"]
    np.testing.assert_allclose(made.store.columns["norm"], 1.0, rtol=1e-5)


def test_neighbours_by_hand() -> None:
    found = nearest(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 0.0]]), slice(0, 4))
    assert found.norms.tolist() == [2.0, 3.0, 1.0, 0.0]
    assert found.pairs["id"][0, :4].tolist() == [2, 1, 3, -1]
    assert found.pairs["value"][0, :3].tolist() == [1.0, 0.0, 0.0]


def test_second_look_does_not_depend_on_chunks(made: Made) -> None:
    table = collect_examples(made.dictionary, made.activations, 3)
    one, other = (look_again(made.dictionary, made.activations, table, chunk=chunk) for chunk in (37, 4096))
    np.testing.assert_array_equal(one.intervals, other.intervals)
    np.testing.assert_array_equal(one.strata.rows, other.strata.rows)
    np.testing.assert_allclose(one.kurtosis, other.kurtosis, rtol=1e-4, atol=1e-4)
    moved = look_again(made.dictionary, made.activations, collect_examples(made.dictionary, made.activations, 4))
    assert (moved.strata.rows != one.strata.rows).any(), "another seed draws another sample"


def test_texts_are_whole_characters(made: Made) -> None:
    everything = ""
    for row in range(len(made.store.tokens)):
        texts, ids = made.store.row_texts(row), made.store.tokens[row]
        decoded = str(made.subject.tokenizer.decode(ids[ids >= 0].tolist())).replace("\n", "↵")
        assert "".join(texts) == decoded
        everything += decoded
    assert SCRIPT in everything and "🙂" in everything
    assert "🙂" not in made.store.vocabulary.between(0, len(made.store.vocabulary)), "it is spelt by several tokens"
    assert any("🙂" in made.store.row_texts(row) for row in range(len(made.store.tokens)))


def test_places(made: Made) -> None:
    row, position = (int(i) for i in made.activations.where[5])
    place = made.store.place(row, position)
    assert place.document == made.activations.document_ids[int(made.activations.documents[row, position])]
    assert made.store.place(0, 0).document == "", "BOS belongs to no document"


def test_size_and_names(made: Made) -> None:
    assert BYTES_PER_FEATURE <= 2000
    assert (made.folder / "store" / "details.npy").stat().st_size <= 128 + D_SAE * BYTES_PER_FEATURE
    assert made.store.dictionary == dictionary_digest(made.dictionary)
    assert made.store.known(47) == 47
    for latent in (-1, D_SAE):
        with pytest.raises(DictionaryError, match=f"no feature {latent}: this SAE has 48"):
            made.store.known(latent)
    assert (slug("smollm2/12"), slug("../../etc"), slug("///")) == ("smollm2-12", "etc", "store")
    assert build_command(made.store.record).startswith("undertow dashboard build ")


def test_it_is_atomic_and_checked(made: Made, tmp_path: Path) -> None:
    source = Source("sae", "toy/1", made.dictionary, made.lens, made.activations, 3)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "texts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(source, tmp_path / "new", made.folder / "cache", stop)
    assert list(tmp_path.iterdir()) == []
    built = build_store(source, tmp_path / "new", made.folder / "cache")
    assert (built.n_features, built.n_tokens) == (D_SAE, made.store.n_tokens)
    np.testing.assert_array_equal(open_feature_store(tmp_path / "new").details, made.store.details)
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        build_store(source, tmp_path / "new", made.folder / "cache")
    manifest = json.loads((tmp_path / "new" / MANIFEST).read_text())
    manifest["record"]["format"] = 0
    (tmp_path / "new" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"format 0.*\n.*build it again: undertow dashboard build"):
        open_feature_store(tmp_path / "new")
    (tmp_path / "new" / "tokens.npy").write_bytes(b"")
    with pytest.raises(ArtifactError, match="has changed since it was written"):
        open_feature_store(tmp_path / "new")


@given(st.lists(st.text(max_size=20), max_size=30))
def test_strings_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("strings")
    write_strings(folder, "x", texts)
    found = Strings(folder, "x")
    assert len(found) == len(texts)
    assert found.between(0, len(texts)) == [text.encode("utf-8", "backslashreplace").decode() for text in texts]
    with pytest.raises(IndexError):
        found.between(0, len(texts) + 1)
