"""Tokenizers of a few tokens, for tests that need text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@cache
def tokenizer_of(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is `tokens[i]`, and whose text is tokens one after the other.

    One token more is a text that transformers' criterion for stop strings has to write with any tokenizer.
    """
    other = "abcdef"
    vocabulary = {token: index for index, token in enumerate((*tokens, other))}
    model = models.WordLevel(vocabulary, unk_token=other)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=other, clean_up_tokenization_spaces=False
    )


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Tokens `w0`, `w1`, ..."""
    return tokenizer_of(tuple(f"w{index}" for index in range(vocab_size)))
