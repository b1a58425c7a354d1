"""The models of emulated fine-tuning: loading them, checking that they belong together, describing them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from speculative_eft.kernels import backend

from .adapters import (
    BROKEN_WEIGHTS,
    AdapterSwitch,
    adapter_shapes,
    check_peft,
    check_shapes,
    check_sharing,
    chosen_adapters,
    is_peft_model,
    load_adapters,
    parameters_with,
    why_broken,
)
from .attention import check_attention
from .configs import layer_windows, text_config
from .costs import StepCosts, kept_step_costs, measure_step_costs, processor_name
from .describe import ModelDescription, describe_model, vocabulary_rows
from .errors import IncompatibleModelsError, UnavailableModelsError, first_line
from .locks import reentrant_lock
from .memory import free_bytes, weights_do_not_fit
from .placement import check_device, home_device, is_dispatched
from .protocol import EFTRunners, Runner, on_device
from .runner import ModelRunner
from .sources import Source, check_architecture, find_sources, size_problems, tuned_arguments

if TYPE_CHECKING:
    from peft import PeftModel

Name = str | os.PathLike[str]
Tuned: TypeAlias = "PreTrainedModel | PeftModel | tuple[PeftModel, str]"


class _Network(NamedTuple):
    argument: str
    model: PreTrainedModel
    adapters: tuple[str, ...] | None
    """As `ModelRunner` takes them."""


class EFTModels:
    """A large base model, small tuned models, and the small base model they were tuned from.

    All share one vocabulary; sizes of output heads may differ by padding, and ids from `vocab_size` up are
    never produced. Every model keeps its own dtype; all take their tokens on one device, from which
    accelerate may spread a model's layers over others. An id that only some tokenizers know but all heads
    have a row for follows the law like any other, with the logits that the models give it. A tuned model may
    be a LoRA adapter over the small base: one copy of the weights serves both, with a cache for each.

    Attributes:
        large_base: the module as given.
        small_tuned: a list of modules, one for each tuned model; a `PeftModel` for an adapter.
        small_base: the module as given, or the one under the adapters.
        tokenizer: the tokenizer of the large base, or of the first model that has one, or None.
        chat_tokenizer: that of the first tuned model with a chat template, or None. It may know tokens that
            the bases have never seen.
        vocab_size: the smallest of the models' output heads.
        attention: how attention is computed, as asked for.
        compile_bodies: whether torch.compile makes passes, as asked for.
    """

    large_base: PreTrainedModel
    small_tuned: list[PreTrainedModel]
    small_base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    chat_tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    attention: str
    compile_bodies: bool

    def __init__(
        self,
        large_base: PreTrainedModel,
        small_tuned: Tuned | Sequence[Tuned],
        small_base: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        attention: str = "auto",
        chat_tokenizer: PreTrainedTokenizerBase | None = None,
        compile_bodies: bool = False,
    ) -> None:
        """Take loaded modules. They stay where they are and as they are, but for `eval()`.

        A tuned model may be a `peft.PeftModel` with LoRA adapters, which runs with the adapters that are
        active now, or a pair of such a model and the name of one adapter. The module under it, given as
        another model, as `small_base` above all, runs on the same weights with every adapter off; left out,
        `small_base` is that module. Which adapters are on outside of our passes stays as it is.

        `attention` is how all of them compute attention, and `compile_bodies` whether torch.compile makes
        passes of few rows, see `ModelRunner`.

        Raises IncompatibleModelsError, a ValueError, if one is not a causal language model, if one keeps a
        recurrent state or has an encoder, if vocabularies differ by more than padding, if an adapter is no
        LoRA or changes the base that it shares, or if the models are not on one device. Tokenizers cannot be
        compared here; `from_pretrained` compares them. Raises ValueError if `attention` names none.
        """
        check_attention(attention)
        tuned: list[Any] = _as_list(small_tuned)
        self.large_base = large_base
        self.small_tuned = [model[0] if _is_pair(model) else model for model in tuned]
        self.tokenizer = tokenizer
        self.chat_tokenizer = chat_tokenizer
        self.attention = attention
        self.compile_bodies = compile_bodies
        self._with_template: set[str] = set()
        self._runners: EFTRunners | None = None
        self._making_runners = reentrant_lock()
        self._modules = reentrant_lock()
        self._step_costs: dict[tuple[bool, int, bool], StepCosts] = {}
        if not tuned:
            raise IncompatibleModelsError("small_tuned must hold at least one model.")
        self._networks = _networks(large_base, tuned, small_base)
        self.small_base = self._networks[-1].model
        sizes = {network.argument: vocabulary_rows(network.model) for network in self._networks}
        for problem in size_problems(sizes):
            raise IncompatibleModelsError(problem)
        _check_devices([(network.argument, network.model) for network in self._networks])
        self.vocab_size = min(sizes.values())

    @classmethod
    def from_pretrained(
        cls,
        large_base: Name,
        small_tuned: Name | Sequence[Name],
        small_base: Name,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        tensor_parallel: int = 1,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        attention: str = "auto",
        compile_bodies: bool = False,
    ) -> EFTModels:
        """Load models by folder or Hub name, after checking all of them.

        A LoRA adapter as `small_tuned` (a folder with `adapter_config.json`) is put over `small_base`, which
        is loaded once, also for several adapters. What the adapter's own configuration calls its base is not
        looked at; its shapes are.

        `dtype` and `device_map` mean what they mean to transformers' `from_pretrained`, except that naming a
        single device, such as `"cuda"`, does not need accelerate. `tokenizer` replaces the large base's own.
        `attention` and `compile_bodies` are as for `EFTModels`.

        Raises IncompatibleModelsError, a ValueError, before anything is loaded if a model cannot be found or
        run or if tokenizers differ (see `find_sources`), if an adapter is not of `small_base`'s shape or peft
        is missing, if `tensor_parallel` is not 1, and for whatever `EFTModels` itself refuses; and with what
        each model needs if a GPU's memory does not hold them. Raises it too for weights that a model's files
        lack or hold in another shape, which transformers would fill at random. Raises ValueError if `dtype`
        or `attention` names none, and if `device_map` is a single device that torch cannot use.
        """
        _check_dtype(dtype)
        check_attention(attention)
        if tensor_parallel != 1:
            raise IncompatibleModelsError(
                f"tensor_parallel must be 1, not {tensor_parallel}: splitting a model is not supported yet."
            )
        if _is_one_device(device_map):
            check_device(device_map)
        sources = find_sources(large_base, small_tuned, small_base)
        adapters = [source for source in sources if source.is_adapter]
        if adapters:
            skeleton = without_weights(sources[-1], trust_remote_code)
            for source in adapters:
                check_peft(source)
                check_shapes(source, adapter_shapes(source), skeleton)
        free = free_bytes(torch.device(device_map)) if _is_one_device(device_map) else None
        whole = [source for source in sources if not source.is_adapter]
        try:
            loaded: dict[str, Any] = {
                source.argument: _load(source, dtype, device_map, trust_remote_code) for source in whole
            }
        except torch.OutOfMemoryError as error:
            needs = [_describe_unloaded(source, dtype, trust_remote_code) for source in whole]
            raise IncompatibleModelsError(weights_do_not_fit(needs, free)) from error
        if adapters:
            over_base = load_adapters(loaded["small_base"], adapters)
            loaded |= zip((source.argument for source in adapters), over_base, strict=True)
        in_order = [loaded[source.argument] for source in sources]
        if tokenizer is None:
            tokenizer = _load_tokenizer(sources, trust_remote_code)
        with_template = [source for source in sources[1:-1] if source.has_chat_template]
        chat_tokenizer = _load_tokenizer(with_template, trust_remote_code)
        models = cls(
            in_order[0], in_order[1:-1], in_order[-1], tokenizer, attention, chat_tokenizer, compile_bodies
        )
        models._with_template = {source.argument for source in sources if source.has_chat_template}
        return models

    @classmethod
    def demo(cls, dtype: str | torch.dtype = torch.float32) -> EFTModels:
        """The bundled trio, trained on Python source; runs on a CPU and needs no network."""
        from .demo import weights_folder

        try:
            large_base = weights_folder("large_base")
            small_tuned, small_base = weights_folder("small_tuned"), weights_folder("small_base")
        except FileNotFoundError as error:
            raise IncompatibleModelsError(str(error)) from error
        return cls.from_pretrained(large_base, small_tuned, small_base, dtype=dtype)

    def runners(self) -> EFTRunners:
        """The models' runners, built in the first call and kept.

        Raises ValueError for an architecture that turns out not to run with one length for each sequence, for
        an `attention` that cannot run one of the models, and for one that torch.compile cannot run.
        """
        with self._making_runners:
            if self._runners is None:
                large, *tuned, base = (
                    ModelRunner(network.model, self.attention, network.adapters, self.compile_bodies)
                    for network in self._networks
                )
                every = (large, *tuned, base)
                own = all(runner.is_compiled for runner in every)
                modules = nullcontext() if own else self._modules
                self._runners = EFTRunners(large, list(tuned), base, modules=modules)
            return self._runners

    def drafting_runners(self, pair: bool) -> list[ModelRunner]:
        """The runners of the models that draft: the tuned ones, and as a `pair` the small base."""
        runners = self.runners()
        drafting = runners.small if pair else runners.tuned
        return [cast(ModelRunner, runner) for runner in drafting]

    def quantised_drafters(self, pair: bool) -> list[Runner]:
        """For `EFTRunners.drafters`: each model that drafts with weights of eight bits, copied once.

        Raises ValueError for a model that is not like Llama, or has adapters, or has a GPU's attention by
        other means than Triton, and where a GPU's memory does not hold the copies.
        """
        drafting = self.drafting_runners(pair)
        for network, runner in zip([*self._networks[1:-1], self._networks[-1]], drafting, strict=False):
            if not runner.can_quantise:
                kind = type(network.model).__name__
                raise ValueError(
                    'draft_weights="int8" needs models like Llama without adapters, on a GPU with '
                    f'attention="triton", but {network.argument} is a {kind}'
                    f"{' with one' if network.adapters else ''}"
                )
        needed = sum(runner.bytes_to_quantise for runner in drafting)
        free = free_bytes(self.runners().large.device)
        if free is not None and needed > free:
            raise ValueError(
                f'draft_weights="int8" needs {needed / 2**30:.1f} GiB for its copies, and '
                f"{free / 2**30:.1f} GiB are free"
            )
        return [runner.quantised() for runner in drafting]

    def drafts_faster_quantised(self, pair: bool) -> bool:
        """Whether those that draft are compiled for a CPU, where one row by eight bits takes less time."""
        return all(runner.is_compiled and runner.can_quantise for runner in self.drafting_runners(pair))

    def with_own_caches(self) -> EFTModels:
        """The same networks with runners, and so with caches, of their own."""
        other = copy.copy(self)
        other._runners, other._making_runners = None, reentrant_lock()
        return other

    def forward_passes(self) -> list[tuple[PreTrainedModel, Callable[[], AbstractContextManager[None]]]]:
        """Each model and a context in which its own forward pass is that of its role, in `describe`'s order.

        Where adapters share a base, what a module computes depends on which are on.
        """
        return [
            (model, nullcontext if adapters is None else AdapterSwitch(model, adapters))
            for _, model, adapters in self._networks
        ]

    def step_costs(self, pair: bool, batch: int, quantised: bool = False) -> StepCosts:
        """What a draft's step and a row cost for `batch` sequences, measured once on a machine.

        `pair` is whether the small base drafts along with the tuned models, `quantised` whether they do so
        with weights of eight bits.
        """
        key = pair, batch, quantised
        if key not in self._step_costs:
            runners = self.runners()
            drafters = self.quantised_drafters(pair) if quantised else []
            device = runners.large.device
            on_gpu = device.type == "cuda"
            facts = [
                torch.__version__, backend(device), *key, torch.get_num_threads(), self.compile_bodies,
                torch.cuda.get_device_name(device) if on_gpu else processor_name(),
                *(runner.attention for runner in runners.every if isinstance(runner, ModelRunner)),
                *((row.architecture, row.parameters, row.dtype, row.vocabulary) for row in self.describe()),
            ]  # fmt: skip
            with on_device(device):
                self._step_costs[key] = kept_step_costs(
                    facts,
                    lambda: measure_step_costs(
                        replace(runners, drafters=drafters), self.drafting_runners(pair), batch
                    ),
                )
        return self._step_costs[key]

    def describe(self) -> list[ModelDescription]:
        """A row for each model: large base, tuned models, small base.

        Weights that adapters share with their base count there.
        """
        rows, counted = {}, set[int]()
        large, *tuned, base = self._networks
        for argument, model, adapters in (large, base, *tuned):
            parameters = [p for p in parameters_with(model, adapters) if id(p) not in counted]
            counted |= set(map(id, parameters))
            rows[argument] = describe_model(argument, model, argument in self._with_template, parameters)
        return [rows[network.argument] for network in self._networks]


def _check_dtype(dtype: Any) -> None:
    """Raise ValueError for what names no dtype; None and a dictionary are left to transformers."""
    if isinstance(dtype, str):
        good = dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype)
    else:
        good = dtype is None or isinstance(dtype, torch.dtype | dict)
    if not good:
        raise ValueError(
            f'dtype must be "auto", a torch.dtype or the name of one, such as "bfloat16", got {dtype!r}'
        )


def _as_list(small_tuned: Any) -> list[Any]:
    several = isinstance(small_tuned, Sequence) and not _is_pair(small_tuned)
    return list(small_tuned) if several else [small_tuned]


def _is_pair(tuned: Any) -> bool:
    """Whether `tuned` is a model with the name of its adapter."""
    return isinstance(tuned, tuple) and len(tuned) == 2 and isinstance(tuned[1], str)


def _networks(large_base: Any, small_tuned: Sequence[Any], small_base: Any) -> list[_Network]:
    """The networks behind the models given, checked one by one; large base first, small base last."""
    tuned: list[_Network] = []
    adapted: list[tuple[str, Any]] = []
    for argument, given in zip(tuned_arguments(len(small_tuned)), small_tuned, strict=True):
        module, adapter = given if _is_pair(given) else (given, None)
        if is_peft_model(module):
            adapters = chosen_adapters(argument, module, adapter)
            adapted.append((argument, module))
            tuned.append(_Network(argument, module.get_base_model(), adapters))
        elif adapter is None:
            tuned.append(_Network(argument, module, None))
        else:
            raise IncompatibleModelsError(
                f"{argument}: an adapter's name must come with a peft.PeftModel, not {type(module).__name__}."
            )
    under = {id(module.get_base_model()): module.get_base_model() for _, module in adapted}
    if small_base is None:
        if len(under) != 1:
            raise IncompatibleModelsError(
                "small_base must be given, unless all adapters in small_tuned are over one model."
            )
        (small_base,) = under.values()
    networks = []
    for network in (
        _Network("large_base", large_base, None),
        *tuned,
        _Network("small_base", small_base, None),
    ):
        check_model(network.argument, network.model)
        is_base = network.adapters is None and id(network.model) in under
        networks.append(network._replace(adapters=()) if is_base else network)
    shared = {id(network.model) for network in networks if network.adapters == ()}
    for argument, module in adapted:
        if id(module.get_base_model()) in shared:
            check_sharing(argument, module)
    return networks


def without_weights(source: Source, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the meta device, in the dtype of its configuration.

    Raises IncompatibleModelsError, or UnavailableModelsError where its configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code
            )
            return model
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error


def _load(
    source: Source, dtype: str | torch.dtype, device_map: Any, trust_remote_code: bool
) -> PreTrainedModel:
    one_device = _is_one_device(device_map)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            device_map=None if one_device else device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # They are refused below, by name: transformers' own error sends to a report that it logs.
            ignore_mismatched_sizes=True,
        )
    except torch.OutOfMemoryError:  # a RuntimeError, of which the caller tells what would be needed
        raise
    except (OSError, ValueError, *BROKEN_WEIGHTS) as error:
        raise _cannot_load(source, error) from error
    # A class of a model's own code may leave the account out.
    model: PreTrainedModel
    model, account = loaded if isinstance(loaded, tuple) else (loaded, {})
    _check_filled(source, model, account)
    return model.to(device_map) if one_device else model


def _check_filled(source: Source, model: PreTrainedModel, account: dict[str, Any]) -> None:
    """Raise IncompatibleModelsError for weights that transformers filled at random, by its `account`."""
    mismatched = sorted(account.get("mismatched_keys") or ())
    if mismatched:
        name, found, wanted = mismatched[0]
        raise IncompatibleModelsError(
            f"{source.argument}: {source.name} holds weights of other shapes than its config.json says "
            f"({name}{_and_others(mismatched)}: {list(found)}, not {list(wanted)})."
        )
    missing = set(account.get("missing_keys") or ())
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    # A model's own code may tie weights in a way that transformers does not know of.
    filled = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    modules = {_module(name) for name in missing & tensors.keys() if id(tensors[name]) not in filled}
    if getattr(model, "hf_quantizer", None) is not None:
        # Not all that a quantiser gives a module need be in the files, but some of it.
        modules -= {_module(name) for name in tensors.keys() - missing}
    if modules:
        unexpected = sorted(account.get("unexpected_keys") or ())
        instead = f"; it holds {unexpected[0]}{_and_others(unexpected)} instead" if unexpected else ""
        raise IncompatibleModelsError(
            f"{source.argument}: {source.name} lacks the weights of {min(modules)}{_and_others(modules)}"
            f"{instead}."
        )


def _module(name: str) -> str:
    """The module that a weight is of; the weight itself where that is the whole model."""
    return name.rpartition(".")[0] or name


def _and_others(all_of_them: Collection[object]) -> str:
    others = len(all_of_them) - 1
    return f" and {others} other{'s' if others > 1 else ''}" if others else ""


def _is_one_device(device_map: Any) -> bool:
    return isinstance(device_map, torch.device | int) or (
        isinstance(device_map, str) and device_map.split(":")[0] in ("cpu", "cuda", "mps", "xpu")
    )


def _describe_unloaded(source: Source, dtype: str | torch.dtype, trust_remote_code: bool) -> ModelDescription:
    model = without_weights(source, trust_remote_code)
    if dtype != "auto":
        torch.nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return describe_model(source.argument, model, source.has_chat_template)


def _cannot_load(source: Source, error: Exception) -> IncompatibleModelsError:
    # transformers raises an OSError for files that it does not get, a ValueError for what it cannot run.
    unread = isinstance(error, (OSError, *BROKEN_WEIGHTS))
    kind = UnavailableModelsError if unread else IncompatibleModelsError
    return kind(f"{source.argument}: {source.name} cannot be loaded ({why_broken(error)}).")


def _load_tokenizer(sources: Iterable[Source], trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    for source in sources:
        if source.has_tokenizer:
            location = source.tokenizer_source.location
            try:
                return AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
            except Exception as error:  # tokenizers has no exception of its own
                raise UnavailableModelsError(
                    f"{source.argument}: the tokenizer of {location} cannot be loaded ({first_line(error)})."
                ) from error
    return None


def check_model(argument: str, model: PreTrainedModel) -> None:
    """Raise IncompatibleModelsError for what is no causal language model that can be rolled back."""
    if not isinstance(model, PreTrainedModel):
        raise IncompatibleModelsError(
            f"{argument} must be a transformers causal language model, not {type(model).__name__}."
        )
    kind, config = type(model).__name__, model.config
    check_architecture(
        argument, {"model_type": config.model_type, "is_encoder_decoder": config.is_encoder_decoder}
    )
    if getattr(model, "_is_stateful", False):
        raise IncompatibleModelsError(
            f"{argument} is a {kind}, whose recurrent state cannot be rolled back when a draft is rejected; "
            "give a model that only has attention, such as Llama or Qwen."
        )
    made = vocabulary_rows(model)
    if not made:
        raise IncompatibleModelsError(
            f"{argument} is a {kind}, which has no causal language model head; give a ...ForCausalLM."
        )
    read = getattr(model.get_input_embeddings(), "num_embeddings", made)
    if read < made:
        raise IncompatibleModelsError(
            f"{argument} has a head for {made} ids and an embedding for {read}, so it cannot read all that "
            "it may say; give both as many rows, see its resize_token_embeddings()."
        )
    try:
        layer_windows(text_config(config))
    except ValueError as error:
        raise IncompatibleModelsError(
            f"{argument}: {error}; give a model that only has attention, such as Llama or Qwen."
        ) from error


def _check_devices(models: Iterable[tuple[str, PreTrainedModel]]) -> None:
    devices: dict[torch.device, str] = {}
    for argument, model in models:
        if is_dispatched(model):
            devices.setdefault(home_device(model), argument)
            continue
        for parameter in model.parameters():
            devices.setdefault(parameter.device, argument)
    if len(devices) > 1:
        listed = " and ".join(f"{argument} on {device}" for device, argument in devices.items())
        raise IncompatibleModelsError(
            f"all models must take their tokens on one device, but there is {listed}; move them with .to(), "
            "or give device_map one first device for all."
        )
    for device, argument in devices.items():
        if device.type == "meta":
            raise IncompatibleModelsError(f"{argument} has no weights: it is on the meta device.")
