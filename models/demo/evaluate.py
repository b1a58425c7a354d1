"""What the trio can do: held-out losses of the four models and of EFT, and how often drafts are accepted."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from . import corpus, data, network
from .card import write_card
from .fit import console, mean_loss

BASE_ROWS = 200
SAMPLED_TOKENS = 96


@dataclass(frozen=True)
class Laws:
    """Log-probabilities at the same positions, each (positions, vocabulary), and the tokens that follow."""

    large_base: Tensor
    small_base: Tensor
    small_tuned: Tensor
    large_tuned: Tensor
    targets: Tensor

    @property
    def eft(self) -> Tensor:
        """Emulated fine-tuning with alpha = beta = 1."""
        return eft_law(self.large_base, self.small_tuned, self.small_base)


def eft_law(large: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
    """log_softmax(L + F - B) over the last dimension, in float32."""
    return (large.float() + tuned.float() - base.float()).log_softmax(-1)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """sum_x min(p, q) of two log-laws: the chance that a token drafted from q is accepted for p."""
    return torch.minimum(p, q).exp().sum(-1)


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean and its standard error, over independent examples."""
    return {
        "mean": float(np.mean(values)),
        "standard_error": float(np.std(values, ddof=1) / math.sqrt(len(values))),
        "examples": len(values),
    }


@torch.no_grad()
def laws_on(models: dict[str, LlamaForCausalLM], prompt: list[int], completion: list[int]) -> Laws:
    """The four models' laws at every token of a completion."""
    ids = torch.tensor([prompt + completion], device=network.device())
    first = len(prompt) - 1
    laws = {role: network.logits_of(m, ids)[0, first:-1].log_softmax(-1) for role, m in models.items()}
    return Laws(**laws, targets=ids[0, len(prompt) :])


def task_losses(
    models: dict[str, LlamaForCausalLM], tokenizer: data.FastTokenizer, examples: list[corpus.TaskExample]
) -> dict[str, object]:
    """Nats per token of task completions under each law, and the acceptance at the reference's tokens."""
    roles = ("large_base", "small_base", "small_tuned", "eft", "large_tuned")
    sums: dict[str, list[float]] = {role: [] for role in roles}
    accepted: list[float] = []
    lengths: list[int] = []
    for example in examples:
        laws = laws_on(models, *data.task_ids(tokenizer, example))
        for role in roles:
            chosen = getattr(laws, role).gather(1, laws.targets[:, None])
            sums[role].append(-float(chosen.sum()))
        accepted.append(float(overlap(laws.eft, laws.small_tuned).mean()))
        lengths.append(len(laws.targets))
    tokens = sum(lengths)
    gaps = {
        other: [(a - b) / n for a, b, n in zip(sums["eft"], sums[other], lengths, strict=True)]
        for other in ("small_tuned", "large_tuned")
    }
    return {
        "loss": {role: sum(values) / tokens for role, values in sums.items()},
        "eft_minus": {other: mean_and_error(values) for other, values in gaps.items()},
        "examples": len(examples),
        "tokens": tokens,
        "acceptance": mean_and_error(accepted),
    }


@torch.no_grad()
def sampled_acceptance(
    models: dict[str, LlamaForCausalLM], prompt: list[int], end_id: int, generator: torch.Generator
) -> list[float]:
    """The acceptance at each step of one completion sampled from EFT at temperature 1."""
    caches = {role: DynamicCache() for role in models}
    ids = torch.tensor([prompt], device=network.device())
    values: list[float] = []
    for _ in range(SAMPLED_TOKENS):
        laws = {}
        for role, model in models.items():
            out = model(input_ids=ids, past_key_values=caches[role], use_cache=True)
            laws[role] = out.logits[0, -1].float().log_softmax(-1)
        eft = eft_law(laws["large_base"], laws["small_tuned"], laws["small_base"])
        values.append(float(overlap(eft, laws["small_tuned"])))
        token = int(torch.multinomial(eft.exp().cpu(), 1, generator=generator))
        if token == end_id:
            break
        ids = torch.tensor([[token]], device=network.device())
    return values


def evaluate(work: Path, package: Path) -> None:
    """Measure the shipped weights (in float32 arithmetic) and write evaluation.json and the model card."""
    tokenizer = data.load_tokenizer(package / "weights" / "large_base")
    folders = {role: package / "weights" / role for role in ("large_base", "small_base", "small_tuned")}
    folders["large_tuned"] = work / "large_tuned"
    models = {role: network.load(folder) for role, folder in folders.items()}
    tasks = data.split_tasks(tokenizer, corpus.read_tasks(work / "tasks.jsonl"))
    files = data.text_rows(np.load(work / "held_out.npy"))
    rows = min(BASE_ROWS, len(files[0]))
    base = {role: mean_loss(model, files, rows) for role, model in models.items()}
    console.log(f"held-out files: {base}")
    on_tasks = task_losses(models, tokenizer, tasks.evaluation)
    console.log(f"held-out tasks: {on_tasks}")

    trio = {role: model for role, model in models.items() if role != "large_tuned"}
    generator = torch.Generator().manual_seed(0)
    end_id = data.end_of(tokenizer)
    with (package / "prompts.jsonl").open(encoding="utf-8") as lines:
        prompts = [str(json.loads(line)["prompt"]) for line in lines]
    sampled = [sampled_acceptance(trio, data.ids_of(tokenizer, p), end_id, generator) for p in prompts]
    acceptance = mean_and_error([float(np.mean(values)) for values in sampled])
    acceptance["per_token"] = float(np.mean(np.concatenate(sampled)))
    acceptance["tokens"] = sum(map(len, sampled))
    console.log(f"acceptance on sampled completions: {acceptance}")

    report = {
        "held_out_files": {"loss": base, "tokens": rows * data.ROW},
        "held_out_tasks": on_tasks,
        "sampled_acceptance": acceptance,
        "parameters": {role: sum(p.numel() for p in model.parameters()) for role, model in models.items()},
        "layers": {role: model.config.num_hidden_layers for role, model in models.items()},
        "hidden": {role: model.config.hidden_size for role, model in models.items()},
        "training": {r: json.loads((work / r / "result.json").read_text()) for r in models},
        "corpus_tokens": len(np.load(work / "train.npy", mmap_mode="r")),
        "task_examples": {"train": len(tasks.train), "validation": len(tasks.validation)},
        "packages": json.loads((work / "manifest.json").read_text()),
        "software": {"python": platform.python_version(), "torch": torch.__version__},
        "device": network.device().type,
        "threads": torch.get_num_threads(),
    }
    (package / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    write_card(package / "MODEL_CARD.md", report)
