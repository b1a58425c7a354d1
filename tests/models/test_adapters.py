"""LoRA adapters as tuned models: one copy of the weights, each model's own logits, nothing left behind."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculative_eft.bench.baselines import TransformersLoop
from speculative_eft.cli import main
from speculative_eft.decoding import EFTConfig, EFTDecoder, NaiveEFTDecoder
from speculative_eft.kernels import backend
from speculative_eft.models import (
    EFTModels,
    IncompatibleModelsError,
    ModelRunner,
    UnavailableModelsError,
    inspect_trio,
)
from speculative_eft.models import adapters as adapters_module
from speculative_eft.models.llama import LlamaBody

from ..device import skip_unless_compiled
from .families import tiny_model
from .test_eft_models import save

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = [
    # peft asks transformers for a property by its old name, and warns of what the tests do on purpose.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36, 37, 38]])
LENGTHS = torch.tensor([5, 2])
PLAIN: dict[str, Any] = {"target_modules": "all-linear"}


def with_adapter(base: Any, seed: int, name: str = "default", **settings: Any) -> Any:
    """`base` under a LoRA whose random weights matter."""
    config = peft.LoraConfig(r=5, lora_alpha=10, task_type="CAUSAL_LM", **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(base, peft.PeftModel):
            base.add_adapter(name, config)
            tuned = base
        else:
            tuned = peft.get_peft_model(base, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if f".{name}" in parameter_name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return tuned.eval()


def logits_of(runner: ModelRunner, start: bool) -> Tensor:
    """Two tokens more in each sequence, after a ragged prefill at the `start`."""
    if start:
        runner.reserve(2, 9)
        runner.prefill(PROMPTS[:, :5], LENGTHS)
    tokens = PROMPTS.gather(1, runner.lengths[:, None] + torch.arange(2))
    logits = runner.forward(tokens, int(runner.lengths.max()) + 2)
    runner.lengths.add_(2)
    return logits


@torch.no_grad()
def own_logits(model: Any, step: int) -> Tensor:
    """The same from the model's plain forward pass."""
    logits = model(PROMPTS).logits
    return torch.stack([row[n + 2 * step : n + 2 * step + 2] for row, n in zip(logits, LENGTHS, strict=True)])


# Whether the tuned model, and its base, take the short way of models like Llama.
CASES: list[tuple[str, dict[str, Any], tuple[bool, bool]]] = [
    ("llama", PLAIN, (True, True)),
    ("qwen2", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}, (True, True)),
    ("qwen3", {"target_modules": ["q_proj", "up_proj", "lm_head"], "lora_bias": True}, (True, True)),
    ("llama", {**PLAIN, "lora_dropout": 0.5}, (True, True)),
    ("llama", {**PLAIN, "use_dora": True}, (False, True)),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, (False, False)),
    ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, (True, True)),
    ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["norm"]}, (False, False)),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, (False, False)),
    ("gemma2", PLAIN, (True, True)),
    ("olmo2", PLAIN, (True, True)),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "lora_bias": True}, (True, True)),
    ("falcon-alibi", PLAIN, (False, False)),
]


@pytest.mark.parametrize(("family", "settings", "short_ways"), CASES)
def test_each_has_its_own_logits(
    family: str, settings: dict[str, Any], short_ways: tuple[bool, bool]
) -> None:
    base = tiny_model(family, 1)
    tuned = with_adapter(base, 2, **settings)
    runners = EFTModels(tiny_model("llama"), tuned, base).runners()
    both: list[Any] = [runners.tuned[0], runners.base]
    assert tuple(isinstance(runner._body, LlamaBody) for runner in both) == short_ways
    if backend(both[0].device) == "numba":
        saved_head = "lm_head" in settings.get("modules_to_save", ())
        compiled = [runner._compiled is not None for runner in both]
        assert compiled == [short_ways[0] and not saved_head, short_ways[1] and not saved_head]
    for step in range(2):
        mine, plain = logits_of(runners.tuned[0], step == 0), logits_of(runners.base, step == 0)
        with tuned.disable_adapter():
            unadapted = own_logits(tuned, step)
        adapted = own_logits(tuned, step)
        assert (adapted - unadapted).abs().mean() > 0.05
        torch.testing.assert_close(mine, adapted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(plain, unadapted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", PLAIN), ("qwen3", {"target_modules": ["q_proj", "up_proj", "o_proj"], "lora_bias": True}),
])  # fmt: skip
def test_fused_layers_add_what_adapters_add(
    family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")
    base = tiny_model(family, 1)
    tuned = with_adapter(base, 2, **settings)
    runner: Any = ModelRunner(base, attention="triton", adapters=["default"])
    for step in range(2):
        mine, adapted = logits_of(runner, step == 0), own_logits(tuned, step)
        assert runner._body.is_fusable
        torch.testing.assert_close(mine, adapted, atol=2e-5, rtol=1e-4)
    # Sums of a wider adapter are kept in its dtype until the end.
    base.model.layers[0].self_attn.q_proj.lora_A.to(torch.float64)
    runner.reserve(2, 9)
    assert not runner._body.is_fusable


@pytest.mark.parametrize("target", ["embed_tokens", "q_proj", "lm_head"])
def test_a_plain_model_keeps_the_adapters_it_has_on(target: str) -> None:
    base = tiny_model("llama", 1)
    tuned = with_adapter(base, 2, target_modules=[target])
    runner = ModelRunner(base)
    torch.testing.assert_close(logits_of(runner, True), own_logits(tuned, 0), atol=2e-5, rtol=1e-4)


def test_sums_of_a_wider_adapter_round_as_in_peft() -> None:
    base = tiny_model("llama", 1).to(torch.bfloat16)
    tuned = with_adapter(base, 2, **PLAIN)
    assert base.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    runners: Any = EFTModels(tiny_model("llama"), tuned, base).runners()
    layer = base.model.layers[0].mlp.up_proj
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for runner in (runners.tuned[0], runners.base):
        logits_of(runner, True)
    with torch.no_grad():
        assert torch.equal(runners.tuned[0]._body.layers[0].up(inputs), layer(inputs))
        assert torch.equal(runners.base._body.layers[0].up(inputs), layer.base_layer(inputs))


@pytest.mark.parametrize("narrow", [False, True])
def test_compiled_models_of_16_bits_add_what_adapters_of_any_width_add(narrow: bool) -> None:
    skip_unless_compiled(torch.bfloat16)
    base = tiny_model("qwen3", 1).to(torch.bfloat16)
    settings = {"target_modules": ["q_proj", "up_proj", "lm_head"], "lora_bias": True}
    tuned = with_adapter(base, 2, **settings)
    if narrow:
        tuned.to(torch.bfloat16)
    runners: Any = EFTModels(tiny_model("llama"), tuned, base).runners()
    both = [runners.tuned[0], runners.base]
    assert all(runner.is_compiled for runner in both)
    exact = copy.deepcopy(tuned).float()
    for step in range(2):
        mine, plain = (logits_of(runner, step == 0) for runner in both)
        adapted = own_logits(exact, step)
        with exact.disable_adapter():
            unadapted = own_logits(exact, step)
        scale = adapted.abs().mean()
        assert (adapted - unadapted).abs().mean() > 0.05 * scale
        for found, wanted in ((mine, adapted), (plain, unadapted)):
            assert (found - wanted).square().mean().sqrt() < 0.015 * scale


@pytest.mark.parametrize("config", [
    EFTConfig(draft_tokens=3), EFTConfig(draft_tokens=2, acceptance="shared_seed", draft="pair", alpha=0.5)
])  # fmt: skip
@pytest.mark.parametrize(("family", "settings"), [("llama", PLAIN), ("llama", {**PLAIN, "use_dora": True})])
def test_decoding_is_that_of_a_merged_copy(family: str, settings: dict[str, Any], config: EFTConfig) -> None:
    large, base = tiny_model("llama", 0), tiny_model(family, 1)
    merged = copy.deepcopy(with_adapter(copy.deepcopy(base), 2, **settings)).merge_and_unload()
    wanted_models = EFTModels(large, merged, copy.deepcopy(base))
    models = EFTModels(large, with_adapter(base, 2, **settings))
    sampled = config.acceptance == "shared_seed"
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": sampled, "seed": 3, "eos_token_id": []}
    if sampled:
        options["top_k"] = 0
    prompts = {"input_ids": PROMPTS, "attention_mask": (torch.arange(9) >= torch.tensor([[0], [4]])).long()}
    wanted = EFTDecoder(wanted_models, config).generate(**prompts, **options)
    assert torch.equal(EFTDecoder(models, config).generate(**prompts, **options), wanted)
    assert torch.equal(NaiveEFTDecoder(models, config).generate(**prompts, **options), wanted)
    plain = EFTModels(large, wanted_models.small_base, wanted_models.small_base)
    assert not torch.equal(EFTDecoder(plain, config).generate(**prompts, **options), wanted)


def test_weights_are_there_once() -> None:
    base = tiny_model("llama", 1)
    before = {id(parameter) for parameter in base.parameters()}
    plain = sum(parameter.numel() for parameter in base.parameters())
    tuned = with_adapter(base, 2, **PLAIN)
    both = sum(parameter.numel() for parameter in tuned.parameters())
    models = EFTModels(tiny_model("llama"), tuned)
    assert models.small_base is base and models.small_tuned == [tuned]
    assert before <= {id(parameter) for parameter in models.small_base.parameters()}
    runners: Any = models.runners()
    logits_of(runners.tuned[0], True)
    logits_of(runners.base, True)
    for mine, other in zip(runners.tuned[0]._body.layers, runners.base._body.layers, strict=True):
        assert mine.up.weight.data_ptr() == other.up.weight.data_ptr()
        assert mine.up.low_ranks and not other.up.low_ranks
    assert runners.tuned[0].cache.storage()[0].data_ptr() != runners.base.cache.storage()[0].data_ptr()
    _, tuned_row, base_row = models.describe()
    assert (base_row.parameters, tuned_row.parameters) == (plain, both - plain)
    assert base_row.bytes + tuned_row.bytes == 4 * both
    apart = EFTModels(tiny_model("llama"), tuned, tiny_model("llama", 1))
    assert [row.parameters for row in apart.describe()[1:]] == [both, plain]


def state_of(tuned: Any) -> list[Any]:
    flags = [
        (name, module._disable_adapters, list(module.active_adapters))
        for name, module in tuned.named_modules()
        if hasattr(module, "_disable_adapters")
    ]
    wants_gradient = [parameter.requires_grad for parameter in tuned.parameters()]
    return [flags, wants_gradient, tuned.get_base_model().config._attn_implementation]


@pytest.mark.parametrize("settings", [PLAIN, {**PLAIN, "use_dora": True}])
def test_the_model_stays_as_it_was(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = with_adapter(tiny_model("llama", 1), 2, **settings)
    with_adapter(tuned, 3, "second", **settings)
    models = EFTModels(tiny_model("llama"), tuned)
    tuned.set_adapter("second")  # not what the runner has, nor what it should touch
    state, weights = state_of(tuned), {k: v.clone() for k, v in tuned.state_dict().items()}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    output = EFTDecoder(models).generate(PROMPTS, **options)
    assert state_of(tuned) == state
    for key, weight in tuned.state_dict().items():
        assert torch.equal(weight, weights[key])
    tuned.base_model.disable_adapter_layers()
    state = state_of(tuned)
    assert torch.equal(EFTDecoder(models).generate(PROMPTS, **options), output)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more memory")

    norm = tuned.get_base_model().model.norm
    monkeypatch.setattr(norm, "forward", fail)
    runners = EFTModels(tiny_model("llama"), (tuned, "second")).runners()
    for runner in (runners.tuned[0], runners.base):
        with pytest.raises(RuntimeError, match="no more memory"):
            logits_of(runner, True)
        assert state_of(tuned) == state


@pytest.mark.parametrize("settings", [PLAIN, {**PLAIN, "use_dora": True}])
def test_several_adapters_of_one_base(settings: dict[str, Any]) -> None:
    tuned = with_adapter(tiny_model("llama", 1), 2, "first", **settings)
    with_adapter(tuned, 3, "second", **settings)
    models = EFTModels(tiny_model("llama"), [(tuned, "second"), (tuned, "first"), tuned])
    rows = [logits_of(runner, True) for runner in models.runners().tuned]
    for name, row in zip(("second", "first", "first"), rows, strict=True):
        tuned.set_adapter(name)
        torch.testing.assert_close(row, own_logits(tuned, 0), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(rows[0], rows[1], atol=0.1)
    _, second, first, again, base = models.describe()
    assert second.parameters == first.parameters > 0 and again.parameters == 0
    assert base.parameters + 2 * first.parameters == sum(p.numel() for p in tuned.parameters())
    assert EFTModels(large_base=tiny_model("llama"), small_tuned=(tuned, "second")).small_tuned == [tuned]
    tuned.base_model.set_adapter(["first", "second"])
    together = EFTModels(tiny_model("llama"), tuned).runners().tuned[0]
    torch.testing.assert_close(logits_of(together, True), own_logits(tuned, 0), atol=2e-5, rtol=1e-4)


def adapters_of_one_base(second: list[str], **options: Any) -> tuple[Any, list[Any]]:
    """Runners of two adapters and their base, whose caches hold different numbers of tokens."""
    tuned = with_adapter(tiny_model("qwen3", 1), 2, "first", **PLAIN)
    with_adapter(tuned, 3, "second", target_modules=second, lora_bias=True)
    runners = EFTModels(tiny_model("llama"), [(tuned, "second"), (tuned, "first")], **options).runners()
    both: list[Any] = runners.small
    for index, runner in enumerate(both):
        runner.reserve(2, 9)
        runner.prefill(PROMPTS[:, : 5 - index], LENGTHS - (LENGTHS > 2) * index)
    return tuned, both


@pytest.fixture
def together() -> Any:
    tuned, runners = adapters_of_one_base(["k_proj", "lm_head"])
    if backend(runners[0].device) != "numba":
        pytest.skip("only passes that Numba compiles read weights once for several models")
    return tuned, runners


@pytest.mark.parametrize("rows", [1, 3])
def test_fused_layers_read_shared_weights_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "triton")
    _, runners = adapters_of_one_base(["k_proj", "down_proj"], attention="triton")
    block = PROMPTS[:, 5 : 5 + rows]
    alone = [runner.forward(block, 9) for runner in runners]
    stores = [[stored.clone() for stored in runner.cache.storage()] for runner in runners]
    for runner in runners:
        for stored in runner.cache.storage():
            for row, start in enumerate(runner.lengths.tolist()):
                stored[row, :, start : start + rows] = 0
    found = runners[0].forward_together(runners[1:], block, 9)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().mean() > 0.05
    for runner, wanted in zip(runners, stores, strict=True):
        for stored, before in zip(runner.cache.storage(), wanted, strict=True):
            torch.testing.assert_close(stored, before, atol=1e-5, rtol=1e-5)
    # One with a cache of another size, an adapter on its head, of another base, or without fused layers runs
    # alone.
    runners[1].reserve(2, 100)
    assert runners[0].forward_together(runners[1:], block, 9) is None
    _, others = adapters_of_one_base(["k_proj", "lm_head"], attention="triton")
    assert others[0].forward_together(others[1:], block, 9) is None
    assert runners[0].forward_together([others[2]], block, 9) is None
    _, plain = adapters_of_one_base(["k_proj"], attention="sdpa")
    assert plain[0].forward_together(plain[1:], block, 9) is None


@pytest.mark.parametrize("counts", [[3, 3], [2, 3], [0, 1]])
def test_models_that_share_weights_take_steps_together(together: Any, counts: list[int]) -> None:
    _, runners = together
    block, taken = PROMPTS[:, 5:8].contiguous(), torch.tensor(counts)
    rooms = [[torch.zeros(2, 3, runner.vocab_size) for runner in runners] for _ in range(2)]
    for runner, logits in zip(runners, rooms[0], strict=True):
        runner.bind(block, taken, logits)()
    alone = [[stored.clone() for stored in runner.cache.storage()] for runner in runners]
    for runner in runners:
        for stored in runner.cache.storage():
            # What the passes above wrote.
            for row, (start, count) in enumerate(zip(runner.lengths.tolist(), counts, strict=True)):
                stored[row, :, start : start + count] = 0
    call = runners[0].bind_together(runners[1:], block, taken, rooms[1])
    assert call is not None
    call()
    for one, other in zip(*rooms, strict=True):
        for row, count in enumerate(counts):
            assert torch.equal(one[row, :count], other[row, :count])
            assert count == 0 or one[row, :count].abs().mean() > 0
    assert not torch.equal(rooms[0][0], rooms[0][1])
    for runner, stores in zip(runners, alone, strict=True):
        assert all(map(torch.equal, runner.cache.storage(), stores))


def test_steps_together_see_changed_adapters(together: Any) -> None:
    tuned, runners = together
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".second" in name:
                parameter.mul_(1.5)
    tuned.set_adapter("second")
    torch.testing.assert_close(logits_of(runners[0], True), own_logits(tuned, 0), atol=2e-5, rtol=1e-4)


def test_only_models_of_one_base_and_room_take_steps_together(together: Any) -> None:
    _, (first, second, base) = together
    block, taken = PROMPTS[:, 5:6].contiguous(), torch.ones(2, dtype=torch.int64)

    def shared(*runners: Any) -> bool:
        logits = [torch.zeros(2, 1, runner.vocab_size) for runner in runners]
        return runners[0].bind_together(runners[1:], block, taken, logits) is not None

    assert shared(first, second, base) and shared(base, first)
    other = ModelRunner(tiny_model("qwen3", 1))
    other.reserve(2, 9)
    assert not shared(base, other) and not shared(first, base, other)
    second.reserve(2, 200)
    assert not shared(first, second) and shared(first, base)


def test_pairs_and_plain_steps_read_shared_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    models = EFTModels(tiny_model("llama"), with_adapter(tiny_model("llama", 1), 2, **PLAIN))
    runners: Any = models.runners()
    if backend(runners.large.device) != "numba":
        pytest.skip("only passes that Numba compiles read weights once for several models")
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": []}
    calls: list[int] = []
    kind = type(runners.base._compiled)
    bind_together = kind.bind_together

    def counted(*arguments: Any) -> Any:
        call = bind_together(*arguments)
        return lambda: (calls.append(1), call())

    monkeypatch.setattr(kind, "bind_together", staticmethod(counted))
    for decoder, most in (
        (NaiveEFTDecoder(models), 8),
        (EFTDecoder(models, EFTConfig(draft="pair", draft_tokens=3)), 32),
        # In rounds that draft nothing, as the last one may.
        (EFTDecoder(models, EFTConfig(draft_tokens=3)), 1),
    ):
        calls.clear()
        decoder.generate(PROMPTS, **options)
        assert 0 < len(calls) <= most


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_is_merged_later_is_refused(family: str) -> None:
    gpt2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    settings: dict[str, Any] = PLAIN if family == "llama" else gpt2
    base = tiny_model(family, 2)
    tuned = with_adapter(base, 3, **settings)
    decoder = EFTDecoder(EFTModels(tiny_model(family, 0), tuned, base), EFTConfig(draft_tokens=2))
    wanted = decoder.generate(PROMPTS, max_new_tokens=6)
    tuned.merge_adapter()
    with pytest.raises(IncompatibleModelsError, match="default was merged into its base"):
        decoder.generate(PROMPTS, max_new_tokens=6)
    tuned.unmerge_adapter()
    assert torch.equal(decoder.generate(PROMPTS, max_new_tokens=6), wanted)


def test_threads_that_share_modules_take_turns() -> None:
    base = tiny_model("gpt2", 2)
    tuned = with_adapter(base, 3, target_modules=["c_attn"], fan_in_fan_out=True)
    before = state_of(tuned)
    decoders = [
        EFTDecoder(EFTModels(tiny_model("gpt2", 0), tuned, base), EFTConfig(draft_tokens=2)) for _ in range(3)
    ]
    wanted = decoders[0].generate(PROMPTS, max_new_tokens=12)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda index: decoders[index % 3].generate(PROMPTS, max_new_tokens=12), range(9))
    assert all(torch.equal(tokens, wanted) for tokens in found)
    assert state_of(tuned) == before


def test_a_plain_loop_runs_each_in_its_role() -> None:
    large, tuned = tiny_model("llama", 0), with_adapter(tiny_model("llama", 1), 2, **PLAIN)
    models = EFTModels(large, tuned)
    wanted = NaiveEFTDecoder(models).generate(PROMPTS, max_new_tokens=12, do_sample=False, eos_token_id=[])
    assert torch.equal(TransformersLoop(models).generate(PROMPTS, max_new_tokens=12), wanted)


def test_a_large_base_that_is_the_adapted_model_runs_without_its_adapter() -> None:
    base, plain = tiny_model("llama", 1), tiny_model("llama", 1)
    runners = EFTModels(base, with_adapter(base, 2, **PLAIN), base).runners()
    torch.testing.assert_close(logits_of(runners.large, True), own_logits(plain, 0), atol=2e-5, rtol=1e-4)


def prefix_tuned(base: Any) -> Any:
    return peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def merged_in_place(base: Any) -> Any:
    tuned = with_adapter(base, 2, **PLAIN)
    tuned.merge_adapter()
    return tuned


def switched_off(base: Any) -> Any:
    tuned = with_adapter(base, 2, **PLAIN)
    tuned.base_model.disable_adapter_layers()
    return tuned


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (prefix_tuned, "small_tuned: its adapter 'default' is of type PREFIX_TUNING; only LoRA"),
        (
            lambda base: peft.get_peft_model(
                base,
                peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            ),
            "is of type IA3; only LoRA",
        ),
        (lambda base: with_adapter(base, 2, **PLAIN, alora_invocation_tokens=[5]), "is an activated LoRA"),
        (lambda base: with_adapter(base, 2, **PLAIN, bias="all"), r"changes the base itself \(bias='all'\)"),
        (
            lambda base: with_adapter(base, 2, **PLAIN, init_lora_weights="pissa"),
            r"changes the base itself \(init_lora_weights='pissa'\)",
        ),
        (merged_in_place, "small_tuned has adapters merged into its weights"),
        (switched_off, "small_tuned has its adapters switched off"),
        (
            lambda base: (with_adapter(base, 2, **PLAIN), "polite"),
            "has no adapter 'polite'; it has 'default'",
        ),
        (lambda base: (base, "polite"), "an adapter's name must come with a peft.PeftModel, not LlamaFor"),
        (lambda base: base, "small_base must be given, unless"),
    ],
)
def test_what_cannot_be_a_tuned_model_is_refused(make: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(IncompatibleModelsError, match=reason) as caught:
        EFTModels(tiny_model("llama"), make(tiny_model("llama", 1)))
    assert "\n" not in str(caught.value)


def test_a_base_must_be_a_plain_model() -> None:
    base = tiny_model("llama", 1)
    tuned = with_adapter(base, 2, **PLAIN)
    with pytest.raises(IncompatibleModelsError, match="small_base must be a transformers causal language"):
        EFTModels(tiny_model("llama"), tuned, tuned)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Large base, adapter and small base on disk; the adapter names a base that is nowhere."""
    large = save(tmp_path / "large", tiny_model("llama", 0, vocab_size=128))
    base = save(tmp_path / "base", tiny_model("llama", 1))
    return large, saved_adapter(tmp_path / "adapter", 2), base


def saved_adapter(folder: Path, seed: int, base: Any = None, **settings: Any) -> Path:
    tuned = with_adapter(tiny_model("llama", 1) if base is None else base, seed, **(settings or PLAIN))
    tuned.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "no/such-model"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_from_folders(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    large, adapter, base = folders
    other = saved_adapter(tmp_path / "other", 3)
    models = EFTModels.from_pretrained(large, [adapter, tmp_path / "base", other], base)
    runners = models.runners()
    for seed, runner in ((2, runners.tuned[0]), (3, runners.tuned[2])):
        wanted = own_logits(with_adapter(tiny_model("llama", 1), seed, **PLAIN), 0)
        torch.testing.assert_close(logits_of(runner, True), wanted, atol=2e-5, rtol=1e-4)
    wanted = own_logits(tiny_model("llama", 1), 0)
    for runner in (runners.base, runners.tuned[1]):
        torch.testing.assert_close(logits_of(runner, True), wanted, atol=2e-5, rtol=1e-4)
    assert models.tokenizer is not None and models.chat_tokenizer is None

    report = inspect_trio(large, adapter, base)
    loaded = EFTModels.from_pretrained(large, adapter, base).describe()
    assert not report.problems and [row.bytes for row in report.models] == [row.bytes for row in loaded]
    half = EFTModels.from_pretrained(large, adapter, base, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.small_tuned[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("saved", ["norm", "layers.0.mlp"])
def test_modules_that_an_adapter_saves_are_named_by_their_ends(
    saved: str, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """The first is also the end of all other norms' names."""
    large, _, base = folders
    settings = {**PLAIN, "modules_to_save": [saved]}
    adapter = saved_adapter(tmp_path / "other", 2, **settings)
    models = EFTModels.from_pretrained(large, adapter, base)
    wanted = own_logits(with_adapter(tiny_model("llama", 1), 2, **settings), 0)
    torch.testing.assert_close(logits_of(models.runners().tuned[0], True), wanted, atol=2e-5, rtol=1e-4)


def test_an_adapter_without_a_tokenizer_has_its_bases(folders: tuple[Path, Path, Path]) -> None:
    large, adapter, base = folders
    (base / "chat_template.jinja").write_text("of the base")
    chat: Any = EFTModels.from_pretrained(large, adapter, base).chat_tokenizer
    assert chat.chat_template == "of the base"
    tokenizer = type(chat).from_pretrained(base)
    tokenizer.chat_template = "its own"
    tokenizer.save_pretrained(adapter)
    chat = EFTModels.from_pretrained(large, adapter, base).chat_tokenizer
    assert chat.chat_template == "its own"


def test_the_command_line_takes_an_adapter(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(map(str, folders))
    assert main(["check", *names]) == 0
    assert "would work together" in capsys.readouterr().out
    options = [f"--{role}={name}" for role, name in zip(("large", "tuned", "base"), names, strict=True)]
    assert main(["generate", "t5 t6", *options, "--max-new-tokens", "4", "--seed", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]
    assert main(["check", names[0], names[2], names[1]]) == 1
    assert "is an adapter; give the model that it was trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 3}, "there is no model.layers.2"),
        ({"num_hidden_layers": 1}, "it has no weights for model.layers.1"),
        ({"intermediate_size": 40}, r"lora_A.weight is \[5, 40\]"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    change: dict[str, Any], reason: str, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    large, _, base = folders
    config = copy.deepcopy(tiny_model("llama").config)
    for name, value in change.items():
        setattr(config, name, value)
    from_elsewhere = type(tiny_model("llama"))(config)
    other = saved_adapter(tmp_path / "other", 2, from_elsewhere, target_modules=["q_proj", "down_proj"])
    with pytest.raises(IncompatibleModelsError, match=f"^small_tuned: the adapter .*{reason}") as caught:
        EFTModels.from_pretrained(large, other, base)
    assert "\n" not in str(caught.value)


def test_adapter_folders_that_cannot_work_are_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, adapter, base = folders

    def refusal(small_tuned: Path) -> str:
        with pytest.raises(IncompatibleModelsError) as caught:
            EFTModels.from_pretrained(large, small_tuned, base)
        return str(caught.value)

    embedding = saved_adapter(tmp_path / "embedding", 2, target_modules=["q_proj", "embed_tokens"])
    assert "holds other weights for the base itself (model.embed_tokens" in refusal(embedding)
    prefix_tuned(tiny_model("llama", 1)).save_pretrained(tmp_path / "prefix")
    assert "is of type PREFIX_TUNING" in refusal(tmp_path / "prefix")
    monkeypatch.setattr(adapters_module, "find_spec", lambda name: None)
    assert "needs peft (pip install -c constraints.txt '.[peft]' in the checkout" in refusal(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "but no adapter_model.safetensors" in refusal(adapter)


@pytest.mark.parametrize("lacking", [
    "q_proj.lora_A", "down_proj.lora_B", "v_proj.lora_magnitude_vector", "embed_tokens.lora_embedding_B",
])  # fmt: skip
def test_an_adapter_that_lacks_a_part_of_a_layer_is_refused(
    lacking: str, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    large, _, base = folders
    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    adapter = saved_adapter(tmp_path / "other", 2, target_modules=targets, use_dora=True)
    file = adapter / "adapter_model.safetensors"
    # The embedding itself, which peft saves beside its adapter, is refused elsewhere.
    weights = {key: w for key, w in load_file(file).items() if "embed_tokens.base_layer" not in key}
    save_file(weights, file)
    assert EFTModels.from_pretrained(large, adapter, base)
    left = {key: w for key, w in weights.items() if lacking not in key}
    assert len(left) < len(weights)
    save_file(left, file)
    with pytest.raises(IncompatibleModelsError, match=f"^small_tuned: the adapter .* lacks .*{lacking}[.]$"):
        EFTModels.from_pretrained(large, adapter, base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("contents", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_an_adapter_whose_file_is_broken_is_refused(
    name: str, contents: bytes, folders: tuple[Path, Path, Path]
) -> None:
    (folders[1] / "adapter_model.safetensors").unlink()
    (folders[1] / name).write_bytes(contents)
    with pytest.raises(UnavailableModelsError) as caught:
        EFTModels.from_pretrained(*folders)
    assert str(caught.value).startswith(f"small_tuned: cannot read {folders[1] / name} (")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    report = inspect_trio(*folders)
    assert not report.checked and report.problems == [str(caught.value)]


def test_our_modules_do_not_import_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        import peft  # noqa: F401
    for name in ("adapters", "eft_models", "llama", "runner", "sources", "describe"):
        found: Any = importlib.util.find_spec(f"speculative_eft.models.{name}")
        again = importlib.util.spec_from_file_location(f"speculative_eft.models._{name}_again", found.origin)
        assert again is not None and again.loader is not None
        module = importlib.util.module_from_spec(again)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        again.loader.exec_module(module)
