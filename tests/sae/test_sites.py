"""MLP outputs and attention heads as sites: against TransformerBridge's hooks on four families; read, spliced, harvested."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae import harvesting
from sae.corpus import Corpus, TextSpec, open_corpus
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import check_fits, load, save_folder
from sae.harvesting import harvest, harvest_sites
from tests import tiny
from undertow.core.errors import EditError, SiteError
from undertow.subjects import EditResult, Site, Subject, load_subject, splice, tap
from undertow.subjects.sites import port, site_names, site_width
from undertow.subjects.tapping import tap_sites

KINDS = ("resid_pre", "resid_post", "mlp_out", "z")
NEW = [Site(layer, kind) for layer in range(tiny.N_LAYERS) for kind in ("mlp_out", "z")]


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tiny.save_subject(tmp_path_factory.mktemp(request.param), request.param)
    return load_subject(str(folder), device="cpu")


def tokens_of(subject: Subject) -> Tensor:
    return torch.tensor([subject.encode(story)[:24] for story in tiny.STORIES[:3]])


def logits(subject: Subject, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return subject.hf_model(input_ids=tokens).logits


def identity(x: Tensor, editable: Tensor) -> EditResult:
    return EditResult(torch.zeros_like(x), torch.ones_like(editable))


def push(x: Tensor, editable: Tensor) -> EditResult:
    return EditResult(torch.linspace(-1, 1, x.shape[-1]).square().expand_as(x), torch.ones_like(editable))


@pytest.mark.filterwarnings("ignore")
def test_sites_mean_what_transformer_lens_means(family: Subject) -> None:
    from undertow.subjects.bridge import bridge

    tokens = tokens_of(family)
    reference = bridge(family)
    _, cache = reference.run_with_cache(tokens, prepend_bos=False)
    for site in NEW:
        theirs = cache[site.name]
        theirs = theirs.flatten(2) if site.kind == "z" else theirs  # batch, position, head, width
        assert theirs.shape[-1] == site_width(family.blocks, site, family.d_model)
        torch.testing.assert_close(tap(family, tokens, site), theirs, atol=1e-5, rtol=1e-4, msg=site.name)
    for site in (Site(1, "mlp_out"), Site(0, "z")):  # and an edit there is an edit there
        with splice(family, site, push):
            mine = logits(family, tokens)

        def edit(acts: Tensor, hook: Any) -> Tensor:
            ramp = torch.linspace(-1, 1, acts[0, 0].numel()).square().view(acts.shape[2:])
            acts = acts.clone()
            acts[:, 1:] += ramp
            return acts

        edited = reference.run_with_hooks(tokens, prepend_bos=False, fwd_hooks=[(site.name, edit)])
        torch.testing.assert_close(mine, edited, atol=1e-4, rtol=1e-3, msg=site.name)
        assert not torch.allclose(mine, logits(family, tokens), atol=1e-2)


def test_what_blocks_add_is_what_their_parts_add(family: Subject) -> None:
    """The residual after a block is the one before it, plus attention's output, plus the MLP's."""
    tokens = tokens_of(family)
    block = family.blocks[1]
    added: list[Tensor] = []
    attention = dict(block.named_children()).get("post_attention_layernorm" if "Gemma2" in type(block).__name__ else "none",
                                                 block.get_submodule("attn" if hasattr(block, "attn") else "self_attn"))
    hook = attention.register_forward_hook(lambda _m, _a, out: added.append(out if isinstance(out, Tensor) else out[0]))
    pre, mlp, post = tap_sites(family, tokens, [Site(1, "resid_pre"), Site(1, "mlp_out"), Site(1, "resid_post")])
    hook.remove()
    torch.testing.assert_close(pre + added[0] + mlp, post, atol=1e-5, rtol=1e-5)


def test_an_identity_is_bit_exact_and_restored(family: Subject) -> None:
    tokens = tokens_of(family)
    plain = logits(family, tokens)
    for site in NEW:
        with splice(family, site, identity) as counts:
            assert torch.equal(logits(family, tokens), plain)
        assert counts.firings == counts.positions == 3 * 23
    assert torch.equal(logits(family, tokens), plain)
    with pytest.raises(EditError, match=r"at blocks\.1\.attn\.hook_z fired at none"), splice(family, Site(1, "z"), push):
        pass


def test_several_sites_in_one_pass_are_the_same_numbers(family: Subject) -> None:
    tokens = tokens_of(family)
    sites = [Site(2, "mlp_out"), Site(0, "resid_pre"), Site(1, "z"), Site(1, "resid_post"), Site(0, "resid_pre")]
    for site, acts in zip(sites, tap_sites(family, tokens, sites), strict=True):
        assert torch.equal(acts, tap(family, tokens, site)), site.name


def test_nothing_beyond_the_last_site_is_computed(family: Subject) -> None:
    seen: list[int] = []
    hooks = [block.register_forward_hook(lambda *_, layer=layer: seen.append(layer))
             for layer, block in enumerate(family.blocks)]
    tap_sites(family, tokens_of(family), [Site(1, "z"), Site(0, "resid_post")])
    for hook in hooks:
        hook.remove()
    assert seen == [0]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in family.hf_model.modules()) == 0


def test_names() -> None:
    hooks = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "attn.hook_z")
    assert site_names(1) == [f"blocks.0.{hook}" for hook in hooks]


@pytest.mark.parametrize(("name", "near"), [
    ("blocks.1.attn.hook_zz", "blocks.1.attn.hook_z"), ("blocks.1.hook_mlp_ot", "blocks.1.hook_mlp_out"),
    ("blocks.1.hook_z", "blocks.1.attn.hook_z"), ("blocks.1.", ""), ("mlp_out", "")])
def test_misspelt_names_are_refused(name: str, near: str, subject: Subject) -> None:
    with pytest.raises(SiteError, match="unknown site") as caught:
        subject.site(name)
    assert near in caught.value.hint
    assert [subject.site(site.name) for site in NEW] == NEW


def test_an_architecture_that_does_not_show_its_parts_is_refused() -> None:
    blocks = nn.ModuleList([nn.ModuleDict({"mixer": nn.Linear(2, 2)})])
    assert port(blocks, Site(0, "resid_post")).module is blocks[0]
    for kind in ("mlp_out", "z"):
        with pytest.raises(SiteError, match=r"cannot be found in this architecture.* holds mixer") as caught:
            port(blocks, Site(0, kind))
        assert "hook_resid_post" in caught.value.hint


# ---------------------------------------------------------------- harvest


@pytest.fixture(scope="module")
def corpus(folder: Path, subject: Subject) -> Corpus:
    return open_corpus(TextSpec(source=str(folder / "text.jsonl"), context=32), "train", subject.tokenizer, subject.bos_id)


SITES = [Site(1, "mlp_out"), Site(1, "z"), Site(0, "resid_post")]


def digests(path: Path) -> dict[str, str]:
    return json.loads((path / "manifest.json").read_text())["files"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls: list[int] = []

    def counted(*args: Any) -> list[Tensor]:
        calls.append(1)
        return tap_sites(*args)

    monkeypatch.setattr(harvesting, "tap_sites", counted)
    return lambda: len(calls)


def test_one_pass_fills_every_store_as_if_alone(subject: Subject, corpus: Corpus, tmp_path: Path,
                                                passes: Callable[[], int]) -> None:
    together = harvest_sites(subject, SITES, corpus, 3000, tmp_path / "together")
    once = passes()
    for site, store in zip(SITES, together, strict=True):
        alone = harvest(subject, site, corpus, 3000, tmp_path / "alone")
        assert digests(alone.path) == digests(store.path)
        assert store.record["site"] == site.name
    assert passes() == once + len(SITES) * once
    harvest_sites(subject, [*SITES, Site(2, "z")], corpus, 3000, tmp_path / "together")  # only what is missing
    assert passes() == (2 + len(SITES)) * once
    harvest_sites(subject, SITES, corpus, 3000, tmp_path / "together")
    assert passes() == (2 + len(SITES)) * once


def test_an_interrupted_harvest_of_several_sites_goes_on(subject: Subject, corpus: Corpus, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off while the second site's second shard is being written: the first site is one shard ahead."""
    real, left = harvesting._write_shard, iter(range(4))

    def killed(*args: Any) -> dict[str, Any]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(harvesting, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        harvest_sites(subject, SITES, corpus, 10**6, tmp_path / "broken")
    ledgers = sorted(len(json.loads(path.read_text())) for path in (tmp_path / "broken").rglob("progress.json"))
    assert ledgers == [1, 1, 2]
    monkeypatch.undo()
    for one, other in zip(harvest_sites(subject, SITES, corpus, 10**6, tmp_path / "broken"),
                          harvest_sites(subject, SITES, corpus, 10**6, tmp_path / "whole"), strict=True):
        assert digests(one.path) == digests(other.path)


# ---------------------------------------------------------------- SAEs at these sites


def test_an_sae_of_heads_opens_in_sae_lens_and_reads_four_dimensions(sae_lens: Any, subject: Subject, tmp_path: Path) -> None:
    rows = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    where = Provenance("llama", "blocks.1.attn.hook_z", 32, True)
    save_folder(LinearDictionary(rows.T.contiguous(), torch.zeros(48), rows, torch.zeros(32), TopK(4), where), tmp_path / "sae")
    ours, theirs = load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    z = tap(subject, tokens_of(subject), Site(1, "z"))
    with torch.no_grad():
        f = theirs.encode(z.unflatten(-1, (4, 8)))
        assert torch.equal(f.flatten(0, 1), ours.encode(z.flatten(0, 1)))
        assert torch.equal(theirs.decode(f).flatten(2).flatten(0, 1), ours.decode(f.flatten(0, 1)))
    assert check_fits(ours, "llama", 640, "blocks.1.attn.hook_z", None) == []  # heads × head width need not be d_model
    assert check_fits(ours, "llama", 32, "blocks.1.attn.o.hook_in", None) == []


def test_the_loss_is_judged_at_every_kind_of_site(subject: Subject, folder: Path) -> None:
    """A perfect reconstruction costs nothing at the site where it is put back."""
    from sae.metrics import loss_table

    text = TextSpec(source=str(folder / "text.jsonl"), context=32)
    held_out = open_corpus(text, "held_out", subject.tokenizer, subject.bos_id)
    eye = torch.cat([torch.eye(32), -torch.eye(32)])
    exact = LinearDictionary(eye.T.contiguous(), torch.zeros(64), eye, torch.zeros(32), TopK(32), Provenance.unknown())
    for kind in KINDS:
        table = loss_table(subject, Site(1, kind), exact, torch.zeros(32), islice(held_out.batches(2), 3), 1e9)
        assert table.recon.ce == pytest.approx(table.base.ce, abs=1e-5)
        assert table.zero_ablation.ce != pytest.approx(table.base.ce, abs=1e-3)
