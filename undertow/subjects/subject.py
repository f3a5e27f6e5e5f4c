"""The subject: a causal language model and its tokenizer, opened once and never altered outside a `with` block."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from undertow.core.errors import SubjectError
from undertow.subjects.sites import Site, parse_site
from undertow.subjects.special import special_ids


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """A model that can be read and operated on.

    Attributes:
        name: what the user typed: a known name, a Hugging Face name or a folder.
        source: the folder or Hugging Face name that the weights came from.
        hf_model: the plain transformers model, in eval mode.
        tokenizer: the plain transformers tokenizer.
    """

    name: str
    source: str
    hf_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order. Raises SubjectError for an architecture without one clear stack of them."""
        return find_blocks(self.hf_model, self.name)[1]

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(self.hf_model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return self.hf_model.device

    @property
    def bos_id(self) -> int | None:
        """Token put at position 0 of every row: the tokenizer's BOS, else its EOS, else none."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        found = bos if bos is not None else eos
        return None if found is None else int(found)  # pyright: ignore[reportArgumentType]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        config = self.hf_model.generation_config
        found = config.eos_token_id if config is not None else None
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            return frozenset()
        return frozenset(int(i) for i in found) if isinstance(found, (list, tuple)) else frozenset({int(found)})  # pyright: ignore[reportArgumentType]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens; their activations are never trained on, measured or edited."""
        return special_ids(self.tokenizer)

    @cached_property
    def digest(self) -> str:
        """16 hex characters over the architecture and every weight; two subjects agree iff they compute the same."""
        config = self.hf_model.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"):
            config.pop(key, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.hf_model.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def site(self, name: str) -> Site:
        """Site called `name`. Raises SiteError with near matches."""
        return parse_site(name, self.n_layers, self.name)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, BOS first; the text cannot spell a special token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids if self.bos_id is None else [self.bos_id, *ids]


def find_blocks(model: PreTrainedModel, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """The stack of decoder blocks and the module that owns it.

    The stack is the only `nn.ModuleList` whose length is the configured number of layers and that lies in no other such
    list. Raises SubjectError otherwise.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [(path, module) for path, module in model.named_modules()
              if isinstance(module, nn.ModuleList) and len(module) == n_layers and n_layers]
    outer = [(path, module) for path, module in stacks
             if not any(path.startswith(f"{other}.") for other, _ in stacks if other != path)]
    if len(outer) != 1:
        raise SubjectError(f"{name} is of architecture {type(model).__name__}, in which no single stack of "
                           f"{n_layers} decoder blocks was found (found {len(outer)})",
                           "decoder-only models (GPT-2, Llama, Gemma, Qwen and alike) can be tapped")
    path, blocks = outer[0]
    return model.get_submodule(path.rpartition(".")[0]), blocks
