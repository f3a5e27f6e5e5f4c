"""The SAEs that come with the package: they open, they are small, and their cards say what they measure."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sae.card import command_of
from sae.formats import PACKAGED, load, packaged_names
from sae.spec import RunSpec
from undertow.cli.main import main
from undertow.core.storage import MANIFEST, cache_dir, open_artifact

NAMES = ("hearth-smollm2/14", "smollm2/12")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def figures(name: str) -> dict[str, Any]:
    return json.loads((PACKAGED / name / "evaluation.json").read_text())


def test_they_are_there_whole_and_small(name: str) -> None:
    assert packaged_names() == list(NAMES)
    open_artifact(PACKAGED / name, "sae")
    assert sum(path.stat().st_size for path in (PACKAGED / name).rglob("*") if path.is_file()) <= 10_000_000


def test_it_opens_in_ours_and_in_sae_lens(name: str) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    ours, theirs = load(name), sae_lens.SAE.load_from_disk(PACKAGED / name)
    assert (ours.architecture, ours.d_in, ours.d_sae) == ("topk", 576, 4096)
    x = 20 * torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        f = theirs.encode(x)
        assert torch.equal(ours.encode(x), f)
        assert torch.equal(ours.decode(f), theirs.decode(f))
    assert (f > 0).sum(dim=1).float().mean() > 16
    model, layer = name.split("/")
    assert theirs.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
    assert theirs.cfg.metadata.model_name == model


def test_it_meets_what_was_asked(figures: dict[str, Any]) -> None:
    assert figures["fvu"] <= 0.22
    assert figures["dead_share"] <= 0.02
    assert figures["l0"] <= 32
    assert figures["train_tokens"] >= 1_000_000
    cost = figures["ce_mean_ablation"] - figures["ce_base"]
    assert figures["ce_recovered"] == pytest.approx((figures["ce_mean_ablation"] - figures["ce_recon"]) / cost)
    assert sum(figures["density_histogram"].values()) == 4096


def test_the_card_says_it_and_how_to_make_it_again(name: str, figures: dict[str, Any]) -> None:
    card = (PACKAGED / name / "card.md").read_text()
    record = open_artifact(PACKAGED / name, "sae").record
    for figure, decimals in (("fvu", 4), ("l0", 2), ("ce_base", 4), ("ce_recon", 4), ("ce_mean_ablation", 4), ("kl_recon", 4)):
        assert f"{figures[figure]:.{decimals}f}" in card
    assert record["figures"] == figures
    assert command_of(RunSpec.checked(record["spec"], "card"), "DIR") in card
    assert record["subject_digest"] in card


@pytest.mark.slow
def test_eval_reproduces_the_card(name: str, figures: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for kind, needed in (("subjects", "smollm2"), ("texts", "brown")):
        if not (cache_dir() / kind / needed / MANIFEST).is_file():
            pytest.skip(f"{needed} is not fetched: undertow {kind[:-1]} fetch {needed}")
    assert main(["sae", "eval", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fvu"] == pytest.approx(figures["fvu"], abs=1e-3)
    assert found["tokens"] == figures["tokens"]
    assert found["dead_share"] == pytest.approx(figures["dead_share"], abs=1e-3)
    for figure in ("ce_base", "ce_recon", "ce_mean_ablation"):
        assert found[figure] == pytest.approx(figures[figure], abs=5e-3)


def test_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "eval", "smollm2/13"]) == 2
    err = capsys.readouterr().err
    assert "no SAE called 'smollm2/13'" in err
    assert "did you mean smollm2/12 or hearth-smollm2/14?" in err
