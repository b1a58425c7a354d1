"""From text to token rows: the tokenizer, the packed corpus, and the packed task examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from .corpus import Document, TaskExample, share_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 2048
END = "<|endoftext|>"
ROW = 512
TASK_TOKENS = 320
IGNORED = -100

FastTokenizer: TypeAlias = "PreTrainedTokenizerFast"
Tokens = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskSplit:
    """Task examples to train on, to stop early by, and to report on; the last two from held-out files."""

    train: list[TaskExample]
    validation: list[TaskExample]
    evaluation: list[TaskExample]


def train_tokenizer(texts: Iterator[str]) -> FastTokenizer:
    """A byte-level BPE of VOCABULARY ids; END is its first id and serves as bos, eos and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer: FastTokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    return tokenizer


def load_tokenizer(folder: Path) -> FastTokenizer:
    """The tokenizer saved in a folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: FastTokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def end_of(tokenizer: FastTokenizer) -> int:
    """The id of END."""
    end_id = tokenizer.backend_tokenizer.token_to_id(END)
    assert end_id is not None
    return end_id


def ids_of(tokenizer: FastTokenizer, text: str) -> list[int]:
    """The ids of a text, nothing added."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def packed(tokenizer: FastTokenizer, documents: list[Document]) -> Tokens:
    """All documents as one run of ids, END after each."""
    encoded = tokenizer.backend_tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    end_id = end_of(tokenizer)
    return np.array([i for one in encoded for i in (*one.ids, end_id)], dtype=np.uint16)


def text_rows(tokens: Tokens) -> tuple[Rows, Rows]:
    """Inputs and targets, each (rows, ROW), that cut the packed corpus without gaps."""
    count = (len(tokens) - 1) // ROW
    inputs = tokens[: count * ROW].reshape(count, ROW).astype(np.int64)
    targets = tokens[1 : count * ROW + 1].reshape(count, ROW).astype(np.int64)
    return inputs, targets


def split_tasks(tokenizer: FastTokenizer, examples: list[TaskExample]) -> TaskSplit:
    """The examples of at most TASK_TOKENS tokens; held-out ones are halved by the hash of their source."""
    short = [e for e in examples if sum(map(len, task_ids(tokenizer, e))) <= TASK_TOKENS]
    held_out = [e for e in short if e.held_out]
    return TaskSplit(
        train=[e for e in short if not e.held_out],
        validation=[e for e in held_out if share_of("validation:" + e.source) < 0.5],
        evaluation=[e for e in held_out if share_of("validation:" + e.source) >= 0.5],
    )


def task_ids(tokenizer: FastTokenizer, example: TaskExample) -> tuple[list[int], list[int]]:
    """The ids of a task's prompt, and those of its function with END behind."""
    return ids_of(tokenizer, example.prompt), [*ids_of(tokenizer, example.reference), end_of(tokenizer)]


def task_rows(tokenizer: FastTokenizer, examples: list[TaskExample]) -> tuple[Rows, Rows]:
    """Inputs and targets, each (rows, ROW), of whole examples one after another.

    Only completions are scored: targets on prompts and on the padding behind are IGNORED.
    """
    end_id = end_of(tokenizer)
    inputs: list[list[int]] = []
    targets: list[list[int]] = []
    room = 0
    for example in examples:
        prompt, completion = task_ids(tokenizer, example)
        length = len(prompt) + len(completion)
        if length > room:
            inputs.append([])
            targets.append([])
            room = ROW
        inputs[-1] += prompt + completion
        targets[-1] += [IGNORED] * (len(prompt) - 1) + completion + [IGNORED]
        room -= length
    for row, wanted in zip(inputs, targets, strict=True):
        wanted += [IGNORED] * (ROW - len(row))
        row += [end_id] * (ROW - len(row))
    return np.array(inputs, dtype=np.int64), np.array(targets, dtype=np.int64)


def batches(data: tuple[Rows, Rows], size: int, start: int) -> Iterator[tuple[Rows, Rows]]:
    """Endless batches, each epoch in a new fixed order, beginning with batch number `start`."""
    inputs, targets = data
    per_epoch = len(inputs) // size
    epoch, within = divmod(start, per_epoch)
    while True:
        order = np.random.default_rng(epoch).permutation(len(inputs))
        for index in range(within, per_epoch):
            chosen = order[index * size : (index + 1) * size]
            yield inputs[chosen], targets[chosen]
        epoch, within = epoch + 1, 0
