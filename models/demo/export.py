"""Put the trained trio where the package looks for it: bfloat16 shards, with the tokenizer in each folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from .data import FastTokenizer, end_of

SHARD = "14MB"


def export_model(model: LlamaForCausalLM, tokenizer: FastTokenizer, folder: Path) -> None:
    """Replace `folder` by one that `AutoModelForCausalLM` and `AutoTokenizer` load on their own.

    The new folder is complete before the old one goes, so a reader never finds a mixture.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    stale = folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    end_id = end_of(tokenizer)
    ends = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    model.generation_config = GenerationConfig.from_dict(ends)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(fresh, max_shard_size=SHARD)
    tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
