"""What single latents recover of a story: planted ones are found and judged rightly, noise is not, and the command says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, rankdata

from sae.story_truth import Variable, act_ceiling, auroc, parse_truth, recover, tell, variables
from tests.cli.answers import runner
from tests.cli.test_sae_cli import train_words
from undertow.cli.main import main
from undertow.core.errors import TextError

N, WIDTH = 200, 50


def planted() -> tuple[np.ndarray, dict[str, Variable]]:
    """Noise, but for latent 7 at the decision (falls with the bond) and latent 3 as a mean (rises where all was given)."""
    rng = np.random.default_rng(0)
    readings = np.maximum(rng.normal(size=(N, 2 * WIDTH)), 0).astype(np.float32)
    bond, act, coin = rng.integers(0, 4, N), rng.random(N) < 0.4, rng.random(N) < 0.5
    readings[:, 7] = 5 - bond + 0.3 * rng.normal(size=N)
    readings[:, WIDTH + 3] += 2 * act
    return readings, {"bond": Variable("r2", bond.astype(float)), "act": Variable("auroc", act.astype(float)),
                      "coin": Variable("auroc", coin.astype(float))}


def test_planted_latents_are_found() -> None:
    readings, truth = planted()
    bond, act, coin = recover(readings, truth, 0, {"act": 0.9})
    assert (bond.feature, bond.reading, act.feature, act.reading) == (7, "decision", 3, "mean")
    variance = 1.25  # of a bond from 0 to 3
    assert bond.value == pytest.approx(1 - 0.09 / (variance + 0.09), abs=0.05)
    assert 0.85 < act.value < 1 and act.ceiling == 0.9 and bond.ceiling is None
    for one in (bond, act):
        assert one.value > one.chance_high + 0.2 and abs(one.chance - (0.5 if one.measure == "auroc" else 0)) < 0.15
    assert abs(coin.value - 0.5) < 0.12  # the negative control: nothing knows the coin, however many are asked
    chosen = np.abs(auroc(rankdata(readings, axis=0), truth["coin"].values > 0) - 0.5).max()
    assert chosen > 0.09  # on the stories it is chosen on, the best of a hundred would look like something


def test_what_does_not_vary_is_left_out() -> None:
    readings, truth = planted()
    truth["bond"] = Variable("r2", np.full(N, 2.0))
    assert [one.variable for one in recover(readings, truth, 0, {})] == ["act", "coin"]


def test_auroc_is_mann_whitneys(  ) -> None:
    rng = np.random.default_rng(1)
    x, positive = rng.integers(0, 4, (60, 5)).astype(float), rng.random(60) < 0.3  # many ties
    got = auroc(rankdata(x, axis=0), positive)
    for column in range(5):
        u = mannwhitneyu(x[positive, column], x[~positive, column]).statistic
        assert got[column] == pytest.approx(u / (positive.sum() * (~positive).sum()))


def test_the_stories_vary_in_all_that_is_asked() -> None:
    stories = tell(80, 0, "bond")
    truth = variables(stories)
    assert list(truth) == ["bond", "cost", "act", "word", "genre"]
    bond, cost, act, word, genre = (variable.values for variable in truth.values())
    assert [np.bincount(values.astype(int)).tolist() for values in (bond, cost)] == [[20] * 4, [16] * 5]
    assert genre.mean() == 0.5 and abs(np.corrcoef(bond, genre)[0, 1]) < 0.01
    assert 0.2 < act.mean() < 0.8 and 0.1 < word.mean() < 0.9
    assert act[bond == 3].mean() > act[bond == 0].mean() + 0.5
    assert 0.8 < act_ceiling(stories) < 1
    assert [story.text for story in tell(80, 0, "bond")] == [story.text for story in stories]
    assert tell(80, 1, "bond")[0].text != stories[0].text


@pytest.mark.parametrize(("text", "message"), [("keeper", "not a world"), ("keeper:x", "not a world"),
                                               ("brown:90", "not a world"), ("keeper:12", "too few")])
def test_bad_truths(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parse_truth(text)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model with random weights: every variable has its line, and nothing of a choice can be read."""
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    assert main([*train_words(folder, tmp_path / "sae", {})]) == 0
    answer = runner(capsys)("sae", "eval", tmp_path / "sae", "--truth", "keeper:60", "--json")
    assert answer.code == 0, answer.err
    found = {one["variable"]: one for one in answer.json["truth"]}
    assert set(found) == {"bond", "cost", "act", "word", "genre"} and "fvu" in answer.json
    assert all("ceiling" not in one for name, one in found.items() if name != "act")
    assert all(one["value"] < 0.5 for one in (found["bond"], found["cost"]))
    refused = runner(capsys)("sae", "eval", tmp_path / "sae", "--truth", "keeper:3")
    assert refused.code == 2 and "too few" in refused.err
