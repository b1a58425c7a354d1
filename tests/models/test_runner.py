"""The runner against the plain model: ragged batches, blocks and roll-backs change no logit."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    MptConfig,
    PreTrainedModel,
)

from speculative_eft.models import ModelRunner
from speculative_eft.models.configs import logit_scale
from speculative_eft.models.llama import LlamaBody
from tests.device import skip_unless_compiled, test_device
from tests.models.families import COMPILED, CONTEXT, FAMILIES, tiny_model, with_uneven_norms
from tests.sync_guard import no_host_sync

VOCABULARY = 101
LENGTH = 30

# Logits here are a few units large and sums of a few dozen products a layer: a float32 error of some units
# in the last place of each partial sum stays below 2e-6, a wrong mask or position shows at 1e-2 and more.
TOLERANCE = 1e-5


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [rows, length, vocab] of each row alone, in one full pass."""
    with torch.inference_mode():
        return torch.cat([model(row[None], use_cache=False).logits for row in tokens])


def compare_ragged_blocks(runner: ModelRunner, tokens: Tensor, expected: Tensor, tolerance: float) -> None:
    """Blocks of random lengths, of which random parts stay, have logits `expected` [4, LENGTH, vocab]."""
    runner.reserve(4, LENGTH)
    prompts = torch.tensor([9, 0, 13, 2])
    runner.prefill(tokens[:, :13], prompts, chunk=5)
    choose = torch.Generator().manual_seed(1)
    lengths = prompts.tolist()
    compared = 0
    while min(lengths) < LENGTH:
        block = int(torch.randint(1, 7, (), generator=choose))
        fed = random_tokens(4, block, seed=compared + 1)
        kept = []
        for row, length in enumerate(lengths):
            right = min(int(torch.randint(0, block + 1, (), generator=choose)), LENGTH - length)
            fed[row, :right] = tokens[row, length : length + right]
            kept.append(right)
        logits = runner.forward(fed, max(lengths) + block)
        for row, (length, right) in enumerate(zip(lengths, kept, strict=True)):
            torch.testing.assert_close(
                logits[row, :right], expected[row, length : length + right], rtol=0, atol=tolerance
            )
            compared += right
        runner.lengths.add_(torch.tensor(kept))
        lengths = [length + right for length, right in zip(lengths, kept, strict=True)]
    assert compared == 4 * LENGTH - int(prompts.sum())


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_blocks_with_roll_backs_give_the_logits_of_a_full_pass(family: str) -> None:
    model, tokens = with_uneven_norms(tiny_model(family)), random_tokens(4, LENGTH)
    compare_ragged_blocks(ModelRunner(model), tokens, plain_logits(model, tokens), TOLERANCE)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_a_model_that_was_made_in_16_bits_keeps_its_scale(family: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = tiny_model(family)
    finally:
        torch.set_default_dtype(torch.float32)
    model, tokens = with_uneven_norms(model.float()), random_tokens(4, LENGTH)
    compare_ragged_blocks(ModelRunner(model), tokens, plain_logits(model, tokens), TOLERANCE)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("activation", ["relu", "xielu"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_activations_that_no_kernel_knows_are_the_layers_own(family: str, activation: str) -> None:
    """The second has weights, which differ from layer to layer."""
    config = copy.deepcopy(tiny_model(family).config)
    config.hidden_act = activation
    model = with_uneven_norms(AutoModelForCausalLM.from_config(config).eval().float())
    runner, tokens = ModelRunner(model), random_tokens(4, LENGTH)
    assert isinstance(runner._body, LlamaBody)
    compare_ragged_blocks(runner, tokens, plain_logits(model, tokens), TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_run_compiled(family: str) -> None:
    skip_unless_compiled(torch.float32)
    assert ModelRunner(tiny_model(family)).is_compiled == (family in COMPILED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_passes_of_16_bits_are_closer_than_the_models_own(family: str, dtype: torch.dtype) -> None:
    skip_unless_compiled(dtype)
    model, tokens = with_uneven_norms(tiny_model(family)).to(dtype), random_tokens(4, LENGTH)
    # Without any rounding but that of the weights.
    exact = plain_logits(copy.deepcopy(model).float(), tokens)
    own_error = plain_logits(model, tokens).float() - exact
    runner = ModelRunner(model)
    assert runner.is_compiled
    runner.reserve(4, LENGTH)
    logits = runner.forward(tokens, LENGTH)
    assert logits.dtype == torch.float32
    assert (logits - exact).square().mean() < 0.9 * own_error.square().mean()
    assert {stored.dtype for stored in runner.cache.storage()} == {dtype}
    # Between blocks all that may change are the last bits that a cache holds.
    compare_ragged_blocks(runner, tokens, logits, TOLERANCE)


@pytest.fixture
def several_threads() -> Iterator[int]:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    if test_device().type != "cpu":
        pytest.skip("models run elsewhere")
    before = torch.get_num_threads()
    # Some wait for others even where there are fewer cores.
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def with_wide_heads() -> PreTrainedModel:
    """Heads of several lines, and of 32 numbers more: a line of 16 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=200, num_hidden_layers=2, head_dim=96,
        num_attention_heads=3, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gemma3", "olmo2", "wide heads"])
def test_compiled_rows_do_not_depend_on_those_beside_them(
    family: str, dtype: torch.dtype, several_threads: int
) -> None:
    skip_unless_compiled(dtype)
    length = 150
    model = with_wide_heads() if family == "wide heads" else tiny_model(family, context=length)
    runner, tokens = ModelRunner(model.to(dtype)), random_tokens(2, length)
    assert runner.is_compiled
    runner.reserve(2, length)
    together = runner.forward(tokens, length)
    for row, expected in zip(tokens, together, strict=True):
        runner.reserve(1, length)
        # Of other lengths, and long enough for threads to share a sequence.
        for start, end in ((0, 130), (130, 131), (131, 132), (132, 137), (137, length)):
            assert torch.equal(runner.forward(row[None, start:end], length)[0], expected[start:end])
            runner.lengths.add_(end - start)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "olmo2"])
def test_threads_that_share_a_pass_give_its_logits(family: str, several_threads: int) -> None:
    model = tiny_model(family)
    tokens = random_tokens(3, LENGTH)
    expected = plain_logits(model, tokens)
    runner = ModelRunner(model)
    assert runner.is_compiled
    first: Tensor | None = None
    # Threads that did not wait for each other would show only now and then.
    for _ in range(100):
        runner.reserve(3, LENGTH)
        runner.prefill(tokens[:, :13], torch.full((3,), 13))
        logits = runner.forward(tokens[:, 13:20], 20)
        runner.lengths.add_(7)
        logits = torch.cat((logits, runner.forward(tokens[:, 20:21], 21)), 1)
        torch.testing.assert_close(logits, expected[:, 13:21], rtol=0, atol=TOLERANCE)
        first = logits if first is None else first
        assert torch.equal(logits, first)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "sdpa") for family in FAMILIES),
        *((family, "flash_attn") for family in ("llama", "gemma2", "falcon-alibi")),
    ],
)
def test_passes_read_nothing_from_the_device(
    family: str, attention: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    if attention == "flash_attn":
        request.getfixturevalue("flash_attn")
        # What flash-attn does is its own affair; of ours all but the Triton kernels runs here.
        monkeypatch.setattr(
            sys.modules["flash_attn"], "flash_attn_with_kvcache", lambda query, *rest, **named: query.clone()
        )
    runner = ModelRunner(tiny_model(family), attention=attention)
    tokens = random_tokens(3, 12)
    with no_host_sync():
        runner.reserve(3, LENGTH)
        runner.prefill(tokens, torch.tensor([12, 4, 7]), chunk=5)
        runner.forward(tokens[:, :1], 13)
        runner.lengths.add_(1)
        runner.forward(tokens[:, :6], 19)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_slots_and_padding_reach_nobody(family: str) -> None:
    model = tiny_model(family)
    tokens = random_tokens(2, 63)
    runner = ModelRunner(model)
    room = min(63, runner.max_context or 63)
    runner.reserve(2, 63)
    padded = tokens.index_fill(1, torch.arange(60, 63), 10**6)
    runner.prefill(padded, torch.tensor([room - 4, 5]), chunk=32)
    before = runner.forward(tokens[:, 5:9], 63)
    runner.lengths.copy_(torch.tensor([63, 9]))
    beyond = runner.forward(tokens[:, 9:15], 69)
    assert beyond.isfinite().all()
    runner.lengths.copy_(torch.tensor([room - 4, 5]))
    torch.testing.assert_close(runner.forward(tokens[:, 5:9], 63), before, rtol=0, atol=TOLERANCE)
    expected = plain_logits(model, tokens[1:, :15])[0, 9:15]
    torch.testing.assert_close(beyond[1], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "llama-dynamic-rope", "gpt2"])
def test_tokens_beyond_the_end_reach_nobody(family: str) -> None:
    """Neither what a full slot holds, nor by the length of the batch its neighbours."""
    model, tokens = tiny_model(family), random_tokens(2, CONTEXT)
    runner = ModelRunner(model)
    runner.reserve(2, CONTEXT)
    runner.prefill(tokens, torch.tensor([CONTEXT, 5]))
    before = [tensor[0, :, :CONTEXT].clone() for tensor in runner.cache.storage()]
    logits = runner.forward(tokens[:, 5:8], CONTEXT + 3)
    for tensor, held in zip(runner.cache.storage(), before, strict=True):
        assert torch.equal(tensor[0, :, :CONTEXT], held)
    expected = plain_logits(model, tokens[1:, :8])[0, 5:]
    torch.testing.assert_close(logits[1], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_ends_where_positions_do(family: str) -> None:
    """Or before, where the rotation would change by the length of a batch; alibi has no end."""
    limits = {"falcon-alibi": None, "phi3-longrope": 32}
    assert ModelRunner(tiny_model(family)).max_context == limits.get(family, CONTEXT)


@pytest.mark.parametrize("family", ["llama", "falcon-alibi", "gemma2", "gpt2"])
def test_the_cache_stays_where_it_is(family: str) -> None:
    runner = ModelRunner(tiny_model(family))
    runner.reserve(3, LENGTH)
    tokens = random_tokens(3, 8)
    runner.prefill(tokens, torch.tensor([8, 3, 5]))
    storage, lengths = runner.cache.storage(), runner.lengths
    addresses = [tensor.data_ptr() for tensor in storage]
    assert len(storage) == 4
    for block in (1, 4, 2):
        runner.forward(tokens[:, :block], 8 + block)
        runner.lengths.add_(block).sub_(1)
    assert runner.lengths is lengths
    runner.reserve(2, 20)
    runner.prefill(tokens[:2], torch.tensor([8, 3]))
    runner.forward(tokens[:2, :1], 9)
    assert [tensor.data_ptr() for tensor in runner.cache.storage()] == addresses
    assert runner.lengths.data_ptr() == lengths.data_ptr()
    assert runner.lengths.tolist() == [8, 3]


def addresses(part: Any, seen: set[int]) -> list[int]:
    """Where the tensors are that `part` holds, or what it holds of ours does."""
    if id(part) in seen:
        return []
    seen.add(id(part))
    if isinstance(part, Tensor):
        return [part.data_ptr()]
    if isinstance(part, dict | list | tuple):
        inside = part.values() if isinstance(part, dict) else part
    else:
        inside = vars(part).values() if type(part).__module__.startswith("speculative_eft") else ()
    return [address for each in inside for address in addresses(each, seen)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_read_stays_where_it_is_while_the_cache_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured passes know the addresses of weights, and of what is prepared for the cache."""
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    runner = ModelRunner(tiny_model(family))
    runner.reserve(4, LENGTH)
    runner.forward(random_tokens(4, 3), 3)
    before = addresses(runner._body, set())
    runner.reserve(3, LENGTH)
    runner.forward(random_tokens(3, 3), 3)
    assert addresses(runner._body, set()) == before


def test_an_earlier_batch_leaves_nothing_behind() -> None:
    runner = ModelRunner(tiny_model("llama"))
    tokens = random_tokens(2, 12)
    runner.reserve(2, 12)
    runner.prefill(tokens, torch.tensor([12, 12]))
    for tensor in runner.cache.storage():
        tensor.fill_(float("inf"))
    runner.reserve(2, 12)
    assert runner.forward(tokens[:, :3], 3).isfinite().all()


def test_prompts_may_be_empty() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(2, 6)
    runner = ModelRunner(model)
    runner.reserve(2, 6)
    runner.prefill(tokens[:, :0], torch.tensor([0, 0]))
    torch.testing.assert_close(runner.forward(tokens, 6), plain_logits(model, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon-alibi", "gpt2"])
def test_prefill_may_go_on_from_what_the_cache_holds(family: str) -> None:
    """Beyond 64 positions, the least that a pass looks at."""
    model, tokens = tiny_model(family, context=256), random_tokens(2, 122)
    begins, lengths = torch.tensor([70, 3]), torch.tensor([119, 50])
    runner = ModelRunner(model)
    runner.reserve(2, 122)
    runner.prefill(tokens[:, :70], begins)
    new = torch.stack([row[begin : begin + 49] for row, begin in zip(tokens, begins.tolist(), strict=True)])
    runner.prefill(new, lengths, chunk=20, begins=begins)
    assert torch.equal(runner.lengths, lengths)
    block = torch.stack((tokens[0, 119:122], tokens[1, 50:53]))
    expected = plain_logits(model, tokens)
    expected = torch.stack((expected[0, 119:122], expected[1, 50:53]))
    torch.testing.assert_close(runner.forward(block, 122), expected, rtol=0, atol=TOLERANCE)


def test_prefill_leaves_the_output_head_alone() -> None:
    model = tiny_model("gpt2")
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    runner = ModelRunner(model)
    runner.reserve(1, 8)
    runner.prefill(random_tokens(1, 8), torch.tensor([8]), chunk=3)
    assert not calls
    runner.forward(random_tokens(1, 1), 9)
    assert calls == [1]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_leaves_the_keys_and_values_of_a_whole_pass(family: str) -> None:
    tokens, runner = random_tokens(3, 12), ModelRunner(with_uneven_norms(tiny_model(family)))
    runner.reserve(3, 12)
    runner.forward(tokens, 12)
    wanted = [tensor.clone() for tensor in runner.cache.storage()]
    for tensor in runner.cache.storage():
        tensor.zero_()
    runner.prefill(tokens, torch.full((3,), 12))
    assert wanted
    for found, expected in zip(runner.cache.storage(), wanted, strict=True):
        assert torch.equal(found, expected)
        assert expected.any()


@pytest.mark.parametrize("family", ["gemma2", "falcon-alibi", "phi3-longrope", "mixtral"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = tiny_model(family)
    tokens = random_tokens(1, 10)
    settings, logits = model.config.to_dict(), plain_logits(model, tokens)
    implementation = model.config._attn_implementation
    runner = ModelRunner(model)
    runner.reserve(1, 10)
    runner.forward(tokens, 10)
    assert model.config.to_dict() == settings
    assert model.config._attn_implementation == implementation
    assert torch.equal(plain_logits(model, tokens), logits)


def test_modules_with_hooks_are_run_as_modules() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 6)
    plain = plain_logits(model, tokens)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0.5)
    runner = ModelRunner(model)
    runner.reserve(1, 6)
    logits = runner.forward(tokens, 6)
    torch.testing.assert_close(logits, plain_logits(model, tokens), rtol=0, atol=TOLERANCE)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_weights_changed_in_place_are_seen() -> None:
    model = tiny_model("qwen3")
    tokens = random_tokens(1, 6)
    runner = ModelRunner(model)
    runner.reserve(1, 6)
    runner.forward(tokens, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    runner.reserve(1, 6)
    torch.testing.assert_close(runner.forward(tokens, 6), plain_logits(model, tokens), rtol=0, atol=TOLERANCE)


def test_copies_of_eight_bits_step_over_the_models_own_cache() -> None:
    model = tiny_model("qwen2")
    tokens, runner = random_tokens(2, 9), ModelRunner(model)
    runner.reserve(2, 9)
    runner.prefill(tokens[:, :8], torch.tensor([8, 5]))
    block = torch.stack((tokens[0, 8:], tokens[1, 5:6]))
    expected = runner.forward(block, 9)
    assert runner.can_quantise
    found = runner.quantised().forward(block, 9)
    # A weight is off by half of a 127th of its row's largest at most.
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()
    torch.testing.assert_close(runner.forward(block, 9), expected, rtol=0, atol=TOLERANCE)
    runner.reserve(2, 40)
    runner.prefill(tokens[:, :8], torch.tensor([8, 5]))
    assert torch.equal(runner.quantised().forward(block, 9), found)
    assert not ModelRunner(tiny_model("gpt-neox")).can_quantise


def test_copies_of_eight_bits_follow_their_weights() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 5)
    runner = ModelRunner(model)
    runner.reserve(1, 6)
    copies = runner.quantised()
    before = copies.forward(tokens, 6)
    layer = model.model.layers[0]
    addresses = [linear.weight.numbers.data_ptr() for linear in (copies._body.layers[0].gate, copies._head)]
    with torch.no_grad():
        layer.mlp.gate_proj.weight.mul_(-1)
        model.lm_head.weight.mul_(2)
    runner.reserve(1, 6)
    found = copies.forward(tokens, 6)
    assert (found - 2 * before).abs().max() > 1e-3
    assert (found - runner.forward(tokens, 6)).abs().max() < 0.02 * found.abs().max()
    # Where graphs and bound calls know them.
    assert addresses == [
        linear.weight.numbers.data_ptr() for linear in (copies._body.layers[0].gate, copies._head)
    ]


def test_an_untested_architecture_that_agrees_with_itself_is_accepted() -> None:
    config = CohereConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.3,
    )
    torch.manual_seed(0)
    model = CohereForCausalLM(config)
    tokens = random_tokens(1, 9)
    runner = ModelRunner(model)
    runner.reserve(1, 9)
    torch.testing.assert_close(runner.forward(tokens, 9), plain_logits(model, tokens), rtol=0, atol=TOLERANCE)


def test_a_model_is_compared_with_itself_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs Triton launches on the current one, which need not be the model's."""
    current: list[torch.device] = []
    compared: list[list[torch.device]] = []

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr("speculative_eft.models.runner.on_device", on_device)
    monkeypatch.setattr(ModelRunner, "reserve", lambda *arguments: compared.append([*current]))
    with pytest.raises(ValueError, match="cannot be run with one length"):
        ModelRunner(BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)))
    assert compared == [[torch.device("cpu")]]


def test_an_architecture_that_does_not_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM cannot be run with one length for each sequence"):
        ModelRunner(model)


def test_an_architecture_whose_window_is_another_is_refused() -> None:
    """Its own mask counts from the end of the cache, which shows only in sequences beyond the window."""
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512,
            attention_types=[[["global", "local"], 1]], window_size=100,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    with pytest.raises(ValueError, match="GPTNeoForCausalLM cannot be run with one length for each sequence"):
        ModelRunner(model)


def test_a_model_whose_layers_cannot_be_found_is_refused() -> None:
    config = ModernBertDecoderConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=0, eos_token_id=1, cls_token_id=0, sep_token_id=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM cannot be run: its get_decoder"):
        ModelRunner(ModernBertDecoderForCausalLM(config))


def test_a_factor_that_is_none_counts_as_one() -> None:
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=64)
    assert config.logit_scale is None
    assert logit_scale(config) == 1.0


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_settings_that_a_family_does_not_know_change_nothing(family: str, tmp_path: Path) -> None:
    """transformers keeps any key of a config.json; the model reads none of these."""
    tiny_model(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    strange: dict[str, Any] = {
        "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.3,
        "logits_scaling": 4.0, "final_logit_softcapping": 0.5,
    }  # fmt: skip
    if family == "gpt-neox":
        strange["num_key_value_heads"] = 1
    path.write_text(json.dumps(json.loads(path.read_text()) | strange))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.logit_scale == 0.3
    tokens = random_tokens(2, 12)
    runner = ModelRunner(model)
    runner.reserve(2, 12)
    torch.testing.assert_close(
        runner.forward(tokens, 12), plain_logits(model, tokens), rtol=0, atol=TOLERANCE
    )


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention must be one of 'auto', 'sdpa', .* not 'flash'"):
        ModelRunner(tiny_model("llama"), attention="flash")


@pytest.mark.parametrize("change", ["dtype", "layout", "shape"])
def test_weights_that_compiled_functions_would_misread_are_refused(change: str) -> None:
    skip_unless_compiled(torch.float32)
    model = tiny_model("llama")
    runner = ModelRunner(model)
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.weight.detach()
    changed = {
        "dtype": lambda: weight.to(torch.bfloat16),
        "layout": lambda: weight.t().contiguous().t(),
        "shape": lambda: weight[:-1].clone(),
    }[change]()
    runner.reserve(1, 8)
    layer.weight = torch.nn.Parameter(changed)
    with pytest.raises(ValueError, match="another dtype, shape or layout"):
        runner.reserve(1, 8)
