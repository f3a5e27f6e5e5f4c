"""Opening, tapping and splicing subjects, against TransformerLens and plain transformers as independent references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from undertow.core.errors import ArtifactError, EditError, NumericsError, SiteError, SubjectError
from undertow.subjects import EditResult, Subject, load_subject, score, splice, tap
from undertow.subjects.organisms.measuring import Question, ask
from undertow.subjects.splicing import Window
from undertow.subjects.unembed import final_norm, final_norm_and_unembed


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tiny.save_subject(tmp_path_factory.mktemp(request.param), request.param)
    return load_subject(str(folder), device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("llama"), "llama")), device="cpu")


def tokens_of(subject: Subject, text: str = tiny.STORIES[0]) -> torch.Tensor:
    return torch.tensor([subject.encode(text)[:24]])


def identity(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
    return EditResult(torch.zeros_like(x), torch.ones_like(editable))


def push(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
    return EditResult(ramp(x), torch.ones_like(editable))


def ramp(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).square().expand_as(x)  # not constant: LayerNorm would undo it


def hook_count(subject: Subject) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.hf_model.modules())


def logits(subject: Subject, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return subject.hf_model(input_ids=tokens).logits


def test_tap_reads_what_transformers_reports(subject: Subject) -> None:
    tokens = tokens_of(subject)
    with torch.inference_mode():
        hidden = subject.hf_model(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer in range(tiny.N_LAYERS):
        assert torch.equal(tap(subject, tokens, subject.site(f"blocks.{layer}.hook_resid_pre")), hidden[layer])
    for layer in range(tiny.N_LAYERS - 1):
        assert torch.equal(tap(subject, tokens, subject.site(f"blocks.{layer}.hook_resid_post")), hidden[layer + 1])
    last = tap(subject, tokens, subject.site(f"blocks.{tiny.N_LAYERS - 1}.hook_resid_post"))
    assert torch.allclose(final_norm(subject)(last), hidden[-1], atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_sites_mean_what_transformer_lens_means(subject: Subject) -> None:
    from undertow.subjects.bridge import bridge

    reference, tokens = bridge(subject), tokens_of(subject)
    names = [f"blocks.{layer}.hook_resid_{kind}" for layer in range(tiny.N_LAYERS) for kind in ("pre", "post")]
    _, cache = reference.run_with_cache(tokens, prepend_bos=False)
    for name in names:
        assert torch.allclose(tap(subject, tokens, subject.site(name)), cache[name].double(), atol=1e-5), name


def test_identity_splice_is_bit_identical_and_counts(subject: Subject) -> None:
    tokens = tokens_of(subject)
    plain, hooks = logits(subject, tokens), hook_count(subject)
    for name in ("blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"):
        with splice(subject, subject.site(name), identity) as counts:
            assert torch.equal(logits(subject, tokens), plain)
        assert counts.positions == counts.firings == tokens.shape[1] - 1
    assert hook_count(subject) == hooks


def test_splice_edits_all_but_the_first_position_and_is_gone_afterwards(subject: Subject) -> None:
    tokens = tokens_of(subject)
    plain, hooks = logits(subject, tokens), hook_count(subject)
    site = subject.site("blocks.1.hook_resid_post")
    before = tap(subject, tokens, site)
    with splice(subject, site, push):
        edited = logits(subject, tokens)
        after = tap(subject, tokens, subject.site("blocks.2.hook_resid_pre"))
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1:], before[:, 1:] + ramp(before[:, 1:]))
    assert torch.equal(edited[:, 0], plain[:, 0]) and not torch.allclose(edited[:, 1:], plain[:, 1:])
    assert torch.equal(logits(subject, tokens), plain) and hook_count(subject) == hooks


def test_splice_restores_the_model_after_an_exception(subject: Subject) -> None:
    tokens, hooks = tokens_of(subject), hook_count(subject)
    plain = logits(subject, tokens)
    with pytest.raises(ZeroDivisionError), splice(subject, subject.site("blocks.0.hook_resid_post"), push):
        logits(subject, tokens)
        raise ZeroDivisionError
    assert hook_count(subject) == hooks and torch.equal(logits(subject, tokens), plain)


def test_splice_leaves_padding_and_massive_activations_alone(llama: Subject) -> None:
    tokens = tokens_of(llama)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    attend = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    site = llama.site("blocks.1.hook_resid_post")
    with splice(llama, site, push) as counts, torch.inference_mode():
        llama.hf_model(input_ids=padded, attention_mask=attend)
    assert counts.positions == tokens.shape[1] - 1  # neither the three pads nor the first token
    norms = tap(llama, tokens, site).norm(dim=-1)[0, 1:]
    ceiling = float(norms.median())
    with splice(llama, site, push, norm_ceiling=ceiling) as counts:
        logits(llama, tokens)
    assert counts.positions == int((norms <= ceiling).sum()) < len(norms)


def test_an_edit_that_never_fires_is_an_error(llama: Subject) -> None:
    site = llama.site("blocks.1.hook_resid_post")

    def never(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
        return EditResult(torch.ones_like(x), torch.zeros_like(editable))

    with pytest.raises(EditError, match=r"fired at none of 23 editable positions"), splice(llama, site, never):
        logits(llama, tokens_of(llama))
    with pytest.raises(EditError, match=r"none of 0"), splice(llama, site, push):
        pass


def test_a_wrong_delta_is_refused(llama: Subject) -> None:
    site = llama.site("blocks.1.hook_resid_post")

    def broadcastable(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
        return EditResult(torch.ones(1, 1, x.shape[-1]), torch.ones_like(editable))

    def infinite(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
        return EditResult(torch.full_like(x, float("inf")), torch.ones_like(editable))

    with pytest.raises(EditError, match=r"delta \(1, 1, 32\)"), splice(llama, site, broadcastable):
        logits(llama, tokens_of(llama))
    with pytest.raises(NumericsError, match=r"not finite"), splice(llama, site, infinite):
        logits(llama, tokens_of(llama))


def test_unembed_view_reproduces_the_logits(subject: Subject) -> None:
    """logits = W_U·(gain ⊙ normalised x + bias), with the norm computed here by its definition."""
    view = final_norm_and_unembed(subject)
    tokens = tokens_of(subject)
    x = tap(subject, tokens, subject.site(f"blocks.{tiny.N_LAYERS - 1}.hook_resid_post"))
    if view.centred:
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * view.gamma.double()
    bias = getattr(final_norm(subject), "bias", None)
    mine = (normed + (0 if bias is None else bias)) @ view.W_U.double().T
    soft_cap = getattr(subject.hf_model.config, "final_logit_softcapping", None)
    if soft_cap:
        mine = soft_cap * torch.tanh(mine / soft_cap)
    assert view.centred == ("GPT2" in type(subject.hf_model).__name__)
    assert torch.allclose(mine, logits(subject, tokens), atol=2e-3)


def test_digest_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    first = load_subject(str(tiny.save_subject(tmp_path / "a", "llama", seed=1)), device="cpu")
    same = load_subject(str(tiny.save_subject(tmp_path / "b", "llama", seed=1)), device="cpu")
    other = load_subject(str(tiny.save_subject(tmp_path / "c", "llama", seed=2)), device="cpu")
    assert first.digest == same.digest != other.digest


def test_text_cannot_spell_a_special_token(llama: Subject) -> None:
    ids = llama.encode("a <|im_end|> b")
    assert ids[0] == llama.bos_id and not set(ids[1:]) & llama.special_ids
    assert llama.tokenizer.decode(ids[1:]) == "a <|im_end|> b"


def test_unknown_sites_name_near_matches(llama: Subject) -> None:
    with pytest.raises(SiteError, match=r"blocks\.1\.hook_resid_pots.*\n.*blocks\.1\.hook_resid_post"):
        llama.site("blocks.1.hook_resid_pots")
    with pytest.raises(SiteError, match=r"3 blocks.*\n.*from 0 to 2"):
        llama.site("blocks.3.hook_resid_post")


def test_unknown_models_are_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SubjectError, match=r"unknown model 'smolm2'.*\n.*did you mean smollm2"):
        load_subject("smolm2")
    with pytest.raises(SubjectError, match=r"not been fetched yet\n.*undertow subject fetch smollm2"):
        load_subject("smollm2")
    with pytest.raises(SubjectError, match=r"no such model folder"):
        load_subject(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SubjectError, match=r"no config.json"):
        load_subject(str(tmp_path / "empty"))
    with pytest.raises(SubjectError, match=r"unknown dtype 'float8'"):
        load_subject("smollm2", dtype="float8")


def test_unknown_architecture_and_truncated_weights(tmp_path: Path) -> None:
    folder = tiny.save_subject(tmp_path / "m", "llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "perceptron9"'))
    with pytest.raises(SubjectError, match=r"perceptron9"):
        load_subject(str(folder))
    (folder / "config.json").write_text(config)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SubjectError, match=r"cannot open the model"):
        load_subject(str(folder))


def test_a_model_without_decoder_blocks_is_refused(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    folder = tmp_path / "m"
    tiny.model("llama", len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    broken = load_subject(str(folder), device="cpu").hf_model
    broken.config.num_hidden_layers = 7
    with pytest.raises(SubjectError, match=r"LlamaForCausalLM.*no single stack of 7"):
        _ = Subject("m", "m", broken, made).blocks


def test_a_changed_fetched_subject_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from undertow.core.storage import create_artifact

    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path))
    with create_artifact(tmp_path / "subjects" / "smollm2", "subject", {"variant": "test"}) as work:
        tiny.save_subject(work, "llama")
    assert load_subject("smollm2", device="cpu").n_layers == tiny.N_LAYERS
    weights = tmp_path / "subjects" / "smollm2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"has changed.*\n.*undertow subject fetch smollm2"):
        load_subject("smollm2", device="cpu")


def test_a_window_limits_the_splice_to_its_columns(subject: Subject) -> None:
    tokens, site = tokens_of(subject), subject.site("blocks.1.hook_resid_post")
    before = tap(subject, tokens, site)
    window = Window(5, 9)
    with splice(subject, site, push, window=window) as counts:
        after = tap(subject, tokens, subject.site("blocks.2.hook_resid_pre"))
        assert (counts.positions, counts.firings) == (4, 4)
        window.start, window.stop = 20, None  # moved while the splice runs
        moved = tap(subject, tokens, subject.site("blocks.2.hook_resid_pre"))
        window.start, window.stop = 0, 0
        assert torch.equal(tap(subject, tokens, subject.site("blocks.2.hook_resid_pre")), before)
    assert (after != before).any(-1)[0].nonzero()[:, 0].tolist() == [5, 6, 7, 8]
    assert (moved != before).any(-1)[0].nonzero()[:, 0].tolist() == list(range(20, tokens.shape[1]))
    with splice(subject, site, push, window=Window(0, 2)) as counts:
        logits(subject, tokens)
    assert counts.firings == 1  # column 0 is the attention sink, which no window opens


def test_columns_count_padding_and_the_cache(llama: Subject) -> None:
    tokens, site = tokens_of(llama), llama.site("blocks.1.hook_resid_post")
    pads = torch.zeros(1, 3, dtype=torch.long)
    padded, attend = torch.cat([pads, tokens], dim=1), torch.cat([pads, torch.ones_like(tokens)], dim=1)
    with splice(llama, site, push, window=Window(0, 6)) as counts, torch.inference_mode():
        llama.hf_model(input_ids=padded, attention_mask=attend)
    assert counts.firings == 2  # of columns 0 to 5, three are padding and the fourth is the first token
    window = Window(10, 13)
    with splice(llama, site, push, window=window) as counts:
        whole = logits(llama, tokens)
        assert counts.firings == 3
        cache, parts = DynamicCache(), []
        with torch.inference_mode():
            for piece in tokens.split([8, 4, 1, 11], dim=1):
                parts.append(llama.hf_model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    assert counts.firings == 6
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_a_window_that_never_opens_is_an_error(llama: Subject) -> None:
    site, tokens = llama.site("blocks.1.hook_resid_post"), tokens_of(llama)
    with pytest.raises(EditError, match=r"none of 0"), splice(llama, site, push, window=Window(500)):
        logits(llama, tokens)
    with pytest.raises(EditError, match=r"column -3 to None.*\n.*from 0"), splice(llama, site, push, window=Window(-3)):
        logits(llama, tokens)


def test_ask_announces_the_column_of_the_prompts_last_token(llama: Subject) -> None:
    """A splice that ends before that column leaves the last token of every prompt and all wordings as they are."""
    options = {"give": ((5, 6), (7, 8, 9)), "keep": ((10,),)}
    questions = [Question(llama.encode(text)[:n], options) for text, n in zip(tiny.STORIES, (9, 12, 12), strict=False)]
    columns: list[int] = []
    plain = ask(llama, questions, announce=columns.append)
    assert columns == [8, 11]  # the check of the first question, then one batch
    window, site = Window(0, 0), llama.site("blocks.1.hook_resid_post")

    def close_at(column: int) -> None:
        window.stop = column

    with splice(llama, site, push, window=window) as counts:
        edited = ask(llama, [questions[0]], announce=close_at)[0]
    assert counts.firings == 3 * 7  # scored three times (plain, packed, and as the batch): tokens 1 to 7 of the nine
    with splice(llama, site, push, window=Window(0, 8)):
        wordings = [wording for group in options.values() for wording in group]
        by_hand = score(llama, questions[0].prompt, wordings)
    assert edited.log_mass["give"] == pytest.approx(float(by_hand[:2].logsumexp(0)), abs=1e-4)
    assert edited.log_mass["keep"] == pytest.approx(float(by_hand[2]), abs=1e-4)
    assert abs(edited.log_mass["keep"] - plain[0].log_mass["keep"]) > 1e-3


def test_answers_under_a_splice_do_not_depend_on_the_batch(llama: Subject) -> None:
    """Padding on the left of a shorter prompt, and its first token behind it, are left alone as in a pass of its own."""
    options = {"a": ((5, 6), (7,)), "b": ((8, 9),)}
    questions = [Question([0, *range(10, 10 + n)], options) for n in (3, 9, 5)]
    with splice(llama, llama.site("blocks.0.hook_resid_post"), push):
        together = ask(llama, questions)
        alone = [ask(llama, [question])[0] for question in questions]
    for one, other in zip(together, alone, strict=True):
        assert one.log_mass == pytest.approx(other.log_mass, abs=1e-5)
    assert together[0].log_mass != pytest.approx(ask(llama, questions[:1])[0].log_mass, abs=1e-3)  # the push does something
