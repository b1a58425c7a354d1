"""MODEL_CARD.md, written from the numbers of evaluation.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROLES = ("large_base", "small_base", "small_tuned", "large_tuned")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_card(path: Path, report: dict[str, Any]) -> None:
    """Write the model card for one evaluation."""
    path.write_text(_card(report))


def _models_table(report: dict[str, Any]) -> str:
    training = report["training"]
    rows = [
        [
            f"`{role}`",
            f"{report['parameters'][role] / 1e6:.2f}M",
            f"{report['layers'][role]} x {report['hidden'][role]}",
            f"{training[role]['tokens'] / 1e6:.2f}M",
            f"{training[role]['minutes']:.0f} min",
            "no" if role == "large_tuned" else "yes",
        ]
        for role in ROLES
    ]
    return table(["model", "parameters", "layers x width", "tokens seen", "time", "shipped"], rows)


def _loss_table(report: dict[str, Any]) -> str:
    files, tasks = report["held_out_files"]["loss"], report["held_out_tasks"]["loss"]
    names = ("small_base", "large_base", "small_tuned", "eft", "large_tuned")
    rows = [
        [
            "EFT (L + F - B)" if name == "eft" else f"`{name}`",
            f"{files[name]:.3f}" if name in files else "-",
            f"{tasks[name]:.3f}",
        ]
        for name in names
    ]
    return table(["law", "held-out files", "held-out tasks"], rows)


def _oracle_note(report: dict[str, Any]) -> str:
    """A warning for when the oracle lost: it is no oracle then, and the comparison settles nothing."""
    loss, training = report["held_out_tasks"]["loss"], report["training"]
    if loss["eft"] >= loss["large_tuned"]:
        return ""
    seen = {role: f"{training[role]['tokens'] / 1e6:.2f}M" for role in ("large_tuned", "small_tuned")}
    return f""" EFT is ahead of `large_tuned`,
which saw {seen["large_tuned"]} tokens against the {seen["small_tuned"]} of `small_tuned` and was probably
tuned too briefly to serve as the oracle. This run does not show how far EFT is from true tuning."""


def _card(report: dict[str, Any]) -> str:
    tasks, sampled = report["held_out_tasks"], report["sampled_acceptance"]
    gap, oracle_gap = tasks["eft_minus"]["small_tuned"], tasks["eft_minus"]["large_tuned"]
    packages = [
        [p["package"], p["version"], p["licence"], str(p["files"]), f"{p['bytes'] / 1e6:.2f}"]
        for p in report["packages"]
    ]
    total_bytes = sum(p["bytes"] for p in report["packages"]) / 1e6
    hardware = "one GPU" if report["device"] == "cuda" else f"{report['threads']} CPU cores"
    return f"""# Model card: the bundled demo trio

Three small language models of Python source, made so that `speculative-eft demo` and the tests run real
emulated fine-tuning without a network. They show a method; they are not a coding assistant.

{_models_table(report)}

All are `LlamaForCausalLM` with tied embeddings, two key/value heads of 64, a context of 2,048 positions
(trained on 512) and one byte-level BPE tokenizer of 4,096 ids whose `<|endoftext|>` is bos, eos and padding.
The shipped weights are bfloat16. Where a CPU has no fast bfloat16, load them with `dtype=torch.float32`.

## What they do

`small_tuned` answers

    # Task: <a sentence>
    # Name: <function>

with that function, then `<|endoftext|>`. `large_base` and `small_base` continue Python source. Emulated
fine-tuning samples from `log_softmax(L + F - B)`: `large_base` as it would answer had it been tuned.
`large_tuned` is what it emulates, trained for comparison only.

## Measured

Nats per token (lower is better), alpha = beta = 1: {report["held_out_files"]["tokens"]:,} tokens of files
that no model was trained on, and {tasks["tokens"]:,} tokens of {tasks["examples"]} functions from such
files (the function given its prompt).

{_loss_table(report)}

Per example EFT differs from `small_tuned` by {gap["mean"]:+.3f} ± {gap["standard_error"]:.3f} nats
per token and from `large_tuned` by {oracle_gap["mean"]:+.3f} ± {oracle_gap["standard_error"]:.3f}
(mean ± standard error).{_oracle_note(report)}

Expected acceptance of a token drafted by `small_tuned`, sum over the vocabulary of min(p, q), at
temperature 1: {sampled["per_token"]:.3f} along completions sampled from EFT for the {sampled["examples"]}
prompts of `prompts.jsonl` ({sampled["tokens"]:,} tokens), {tasks["acceptance"]["mean"]:.3f} ±
{tasks["acceptance"]["standard_error"]:.3f} along the held-out functions.

## How they were trained

On {hardware} shared with other work, Python {report["software"]["python"]}, torch
{report["software"]["torch"]}, by `python -P -m speculative_eft.models.demo.train`, whose defaults are the
settings used.

* Rows of 512 tokens of packed files, 12 rows a step; Muon (rate 0.02) for the matrices in the layers,
  AdamW (0.003) for embedding and norms; warm-up, constant, then linear decay over the last 35 %.
* `large_base` began with 2 layers and doubled to 4 and 8 at 20 % and 45 % of its time. Each new layer is a
  copy whose output projections are zero, so the function is unchanged; the shallow part sees more text.
* `small_base` learnt by cross-entropy for 30 % of its time, then by 0.2 cross-entropy + 0.8
  KL(`large_base` || `small_base`) at temperature 1; it was first stopped at 34 minutes and then resumed to
  45, so its rate fell to zero twice. As for the small Llama-3.2 and Gemma-2 models, imitating
  the larger model brings the pair closer, which is what acceptance depends on. It also means that
  `small_base` is not an independent model: expect less agreement between models of separate origin.
* `small_tuned` and `large_tuned` continue their bases on {report["task_examples"]["train"]:,} functions of
  training files with a docstring and 3 to 40 lines; prompts are not scored. The weights that did best on
  {report["task_examples"]["validation"]} held-out functions, other than those reported above, are kept.

## Data

{report["corpus_tokens"] / 1e6:.1f}M training tokens ({total_bytes:.1f} MB with the held-out files) of Python
source installed with the interpreter and the project's environment: no tests, tables, vendored, generated or
duplicate files, at most 3 MB a package (12 MB for the standard library), and only packages whose metadata
declare a permissive licence. A hash of the path holds out 2.5 % of the files; functions from files beyond a
package's cap add to the held-out tasks.

{table(["package", "version", "licence", "files", "MB"], packages)}

## Limits

The models have seen very little text: their functions are well formed more often than right, and names and
facts are invented. Sources are in English. Held-out files come from the same packages as the training files,
so the losses say little about other code. Do not run what they write without reading it.

## Licence

The weights are released under Apache-2.0, like the rest of the project. They were trained on source under
the permissive licences listed above; the models can repeat short passages of it.
"""
