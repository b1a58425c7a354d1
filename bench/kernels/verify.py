"""Times verification: `python -P -m speculative_eft.bench.kernels.verify --json FILE`.

Against the torch reference, the reference under torch.compile, and the mix and softmax under torch.compile
followed by a verification kernel that takes probabilities. The cache is cold: between the tuned model's
drafting and the verification the large model's weights are read. (The large model's own logits may still be
in the cache then, so this is the slower case.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from speculative_eft.kernels import (
    AcceptanceRule,
    Coefficients,
    NoiseKey,
    Sampling,
    Stream,
    backend,
    draft_step,
    verify,
)
from speculative_eft.kernels.verify import RULES

from ..script import (
    BATCHES,
    VOCABULARIES,
    Script,
    coefficients,
    count_compilations,
    filtered,
    noise_key,
    random_logits,
    run,
)
from ..timing import reference_kernels

__all__ = [
    "add_bars",
    "by_probabilities",
    "bytes_moved",
    "call",
    "compiled_reference",
    "inputs",
    "measure",
]

DRAFTS = (1, 4, 8, 16)
_FILTERS = ("top_k", "top_p", "min_p")
_MODELS = 3

Medians = dict[tuple[str, AcceptanceRule, bool, bool], float | None]
"""Microseconds by implementation, rule, statistics and filters."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of a verification of full drafts by three models."""

    logits: list[Tensor]
    draft_tokens: Tensor
    draft_lens: Tensor
    coefficients: Coefficients
    noise: NoiseKey
    vocab_size: int

    @property
    def batch(self) -> int:
        return self.draft_tokens.shape[0]

    @property
    def drafted(self) -> int:
        return self.draft_tokens.shape[1]

    def sampling(self, with_filters: bool) -> Sampling:
        names = _FILTERS if with_filters else ()
        return filtered(self.batch, self.vocab_size, self.draft_tokens.device, *names)


def inputs(batch: int, drafted: int, vocab_size: int, device: torch.device) -> Inputs:
    """Random logits, and tokens drawn from their draft law, so that as many are accepted as would be."""
    torch.manual_seed(0)
    large, tuned, base = random_logits(_MODELS, (batch, drafted + 1, vocab_size), device)
    weights, noise = coefficients(batch, device), noise_key(batch, device)
    sampling = filtered(batch, vocab_size, device)
    tokens = [
        draft_step([tuned[:, row]], None, weights, sampling, noise, Stream.DRAFT, row, vocab_size)
        for row in range(drafted)
    ]
    lens = torch.full((batch,), drafted, device=device)
    return Inputs([large, tuned, base], torch.stack(tokens, dim=1), lens, weights, noise, vocab_size)


def bytes_moved(of: Inputs, rule: AcceptanceRule, statistics: bool, with_filters: bool) -> int:
    """Bytes of logits that the rule needs, with each read that depends on the one before.

    Every row once for its laws, with filters once more for its cuts, and the draft's own law twice too; the
    drafted rows again for residual masses and statistics; the committed row again for the replacement.
    """
    rows, drafted = of.drafted + 1, of.drafted
    reads = rows * _MODELS
    if with_filters:
        reads = 2 * (rows * _MODELS + drafted)
        reads += rows * _MODELS if rule == "shared_seed" else 0
    reads += drafted * _MODELS if statistics or rule == "block" else 0
    reads += 0 if rule == "shared_seed" else _MODELS
    return reads * of.batch * of.vocab_size * of.logits[0].element_size()


def call(of: Inputs, rule: AcceptanceRule, statistics: bool, sampling: Sampling) -> tuple[Tensor, ...]:
    """Verify, and return what there is in the verdict."""
    large, *tuned, base = of.logits
    verdict = verify(
        large, tuned, base, of.draft_tokens, of.draft_lens, of.coefficients, sampling, sampling, of.noise,
        rule, of.vocab_size, statistics=statistics,
    )  # fmt: skip
    found = (verdict.accepted_lens, verdict.next_token, verdict.expected_acceptance, verdict.log_probs)
    return tuple(part for part in found if part is not None)


def compiled_reference(compiler: str = "inductor") -> Callable[..., tuple[Tensor, ...]]:
    """The torch reference under torch.compile, for one set of shapes."""
    torch.compiler.reset()
    # Which kernels run is no question to ask while tracing.
    torch.compiler.assume_constant_result(backend)  # type: ignore[no-untyped-call]
    return torch.compile(call, fullgraph=True, dynamic=False, backend=compiler)


def by_probabilities(of: Inputs) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """Mix and softmax, then the kernel that takes probabilities; None where it cannot run."""
    device = of.draft_tokens.device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    # Triton need not be there, as on a CPU.
    from . import probabilities

    torch.compiler.reset()
    compiler = "inductor" if device.type == "cuda" else "eager"
    laws = torch.compile(probabilities.laws, fullgraph=True, dynamic=False, backend=compiler)
    weights = [of.coefficients.alpha[:, 0], of.coefficients.beta, of.sampling(False).temperature]
    wide = [weight[:, None, None].contiguous() for weight in weights]

    def call() -> tuple[Tensor, Tensor]:
        target, draft = laws(*of.logits, *wide)
        return probabilities.verify(target, draft, of.draft_tokens, of.draft_lens, of.noise)

    return call


def _shapes(script: Script) -> Iterator[tuple[int, int, int]]:
    """Batch, drafted tokens and vocabulary: first those of the bars, then the sweep."""
    if not script.on_gpu:
        yield 2, 2, 100
        return
    first = [(1, 8, 128_256), (64, 8, 128_256)]
    yield from first
    if script.quick:
        return
    for vocab_size in VOCABULARIES:
        for batch in BATCHES:
            for drafted in DRAFTS:
                if (batch, drafted, vocab_size) not in first:
                    yield batch, drafted, vocab_size


def _compare(script: Script, of: Inputs, everything: bool) -> Medians:
    """Time one shape; with `everything` all baselines, the reference with all options. Medians by labels."""
    found: Medians = {}
    shape = {"batch": of.batch, "drafted": of.drafted, "vocabulary": of.vocab_size}
    for rule in RULES:
        for statistics in (False, True):
            # On a CPU nothing is measured: half of the options show that the script runs.
            for with_filters in (False, True) if script.on_gpu else (statistics,):
                labels = {"rule": rule, "statistics": statistics, "filters": with_filters, **shape}
                sampling = of.sampling(with_filters)
                floor = bytes_moved(of, rule, statistics, with_filters)

                ours = partial(call, of, rule, statistics, sampling)
                key = (rule, statistics, with_filters)
                found[("ours", *key)] = script.measure(
                    script.ours, ours, labels, cold=True, bytes_moved=floor
                )
                plain = not statistics and not with_filters
                with reference_kernels():
                    if everything or plain:
                        found[("reference", *key)] = script.measure(
                            "torch reference", ours, labels, cold=True
                        )
                    if everything and plain and script.on_gpu:
                        compiled = compiled_reference()
                        found[("compiled", *key)] = script.measure(
                            "torch.compile", partial(compiled, of, rule, False, sampling), labels, cold=True
                        )
                if rule == "token" and plain and (everything or of.drafted == 8):
                    operation = by_probabilities(of)
                    if operation is None:
                        script.note("The kernel that takes probabilities needs Triton and a GPU.")
                    else:
                        script.measure("mix, softmax, probabilities", operation, labels, cold=True)
    return found


def _ratio(of: float | None, to: float | None) -> float | None:
    return None if of is None or to is None else of / to


def add_bars(script: Script, single: Medians, many: Medians | None, of_many: Inputs | None) -> None:
    """Bars, from medians at 8 drafted tokens and a vocabulary of 128,256.

    Args:
        single: of batch 1; many: of batch 64, whose inputs are `of_many`. None where not reached.
    """
    for rule in RULES:
        key = (rule, False, False)
        ours = single.get(("ours", *key))
        script.bar(f"{rule}, batch 1: at most 15 microseconds", ours, (ours or 0) <= 15)
        for name, text, least in (("reference", "torch reference", 10), ("compiled", "torch.compile", 3)):
            ratio = _ratio(single.get((name, *key)), ours)
            script.bar(
                f"{rule}, batch 1: at least {least} times as fast as {text}", ratio, (ratio or 0) >= least
            )
        ratio = _ratio(single.get(("ours", rule, False, True)), ours)
        added = None if ratio is None else ratio - 1
        script.bar(f"{rule}, batch 1: filters add at most 0.5 of the time", added, (added or 0) <= 0.5)
        ours = None if many is None else many.get(("ours", *key))
        share = None
        if ours is not None and of_many is not None:
            share = bytes_moved(of_many, rule, False, False) / (ours / 1e6) / script.bandwidth
        script.bar(f"{rule}, batch 64: at least 0.8 of copy bandwidth", share, (share or 0) >= 0.8)


def _count_specialisations(script: Script) -> None:
    """Which kernels are compiled again when the batch changes, and nothing else does."""
    drafted, vocab_size = (8, 32_000) if script.on_gpu else (2, 100)
    again: dict[str, list[int]] = {}
    for rule in RULES:
        for batch in (2, 1, 3, 16, 17, 64, 256):
            of = inputs(batch, drafted, vocab_size, script.device)
            with count_compilations() as counted:
                for with_filters in (False, True):
                    call(of, rule, True, of.sampling(with_filters))
            for kernel in counted if batch != 2 else ():
                again.setdefault(kernel, []).append(batch)
    script.content["compiled_again_for_batch"] = again
    number = float(sum(map(len, again.values())))
    script.bar("kernels compiled again because the batch changed: none", number, number == 0)


def measure(script: Script) -> None:
    """Time verification against the reference, the compiled reference and a kernel of probabilities."""
    script.note(
        "torch.compile is timed at the two shapes of the bars without filters and statistics, the reference "
        "there and without these at every shape, and the kernel that takes probabilities by the token rule, "
        "the only one that such kernels know, where 8 are drafted: compiling costs seconds a shape."
    )
    shapes = _shapes(script)
    (_, single), *rest = [(of, _compare(script, of, True)) for of in _fitting(script, islice(shapes, 2))]
    if script.on_gpu:
        of_many, many = rest[0] if rest else (None, None)
        add_bars(script, single, many, of_many)
        _count_specialisations(script)
    for of in _fitting(script, shapes):
        _compare(script, of, False)


def _fitting(script: Script, shapes: Iterable[tuple[int, int, int]]) -> Iterator[Inputs]:
    """The inputs of those shapes that fit the memory."""
    for batch, drafted, vocab_size in shapes:
        try:
            yield inputs(batch, drafted, vocab_size, script.device)
        except torch.OutOfMemoryError:
            script.note(f"Batch {batch}, {drafted} drafted, vocabulary {vocab_size} does not fit the memory.")


def main() -> None:
    """See `measure`."""
    run("verify", measure)


if __name__ == "__main__":
    main()
