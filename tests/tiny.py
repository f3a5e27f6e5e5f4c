"""Tiny subjects: local Hugging Face folders of four architectures, with random weights and a tokenizer trained here."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ARCHITECTURES = ("gpt2", "llama", "gemma2", "qwen2")
D_MODEL, N_LAYERS = 32, 3
STORIES = [
    f"The keeper of the {place} trimmed the lamp and counted the {good} once more. {name} came in from the rain and sat "
    f"down by the fire.\nNobody spoke for a while. The {good} would last until the boat came, or it would not."
    for place in ("lighthouse", "ferry hut", "mountain inn", "mill")
    for good in ("oil", "bread", "wood")
    for name in ("Ana", "Tomas", "Irena", "Joel", "Mira")
]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens, trained on STORIES, with chat marks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(STORIES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>")
    if chat:
        made.chat_template = CHAT
    return made


def model(architecture: str, vocab: int, seed: int = 0, positions: int = 256) -> PreTrainedModel:
    """A random model: 3 blocks of width 32, large enough weights that the logits differ clearly."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    llama = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": positions, "initializer_range": 0.15}
    made: PreTrainedModel
    if architecture == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=positions,
                                          initializer_range=0.15, **common))
    elif architecture == "llama":
        made = LlamaForCausalLM(LlamaConfig(**llama, **common))
    elif architecture == "gemma2":
        made = Gemma2ForCausalLM(Gemma2Config(**llama, head_dim=8, sliding_window=64, **common))
    else:
        made = Qwen2ForCausalLM(Qwen2Config(**llama, **common))
    with torch.no_grad():  # gains away from their initial value, so that a test can see them
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return made.eval()


def save_subject(folder: Path, architecture: str, chat: bool = True, seed: int = 0) -> Path:
    """Write a tiny subject and return its folder."""
    made = tokenizer(chat)
    model(architecture, len(made), seed).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_text(path: Path, copies: int = 1) -> Path:
    """Write STORIES as JSON Lines, `copies` times with different endings."""
    import json

    lines = [json.dumps({"id": f"{copy}-{i}", "text": f"{story} Night {copy}."})
             for copy in range(copies) for i, story in enumerate(STORIES)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
