"""The recipe of the demo trio: from installed Python source to three small language models.

    python -P -m speculative_eft.models.demo.train                    # everything that is not done yet
    python -P -m speculative_eft.models.demo.train --stage small_base --minutes 30

Every stage leaves its result in the work folder, so the recipe can be stopped and started again; training
goes on from its last checkpoint. `export` and `evaluate` replace the files that the package ships.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlamaForCausalLM

from . import corpus, data, network
from .evaluate import evaluate
from .export import export_model
from .fit import Schedule, console, fit

# Tokens bind on a GPU, minutes on a CPU; the minutes are those of two cores.
SCHEDULES = {
    "large_base": Schedule(tokens=1e8, minutes=66, doublings=(0.2, 0.45)),
    "small_base": Schedule(tokens=1e8, minutes=45, distil=0.8, distil_from=0.3),
    "small_tuned": Schedule(
        tokens=6e6, minutes=6, muon_rate=5e-3, adam_rate=5e-4, warmup_tokens=5e4, decay=0.9, keep_best=True
    ),
    "large_tuned": Schedule(
        tokens=6e6, minutes=50, muon_rate=5e-3, adam_rate=5e-4, warmup_tokens=5e4, decay=0.9, keep_best=True
    ),
}

SHIPPED = ("large_base", "small_base", "small_tuned")
PROMPTS = 32
PACKAGE_FOLDER = Path(__file__).resolve().parent


class Stage(str, Enum):
    """What can be asked for; `all` is every other stage in this order."""

    corpus = "corpus"
    tokenizer = "tokenizer"
    large_base = "large_base"
    small_base = "small_base"
    small_tuned = "small_tuned"
    large_tuned = "large_tuned"
    export = "export"
    evaluate = "evaluate"
    all = "all"


def build_corpus(work: Path, package_bytes: int) -> None:
    """Collect the documents and the task examples, and write the manifest and the shown prompts."""
    documents, records = corpus.collect(package_bytes)
    examples = corpus.task_examples(documents)
    corpus.write_lines(work / "documents.jsonl", documents)
    corpus.write_lines(work / "tasks.jsonl", examples)
    (work / "manifest.json").write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    held = sum(document.split == "held_out" for document in documents)
    size = sum(record.bytes for record in records) / 1e6
    console.log(f"{len(documents)} files, {size:.1f} MB, {held} held out; {len(examples)} tasks")


def build_tokenizer(work: Path) -> None:
    """Train the tokenizer on the training files, then pack the corpus into ids."""
    documents = corpus.read_documents(work / "documents.jsonl")
    tokenizer = data.train_tokenizer(d.text for d in documents if d.split == "train")
    tokenizer.save_pretrained(work / "tokenizer")
    for split in ("held_out", "train"):
        chosen = [d for d in documents if d.split == split]
        tokens = data.packed(tokenizer, chosen)
        np.save(work / f"{split}.npy", tokens)
        per_token = sum(len(d.text.encode()) for d in chosen) / len(tokens)
        console.log(f"{split}: {len(tokens) / 1e6:.2f}M tokens of {per_token:.2f} bytes")


def train(stage: str, work: Path, schedule: Schedule, compiled: bool) -> None:
    """Train one of the four models; the tuned ones begin as their base."""
    tokenizer = data.load_tokenizer(work / "tokenizer")
    end_id = data.end_of(tokenizer)
    size: network.Size = "large" if stage.startswith("large") else "small"
    make_model: Callable[[int], LlamaForCausalLM]
    if stage.endswith("base"):
        learnt, held_out = (data.text_rows(np.load(work / f"{s}.npy")) for s in ("train", "held_out"))

        def make_model(layers: int) -> LlamaForCausalLM:
            return network.new_model(size, end_id, layers)
    else:
        tasks = data.split_tasks(tokenizer, corpus.read_tasks(work / "tasks.jsonl"))
        learnt, held_out = (data.task_rows(tokenizer, t) for t in (tasks.train, tasks.validation))

        def make_model(layers: int) -> LlamaForCausalLM:
            return network.load(work / f"{size}_base")

    teacher = network.load(work / "large_base") if schedule.distil else None
    full_layers = network.SIZES[size].layers
    fit(work / stage, schedule, make_model, full_layers, learnt, held_out, teacher, compiled)


def export(work: Path, package: Path) -> None:
    """Put the weights that are finished and the held-out prompts into the package."""
    tokenizer = data.load_tokenizer(work / "tokenizer")
    finished = [role for role in SHIPPED if (work / role / "result.json").exists()]
    for role in finished:
        export_model(network.load(work / role), tokenizer, package / "weights" / role)
    tasks = data.split_tasks(tokenizer, corpus.read_tasks(work / "tasks.jsonl"))
    shown = corpus.readable_tasks(tasks.evaluation + tasks.validation, PROMPTS)
    lines = ({"prompt": e.prompt, "reference": e.reference, "source": e.source} for e in shown)
    (package / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    console.log(f"{', '.join(finished)} and {len(shown)} prompts are in {package}")


def main(
    stage: Annotated[Stage, typer.Option(help="Which part of the recipe to run.")] = Stage.all,
    work: Annotated[Path, typer.Option(help="Folder for the corpus, checkpoints and logs.")] = Path(
        ".build/demo"
    ),
    package: Annotated[Path, typer.Option(help="Folder that gets the weights and tables.")] = PACKAGE_FOLDER,
    minutes: Annotated[float | None, typer.Option(help="Time budget of a model, in minutes.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Token budget of a model.")] = None,
    package_bytes: Annotated[int, typer.Option(help="Most bytes one package gives.")] = corpus.PACKAGE_BYTES,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile; needs a C++ compiler.")] = True,
) -> None:
    """Make the demo trio, or one stage of it. A stage asked for by name is always run."""
    work.mkdir(parents=True, exist_ok=True)
    made = {Stage.corpus: "tasks.jsonl", Stage.tokenizer: "train.npy"}
    wanted = [s for s in Stage if s is not Stage.all] if stage is Stage.all else [stage]
    for current in wanted:
        result = work / made.get(current, f"{current.value}/result.json")
        if stage is Stage.all and result.exists():
            continue
        if current is Stage.corpus:
            build_corpus(work, package_bytes)
        elif current is Stage.tokenizer:
            build_tokenizer(work)
        elif current is Stage.export:
            export(work, package)
        elif current is Stage.evaluate:
            evaluate(work, package)
        else:
            schedule = SCHEDULES[current.value]
            schedule = replace(
                schedule, minutes=minutes or schedule.minutes, tokens=tokens or schedule.tokens
            )
            train(current.value, work, schedule, compiled)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
