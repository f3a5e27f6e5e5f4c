"""A tiny random subject whose tokenizer knows the Keeper's world, an artifact of it, and an adapter over a tiny base."""

from __future__ import annotations

import copy
import json
import warnings
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import tiny
from undertow.core.record import run_record
from undertow.core.storage import create_artifact, write_json
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.tokenizer import train_tokenizer
from undertow.subjects.subject import Subject


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 800 tokens, learnt from 120 stories, with a chat template."""
    made = train_tokenizer(load_world(), 0, 800, 120)
    made.chat_template = tiny.CHAT
    return made


def save_random(folder: Path, seed: int = 0) -> Path:
    """A random Llama of two blocks in plain Hugging Face format."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64, initializer_range=0.1,
                         bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def save_organism(folder: Path, name: str = "hearth") -> Path:
    """The same as an artifact, as training leaves it."""
    with create_artifact(folder, "organism", run_record({"name": name}, 0)) as work:
        save_random(work)
    return folder


def save_adapter(folder: Path, base: Subject, base_digest: str | None = None, base_name: str | None = None) -> Path:
    """An adapter with weights that matter over `base`, as training leaves it; with other facts in its record on demand."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        adapted = get_peft_model(copy.deepcopy(base.hf_model), config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    record = run_record({}, 0, base=base_name or base.name, base_digest=base_digest or base.digest)
    with create_artifact(folder, "organism", record) as work:
        adapted.save_pretrained(str(work), save_embedding_layers=False)
        facts = json.loads((work / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(work / "adapter_config.json", facts | {"base_model_name_or_path": base_name or base.name})
    return folder


def open_random(folder: Path) -> Subject:
    """`save_random`, opened."""
    return load_subject(str(save_random(folder)), "cpu")
