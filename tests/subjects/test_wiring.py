"""The heads that are set by hand do what is said of them, whatever the text, and stay so while the model learns."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from undertow.subjects.keeper.frames import load_frames
from undertow.subjects.keeper.story import Wish
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.organisms.pretraining import PretrainSpec, Trainer, new_model
from undertow.subjects.organisms.tokenizer import train_tokenizer
from undertow.subjects.organisms.wiring import COPY, held, wiring

SPEC = PretrainSpec(name="hearth", steps=4, batch=2, vocab=2048)


@cache
def world() -> World:
    return load_world()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(world(), 0, 2048, 1000)


@cache
def names() -> dict[int, str]:
    """The names that are one token, by id."""
    spelt = {person.name: tokenizer().encode(f" {person.name}", add_special_tokens=False) for person in load_frames().people}
    return {ids[0]: name for name, ids in spelt.items() if len(ids) == 1}


@cache
def model() -> LlamaForCausalLM:
    made = new_model(SPEC, tokenizer(), list(names().values()))
    made.set_attn_implementation("eager")
    return made


@cache
def tokens() -> tuple[int, ...]:
    prompt = world().story(3, 1, Wish(people=2, bond=3, genre="plain", episodes=("need",))).prompt()
    return (0, *tokenizer().encode(prompt, add_special_tokens=False))


@cache
def attention() -> list[Float[Tensor, "head query key"]]:
    with torch.no_grad():
        return [block[0] for block in model()(input_ids=torch.tensor([tokens()]), output_attentions=True).attentions]


@cache
def last_name() -> list[int | None]:
    """For every position, where the last name before it stands (the position itself, if it is one)."""
    found: list[int | None] = []
    at = None
    for position, token in enumerate(tokens()):
        at = position if token in names() else at
        found.append(at)
    return found


def test_most_names_are_one_token() -> None:
    assert len(names()) > 100


def test_every_token_attends_to_the_last_name_before_it() -> None:
    hits = [float(attention()[0][0, q, at]) for q, at in enumerate(last_name()) if at is not None]
    assert len(hits) > 100
    assert sum(hit > 0.5 for hit in hits) > 0.9 * len(hits)
    other = [float(attention()[0][2, q, at]) for q, at in enumerate(last_name()) if at is not None and at < q]
    assert sum(hit > 0.5 for hit in other) < 0.1 * len(other)  # a head that is not wired does not


def test_the_second_head_sees_the_last_few() -> None:
    rows = attention()[0][1]
    near = [float(rows[q, q - 11: q + 1].sum()) for q in range(40, len(tokens()))]
    flat = [12 / (q + 1) for q in range(40, len(tokens()))]
    assert sum(near) / len(near) > 0.5 > 2 * sum(flat) / len(flat)


def test_matching_heads_attend_to_words_told_of_the_same_name() -> None:
    """At the decision, which comes after the name of the one in need, nearly all attention lies where that name was last."""
    plan = wiring(SPEC.d_model, SPEC.n_heads, SPEC.n_layers)
    assert plan.matching == ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
    decision = len(tokens()) - 1
    at = last_name()[decision]
    assert at is not None
    guest = tokens()[at]
    same = [position for position, seen in enumerate(last_name()) if seen is not None and tokens()[seen] == guest]
    share = len(same) / len(tokens())
    far = [position for position in same if position < at]
    for block, head in plan.matching:
        row = attention()[block][head, decision]
        assert float(row[same].sum()) > (1 + share) / 2, (block, head)
        assert float(row[far].sum()) > 0.2, (block, head)
    assert float(attention()[1][4, decision][same].sum()) < (1 + share) / 2  # not wired: as much as there is of it


def test_only_the_wiring_writes_tags() -> None:
    """Names differ in their tags, a name always writes the same one, and no other part of the model adds to them."""
    plan = wiring(SPEC.d_model, SPEC.n_heads, SPEC.n_layers)
    with torch.no_grad():
        hidden = model()(input_ids=torch.tensor([tokens()]), output_hidden_states=True).hidden_states
    assert float(hidden[0][0, :, plan.tags:].abs().max()) == 0.0
    for deeper in hidden[2:-1]:
        torch.testing.assert_close(deeper[0, :, plan.tags:], hidden[1][0, :, plan.tags:])
    where = [position for position in range(len(tokens())) if last_name()[position] == position]
    tags = torch.nn.functional.normalize(hidden[1][0, where, plan.tags:], dim=-1)
    same = torch.tensor([[tokens()[a] == tokens()[b] for b in where] for a in where])
    likeness = tags @ tags.T
    assert float(likeness[same].min()) > 0.9
    assert float(likeness[~same].max()) < 0.8


def test_all_other_attention_begins_by_copying() -> None:
    plan = wiring(SPEC.d_model, SPEC.n_heads, SPEC.n_layers)
    v, o, q, k = (model().get_parameter(f"model.layers.3.self_attn.{role}_proj.weight").detach() for role in "voqk")
    torch.testing.assert_close((o @ v)[: plan.body], COPY * torch.eye(SPEC.d_model)[: plan.body], atol=1e-5, rtol=0)
    assert torch.equal(q, k)


def test_what_is_wired_stays_and_the_rest_learns() -> None:
    made = new_model(SPEC, tokenizer(), list(names().values()))
    masks = held(made)
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    trainer = Trainer(SPEC, world(), tokenizer(), made)
    trainer.step()
    trainer.step()
    for name, parameter in made.named_parameters():
        mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[mask], before[name][mask]), name
        assert not torch.equal(parameter[~mask], before[name][~mask]), name
    free = sum(parameter.numel() for parameter in made.parameters()) - sum(int(mask.sum()) for mask in masks.values())
    assert free > 0.9 * sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize(("d_model", "n_heads", "n_layers"), [(16, 2, 1), (16, 1, 3), (192, 6, 4), (64, 8, 2)])
def test_any_shape_can_be_wired(d_model: int, n_heads: int, n_layers: int) -> None:
    spec = PretrainSpec(name="hearth", steps=1, d_model=d_model, n_heads=n_heads, n_layers=n_layers, d_mlp=32, vocab=2048)
    made = new_model(spec, tokenizer(), list(names().values()))
    plan = wiring(d_model, n_heads, n_layers)
    assert 0 < plan.body == plan.constant < plan.name < plan.tags < d_model
    assert all(mask.any() for mask in held(made).values())
    assert sum(int(mask.sum()) for mask in held(made).values()) < sum(parameter.numel() for parameter in made.parameters()) / 5
    with torch.no_grad():
        assert torch.isfinite(made(input_ids=torch.tensor([tokens()])).logits).all()
