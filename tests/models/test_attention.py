"""Attention by the Triton kernel and by flash-attn: the logits of the plain model, and when it is refused."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from speculative_eft.models import EFTModels, ModelRunner
from speculative_eft.models import attention as attention_module
from tests.models.families import FAMILIES, tiny_model, with_uneven_norms

from .test_runner import LENGTH, TOLERANCE, plain_logits, random_tokens

OWN_ATTENTION = ("falcon-multi-query", "falcon-new-decoder")
"""Families that ask transformers for no attention function."""


def placed_model(family: str) -> PreTrainedModel:
    return with_uneven_norms(tiny_model(family)).to(random_tokens(1, 1).device)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_ATTENTION])
def test_ragged_blocks_give_the_logits_of_a_full_pass(
    family: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = placed_model(family)
    implementation = model.config._attn_implementation
    tokens = random_tokens(3, LENGTH)
    expected = plain_logits(model, tokens)
    runner = ModelRunner(model, attention=chosen)
    assert runner.attention == chosen
    masks = []
    for name in ("bodies", "llama"):
        monkeypatch.setattr(
            f"speculative_eft.models.{name}.ragged_bias",
            lambda *arguments, bias=attention_module.ragged_bias: masks.append(1) or bias(*arguments),
        )
    runner.reserve(3, LENGTH)
    runner.prefill(tokens[:, :19], torch.tensor([0, 19, 8]), chunk=18)
    assert bool(masks) == (chosen == "triton")
    masks.clear()
    lengths = [0, 19, 8]
    for block, kept in ((6, 5), (1, 1)):
        fed = torch.stack([row[length : length + block] for row, length in zip(tokens, lengths, strict=True)])
        logits = runner.forward(fed, max(lengths) + block)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                logits[row], expected[row, length : length + block], rtol=0, atol=TOLERANCE
            )
        runner.lengths.add_(kept)
        lengths = [length + kept for length in lengths]
    assert not masks
    assert model.config._attn_implementation == implementation
    assert torch.equal(plain_logits(model, tokens), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon-alibi"])
def test_full_slots_reach_nobody(family: str, chosen: str) -> None:
    model = placed_model(family)
    tokens = random_tokens(2, 63)
    expected = plain_logits(model, tokens)
    runner = ModelRunner(model, attention=chosen)
    runner.reserve(2, 63)
    runner.prefill(tokens, torch.tensor([63, 63]), chunk=32)
    runner.lengths.copy_(torch.tensor([61, 9]))
    # The first sequence has room for two of these tokens.
    fed = torch.cat((tokens[:, 61:63], random_tokens(2, 4)), dim=1)
    fed[1] = tokens[1, 9:15]
    logits = runner.forward(fed, 67)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0, :2], expected[0, 61:63], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits[1], expected[1, 9:15], rtol=0, atol=TOLERANCE)
    storage = [tensor.data_ptr() for tensor in runner.cache.storage()]
    runner.reserve(1, 40)
    runner.forward(tokens[:1, :2], 2)
    assert [tensor.data_ptr() for tensor in runner.cache.storage()] == storage


@pytest.mark.parametrize("chosen", ["sdpa", "triton", "flash_attn"], indirect=True)
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "granite", "olmo3", "phi3", "falcon-alibi", "gpt-neox"]
)
def test_half_precision_is_as_close_as_the_model_itself(family: str, chosen: str) -> None:
    tokens = random_tokens(2, 12)
    exact = plain_logits(placed_model(family), tokens)
    model = placed_model(family).to(torch.bfloat16)
    runner = ModelRunner(model, attention=chosen)
    runner.reserve(2, 12)
    runner.prefill(tokens[:, :5], torch.tensor([5, 5]))
    logits = runner.forward(tokens[:, 5:], 12)
    assert logits.dtype == (torch.float32 if runner.is_compiled else torch.bfloat16)
    error = (logits.float() - exact[:, 5:]).abs().mean()
    plain_error = (plain_logits(model, tokens)[:, 5:].float() - exact[:, 5:]).abs().mean()
    assert error < 1.5 * plain_error


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(vocab_size=101, hidden_size=32, num_attention_heads=4))


def test_auto_is_sdpa_on_a_processor() -> None:
    assert ModelRunner(tiny_model("llama")).attention == "sdpa"
    assert ModelRunner(cohere()).attention == "sdpa"


def test_auto_is_triton_on_a_gpu_for_known_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.config.head_dim = 128
    cuda = property(lambda self: torch.device("cuda"))
    monkeypatch.setattr(type(model), "device", cuda)
    monkeypatch.setattr(attention_module, "backend", lambda device: "triton")
    assert attention_module.choose_attention("auto", model) == "triton"
    model.config.head_dim = 160
    assert attention_module.choose_attention("auto", model) == "sdpa"
    model.config.head_dim = 128
    model.config.model_type = "cohere"
    assert attention_module.choose_attention("auto", model) == "sdpa"
    model.config.model_type = "llama"
    monkeypatch.setattr(attention_module, "backend", lambda device: "torch")
    assert attention_module.choose_attention("auto", model) == "sdpa"


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("SPECULATIVE_EFT_BACKEND", raising=False)
    with pytest.raises(
        ValueError, match=r"attention='triton' cannot run LlamaForCausalLM: .* a GPU, not on cpu"
    ):
        ModelRunner(tiny_model("llama"), attention="triton")


@pytest.mark.parametrize(
    ("family", "reason"),
    [("falcon-multi-query", "have an attention of their own"), ("cohere", "not tested with cohere models")],
)
def test_models_that_only_sdpa_can_run_are_refused(family: str, reason: str, chosen: str) -> None:
    model = cohere() if family == "cohere" else tiny_model(family)
    with pytest.raises(ValueError, match=f"attention='{chosen}' cannot run .*: .*{reason}"):
        ModelRunner(model, attention=chosen)


def test_flash_attn_must_be_installed() -> None:
    with pytest.raises(ValueError, match=r"not installed \(pip install .* '\.\[flash\]' in the checkout"):
        ModelRunner(tiny_model("llama").to(torch.bfloat16), attention="flash_attn")


@pytest.mark.usefixtures("flash_attn")
def test_what_flash_attn_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="takes float16 or bfloat16, not float32"):
        ModelRunner(model, attention="flash_attn")
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer, not cpu"):
        ModelRunner(model, attention="flash_attn")
    model.config.head_dim = 12
    with pytest.raises(ValueError, match="heads of a multiple of 8 numbers, not 12"):
        ModelRunner(model, attention="flash_attn")
    model.config.head_dim = 512
    with pytest.raises(ValueError, match="heads of 512 numbers are larger than 256"):
        ModelRunner(model, attention="flash_attn")


@pytest.mark.usefixtures("flash_attn")
def test_all_models_of_a_trio_are_run_alike() -> None:
    trio = [tiny_model("llama", seed) for seed in range(3)]
    runners = EFTModels(*trio, attention="flash_attn").runners()
    assert {runner.attention for runner in (runners.large, *runners.tuned, runners.base)} == {"flash_attn"}
    with pytest.raises(ValueError, match="attention must be one of 'auto', 'sdpa', 'triton', 'flash_attn'"):
        EFTModels(*trio, attention="flash").runners()
