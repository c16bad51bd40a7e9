"""A tokenizer and a model small enough to make in a test, and corpora for them."""

from __future__ import annotations

import functools
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moescope.hooks import Model, wrap
from tests.zoo import build

WORDS = "sun moon river stone bird tree wind rain fire snow été naïve 数学 🙂 leaf road".split()  # noqa: SIM905


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over `WORDS` with a start token; ids stay below the zoo's 90."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=88, special_tokens=["<pad>", "<s>", "</s>"])
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


@functools.cache
def model(name: str = "qwen2_moe") -> Model:
    """A zoo model with that tokenizer."""
    return wrap(build(name), tokenizer(), name=name)


def rows(n: int = 24, seed: int = 0, longest: int = 30) -> list[dict[str, str]]:
    """Labelled documents of very different lengths."""
    draw = random.Random(seed)
    return [
        {
            "id": f"doc-{number}",
            "text": " ".join(draw.choices(WORDS, k=draw.randint(1, longest))),
            "kind": draw.choice(["short", "long"]),
        }
        for number in range(n)
    ]
