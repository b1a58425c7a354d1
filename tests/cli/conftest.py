"""A tiny random trio on disk, with a tokenizer of bytes and a few merges."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speculative_eft.cli import main

CONTEXT = 64
VOCABULARY = 320


@dataclass(frozen=True)
class Trio:
    """Folders of three models that fit together."""

    large: Path
    tuned: Path
    base: Path

    @property
    def options(self) -> list[str]:
        return ["--large", str(self.large), "--tuned", str(self.tuned), "--base", str(self.base)]

    @property
    def arguments(self) -> list[str]:
        return [str(self.large), str(self.tuned), str(self.base)]


def byte_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `text`, with `<|end|>` and, beyond the models' vocabulary, `<|beyond|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    while tokenizer.get_vocab_size() < VOCABULARY:
        tokenizer.add_special_tokens([AddedToken(f"<|{tokenizer.get_vocab_size()}|>")])
    tokenizer.add_special_tokens([AddedToken("<|beyond|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def save_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int, vocabulary: int = VOCABULARY
) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer("def add(first, second):\n    return first + second\n" * 4)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Trio:
    root = tmp_path_factory.mktemp("trio")
    return Trio(
        large=save_model(root / "large", tokenizer, 0, 32),
        tuned=save_model(root / "tuned", tokenizer, 1, 16),
        base=save_model(root / "base", tokenizer, 2, 16),
    )


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command line in this process, with `stdin` as if piped."""

    def run_main(*arguments: str, stdin: str = "") -> Outcome:
        # On a machine where nothing is compiled yet, the first run would say so.
        monkeypatch.setattr("speculative_eft.command_options._is_told", True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        status = main(arguments)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run_main
