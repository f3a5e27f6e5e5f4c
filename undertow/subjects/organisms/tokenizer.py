"""The vocabulary of the organisms that are trained from scratch: a small byte-level BPE learnt from the world's own stories."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from undertow.core.seeds import derive_seed
from undertow.subjects.keeper.story import Story

STORIES = 20_000
POSITIONS = 1024  # the longest stories have somewhat more than 512 tokens
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


@runtime_checkable
class StorySource(Protocol):
    """What training needs of a world."""

    @property
    def digest(self) -> str: ...

    def story(self, seed: int, index: int) -> Story: ...


def train_tokenizer(world: StorySource, seed: int, vocab: int, stories: int = STORIES) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens, learnt from `stories` stories; a pure function of its arguments.

    Text is split as GPT-2 does it, so that a word and its leading space are one piece and no token spans two words.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[BOS, EOS, PAD], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.train_from_iterator(_texts(world, derive_seed(seed, "tokenizer"), stories), trainer, length=stories)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD,
                                   model_max_length=POSITIONS, clean_up_tokenization_spaces=False)


def _texts(world: StorySource, seed: int, n: int) -> Iterator[str]:
    return (world.story(seed, index).text for index in range(n))
