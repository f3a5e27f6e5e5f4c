"""The SAE that comes with the package: it opens, it is small, and its card says what it measures."""

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

NAME = "smollm2/12"
FOLDER = PACKAGED / NAME


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((FOLDER / "evaluation.json").read_text())


def test_it_is_there_whole_and_small() -> None:
    assert NAME in packaged_names()
    open_artifact(FOLDER, "sae")
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 10_000_000


def test_it_opens_in_ours_and_in_sae_lens() -> None:
    sae_lens = pytest.importorskip("sae_lens")
    ours, theirs = load(NAME), sae_lens.SAE.load_from_disk(FOLDER)
    assert (ours.architecture, ours.d_in, ours.d_sae) == ("topk", 576, 4096)
    x = 20 * torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        f = theirs.encode(x)
        assert torch.equal(ours.encode(x), f)
        assert torch.equal(ours.decode(f), theirs.decode(f))
    assert (f > 0).sum(dim=1).float().mean() > 16
    assert theirs.cfg.metadata.hook_name == "blocks.12.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "smollm2"


def test_it_meets_what_was_asked(figures: dict[str, Any]) -> None:
    assert figures["fvu"] <= 0.22
    assert figures["dead_share"] <= 0.02
    assert figures["l0"] <= 32
    assert figures["train_tokens"] >= 1_000_000
    cost = figures["ce_mean_ablation"] - figures["ce_base"]
    assert figures["ce_recovered"] == pytest.approx((figures["ce_mean_ablation"] - figures["ce_recon"]) / cost)
    assert sum(figures["density_histogram"].values()) == 4096


def test_the_card_says_it_and_how_to_make_it_again(figures: dict[str, Any]) -> None:
    card = (FOLDER / "card.md").read_text()
    record = open_artifact(FOLDER, "sae").record
    for name, decimals in (("fvu", 4), ("l0", 2), ("ce_base", 4), ("ce_recon", 4), ("ce_mean_ablation", 4), ("kl_recon", 4)):
        assert f"{figures[name]:.{decimals}f}" in card
    assert record["figures"] == figures
    assert command_of(RunSpec.checked(record["spec"], "card"), "DIR") in card
    assert record["subject_digest"] in card


@pytest.mark.slow
def test_eval_reproduces_the_card(figures: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for kind, name in (("subjects", "smollm2"), ("texts", "brown")):
        if not (cache_dir() / kind / name / MANIFEST).is_file():
            pytest.skip(f"{name} is not fetched: undertow {kind[:-1]} fetch {name}")
    assert main(["sae", "eval", NAME, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fvu"] == pytest.approx(figures["fvu"], abs=1e-3)
    assert found["tokens"] == figures["tokens"]
    assert found["dead_share"] == pytest.approx(figures["dead_share"], abs=1e-3)
    for name in ("ce_base", "ce_recon", "ce_mean_ablation"):
        assert found[name] == pytest.approx(figures[name], abs=5e-3)


def test_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "eval", "smollm2/13"]) == 2
    err = capsys.readouterr().err
    assert "no SAE called 'smollm2/13'" in err
    assert "did you mean smollm2/12?" in err
