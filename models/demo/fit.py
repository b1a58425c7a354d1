"""The training loop that all four models share: budgets, losses, checkpoints, resuming."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from .data import IGNORED, Rows, batches
from .muon import Muon
from .network import deepened, device, logits_of

console = Console()


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model learns.

    The run ends when `tokens` or `minutes` is spent, whichever comes first, so that one recipe suits a GPU
    and a laptop; both may be changed when a run is resumed. The rates warm up, stay constant, and fall
    linearly to zero over the last `decay` of the run. `doublings` are the shares of the run at which the
    number of layers doubles. From `distil_from` on the loss is (1 - distil) cross-entropy + distil
    KL(teacher || model). With `keep_best` the weights that did best on held-out data are the result.
    """

    tokens: float
    minutes: float
    batch_rows: int = 12
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    warmup_tokens: float = 3e5
    decay: float = 0.35
    doublings: tuple[float, ...] = ()
    distil: float = 0.0
    distil_from: float = 0.0
    validate_every: float = 0.1
    keep_best: bool = False

    def progress(self, tokens: int, seconds: float) -> float:
        """The share of the run that is over, from tokens and from seconds spent."""
        return max(tokens / self.tokens, seconds / 60 / self.minutes)

    def layers(self, full: int, progress: float) -> int:
        """How many of the `full` layers the model has at this point of the run."""
        return full >> sum(progress < share for share in self.doublings)

    def rate(self, tokens: int, progress: float) -> float:
        """The factor on the peak learning rates, in [0, 1]."""
        return max(0.0, min(1.0, (tokens + 1) / self.warmup_tokens, (1 - progress) / self.decay))


@dataclass
class Run:
    """A model in training, and everything a checkpoint must hold."""

    model: LlamaForCausalLM
    optimisers: list[torch.optim.Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = float("inf")
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)


def optimisers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        Muon(hidden, lr=schedule.muon_rate),
        torch.optim.AdamW(rest, lr=schedule.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, data: tuple[Rows, Rows], rows: int) -> float:
    """Nats per scored token over the first `rows` rows."""
    total, count = 0.0, 0
    for row, wanted in zip(data[0][:rows], data[1][:rows], strict=True):
        targets = torch.from_numpy(wanted).to(device())
        logits = logits_of(model, torch.from_numpy(row[None]).to(device()))[0]
        total += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        count += int((wanted != IGNORED).sum())
    return total / count


def learn(
    model: torch.nn.Module, teacher: torch.nn.Module | None, share: float, batch: tuple[Rows, Rows]
) -> tuple[float, float]:
    """Add the gradient of one batch; returns cross-entropy and KL(teacher || model), nats per token.

    A CPU takes few rows at a time, to stay in its caches.
    """
    scored = int((batch[1] != IGNORED).sum())
    size = len(batch[0]) if device().type == "cuda" else 4
    entropy_sum = divergence_sum = 0.0
    for start in range(0, len(batch[0]), size):
        ids = torch.from_numpy(batch[0][start : start + size]).to(device())
        targets = torch.from_numpy(batch[1][start : start + size]).to(device()).flatten()
        logits = logits_of(model, ids).flatten(0, 1)
        entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / scored
        loss = entropy
        if teacher is not None:
            with torch.no_grad():
                wanted = logits_of(teacher, ids).flatten(0, 1).log_softmax(-1)
            divergence = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum") / scored
            loss = (1 - share) * entropy + share * divergence
            divergence_sum += float(divergence.detach())
        loss.backward()  # type: ignore[no-untyped-call]
        entropy_sum += float(entropy.detach())
    return entropy_sum, divergence_sum


def fit(
    folder: Path,
    schedule: Schedule,
    make_model: Callable[[int], LlamaForCausalLM],
    full_layers: int,
    train: tuple[Rows, Rows],
    held_out: tuple[Rows, Rows],
    teacher: LlamaForCausalLM | None = None,
    compiled: bool = True,
) -> None:
    """Train into `folder`, going on from its checkpoint if there is one.

    `make_model(layers)` gives the model to begin with. The folder ends with the float32 weights,
    `loss.jsonl` (one line a step) and `result.json`, which marks the run as finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    run = _begin(checkpoint, schedule, make_model, full_layers)
    name = folder.name
    parameters = sum(p.numel() for p in run.model.parameters())
    console.log(
        f"{name}: {parameters / 1e6:.2f}M parameters, {train[0].size / 1e6:.2f}M tokens to learn from"
    )
    compile_it: Any = torch.compile if compiled else lambda model: model
    fast, fast_teacher = compile_it(run.model), compile_it(teacher) if teacher is not None else None
    stream = batches(train, schedule.batch_rows, run.step)
    progress = schedule.progress(run.tokens, run.seconds)
    next_validation = progress + schedule.validate_every
    last_save, smooth = time.monotonic(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar, (folder / "loss.jsonl").open("a") as log:
        shown = bar.add_task(name, total=1.0)
        while progress < 1:
            began = time.monotonic()
            if run.model.config.num_hidden_layers < schedule.layers(full_layers, progress):
                run.model = deepened(run.model)
                run.optimisers = optimisers(run.model, schedule)
                torch.compiler.reset()
                fast = compile_it(run.model)
                console.log(f"{name} now has {run.model.config.num_hidden_layers} layers")
            factor = schedule.rate(run.tokens, progress)
            batch = next(stream)
            distilling = fast_teacher if progress >= schedule.distil_from else None
            entropy, divergence = learn(fast, distilling, schedule.distil, batch)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            peaks = (schedule.muon_rate, schedule.adam_rate)
            for optimiser, peak in zip(run.optimisers, peaks, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = peak * factor
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            run.step += 1
            run.tokens += batch[0].size
            smooth = entropy if smooth == 0 else 0.95 * smooth + 0.05 * entropy
            record = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds, "loss": entropy}
            record |= {"divergence": divergence, "rate": factor}
            if progress >= next_validation:
                record["held_out"] = _validate(run, schedule, held_out)
                console.log(f"{name} {run.tokens / 1e6:.2f}M tokens: held-out loss {record['held_out']:.4f}")
                next_validation += schedule.validate_every
            took = time.monotonic() - began
            run.seconds += took
            progress = schedule.progress(run.tokens, run.seconds)
            state = f"{run.tokens / 1e6:.2f}M tokens, loss {smooth:.3f}, {batch[0].size / took:,.0f} tokens/s"
            bar.update(shown, completed=progress, description=f"{name} {state}")
            if run.step % 20 == 0:
                console.log(f"{name} step {run.step} {run.seconds / 60:.1f} min {state} kl {divergence:.3f}")
            log.write(json.dumps(record) + "\n")
            log.flush()
            if time.monotonic() - last_save > 180:
                _save(checkpoint, run)
                last_save = time.monotonic()
    final = _validate(run, schedule, held_out)
    _save(checkpoint, run)
    if run.best_weights:
        run.model.load_state_dict(run.best_weights)
        final = run.best_loss
    run.model.save_pretrained(folder)
    result = {"tokens": run.tokens, "minutes": run.seconds / 60, "steps": run.step, "held_out": final}
    console.log(f"{name} finished: {result}")
    write_atomically(folder / "result.json", lambda beside: beside.write_text(json.dumps(result) + "\n"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target and rename, so that a stopped run never leaves half a file."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


def _validate(run: Run, schedule: Schedule, held_out: tuple[Rows, Rows]) -> float:
    loss = mean_loss(run.model, held_out, 64)
    if schedule.keep_best and loss < run.best_loss:
        run.best_loss = loss
        run.best_weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    return loss


def _begin(
    checkpoint: Path, schedule: Schedule, make_model: Callable[[int], LlamaForCausalLM], full_layers: int
) -> Run:
    if not checkpoint.exists():
        model = make_model(schedule.layers(full_layers, 0.0))
        return Run(model, optimisers(model, schedule))
    saved = torch.load(checkpoint, map_location=device(), weights_only=True)
    model = make_model(saved["layers"])
    model.load_state_dict(saved["model"])
    run = Run(model, optimisers(model, schedule), saved["step"], saved["tokens"], saved["seconds"])
    run.best_loss, run.best_weights = saved["best_loss"], saved["best_weights"]
    for optimiser, state in zip(run.optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    console.log(f"going on from step {run.step}, {run.tokens / 1e6:.2f}M tokens, {run.seconds / 60:.1f} min")
    return run


def _save(checkpoint: Path, run: Run) -> None:
    state = {
        "model": run.model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in run.optimisers],
        "layers": run.model.config.num_hidden_layers,
        "step": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "best_loss": run.best_loss,
        "best_weights": run.best_weights,
    }
    write_atomically(checkpoint, lambda beside: torch.save(state, beside))
