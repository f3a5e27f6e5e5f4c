"""Names of the places in a forward pass that can be read and edited, and the modules of a subject that they mean.

The names are TransformerLens' canonical ones. We check them ourselves: on a TransformerBridge a misspelt hook name runs
silently unchanged, which is a perfect and false null result.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, cast, final

from jaxtyping import Float
from torch import Tensor, nn

from undertow.core.errors import SiteError, near_matches

SiteKind = Literal["resid_pre", "resid_post", "mlp_out", "z"]
HOOKS: dict[SiteKind, str] = {"resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out",
                              "z": "attn.hook_z"}
_KINDS: dict[str, SiteKind] = {hook: kind for kind, hook in HOOKS.items()}
_PATTERN = re.compile(r"blocks\.(\d+)\.(.+)")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_AFTER_MLP = ("post_feedforward_layernorm",)  # Gemma 2 and alike write the norm of the MLP's output
_ATTENTION = ("attn", "self_attn", "attention", "self_attention")
_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@final
class Site(NamedTuple):
    """One place in block `layer` (0-based).

    `resid_pre` and `resid_post` are the residual stream before and after the block, `mlp_out` what its MLP adds to it (after
    a norm where the architecture has one), `z` the heads' outputs before the attention's output projection, side by side.
    """

    layer: int
    kind: SiteKind

    @property
    def name(self) -> str:
        """TransformerLens' name, e.g. `blocks.12.hook_resid_post`."""
        return f"blocks.{self.layer}.{HOOKS[self.kind]}"


class Port(NamedTuple):
    """Where a site's activation passes: the first input or the output of `module`."""

    module: nn.Module
    is_input: bool


def site_names(n_layers: int) -> list[str]:
    """Every site of a model with `n_layers` blocks."""
    return [f"blocks.{layer}.{hook}" for layer in range(n_layers) for hook in HOOKS.values()]


def parse_site(name: str, n_layers: int, subject: str) -> Site:
    """Site called `name`. Raises SiteError with near matches if the subject has none of that name."""
    match = _PATTERN.fullmatch(name)
    kind = _KINDS.get(match[2]) if match else None
    if match is None or kind is None:
        hint = near_matches(name, site_names(n_layers)) or "write it as blocks.LAYER.hook_resid_post"
        raise SiteError(f"unknown site {name!r} for {subject}", hint)
    layer = int(match[1])
    if layer >= n_layers:
        raise SiteError(f"{name!r} is out of range: {subject} has {n_layers} blocks",
                        f"choose a layer from 0 to {n_layers - 1}")
    return Site(layer, kind)


def port(blocks: nn.ModuleList, site: Site) -> Port:
    """The module of `blocks` that `site` means. Raises SiteError if the architecture does not show it."""
    block = blocks[site.layer]
    match site.kind:
        case "resid_pre":
            return Port(block, True)
        case "resid_post":
            return Port(block, False)
        case "mlp_out":
            after = [child for name, child in block.named_children() if name in _AFTER_MLP]
            return Port(after[0] if after else _only([block], _MLP, site), False)
        case "z":
            outer = _only([block], _ATTENTION, site)
            inner = [child for name, child in outer.named_children() if name in _ATTENTION]  # GPT-Neo nests another one
            return Port(_only([outer, *inner], _ATTENTION_OUT, site), True)


def _only(parents: list[nn.Module], names: tuple[str, ...], site: Site) -> nn.Module:
    found = [child for parent in parents for name, child in parent.named_children() if name in names]
    if len(found) != 1:
        inside = ", ".join(name for name, _ in parents[0].named_children())
        raise SiteError(f"{site.name} cannot be found in this architecture: of {', '.join(names)} there should be one in "
                        f"{type(parents[0]).__name__}, which holds {inside}", "use a hook_resid_pre or hook_resid_post site")
    return found[0]


def site_width(blocks: nn.ModuleList, site: Site, d_model: int) -> int:
    """Width of the activations at `site`: d_model, but heads × head width at `z`."""
    if site.kind != "z":
        return d_model
    module = port(blocks, site).module
    width = getattr(module, "in_features", None)
    return int(width if width is not None else cast(Tensor, module.weight).shape[0])  # GPT-2's Conv1D is (in, out)


def hidden_of(value: Any) -> Float[Tensor, "batch pos width"]:
    """The hidden states in a module's inputs or outputs, which are a tensor or a tuple that starts with one."""
    return value if isinstance(value, Tensor) else value[0]
