"""The models of emulated fine-tuning: loading them, checking that they belong together, describing them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from speculative_eft.kernels import backend

from .configs import layer_windows, text_config
from .costs import StepCosts, kept_step_costs, measure_step_costs
from .describe import ModelDescription, describe_model, vocabulary_rows
from .errors import IncompatibleModelsError
from .memory import free_bytes, weights_do_not_fit
from .placement import home_device, is_dispatched
from .protocol import EFTRunners
from .runner import ModelRunner
from .sources import (
    Source,
    check_architecture,
    find_sources,
    size_problems,
    token_differences,
    tuned_arguments,
)

Name = str | os.PathLike[str]


class EFTModels:
    """A large base model, small tuned models, and the small base model they were tuned from.

    All share one vocabulary; sizes of output heads may differ by padding, and ids from `vocab_size` up are
    never produced. Every model keeps its own dtype; all take their tokens on one device, from which
    accelerate may spread a model's layers over others. An id that only some tokenizers know but all heads
    have a row for follows the law like any other, with the logits that the models give it.

    Attributes:
        large_base: the module as given.
        small_tuned: a list of modules, one for each tuned model.
        small_base: the module as given.
        tokenizer: the tokenizer of the large base, or of the first model that has one, or None.
        chat_tokenizer: that of the first tuned model with a chat template, or None. It may know tokens that
            the bases have never seen.
        vocab_size: the smallest of the models' output heads.
        attention: how attention is computed, as asked for.
    """

    large_base: PreTrainedModel
    small_tuned: list[PreTrainedModel]
    small_base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    chat_tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    attention: str

    def __init__(
        self,
        large_base: PreTrainedModel,
        small_tuned: PreTrainedModel | Sequence[PreTrainedModel],
        small_base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        attention: str = "auto",
        chat_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Take loaded modules. They stay where they are and as they are, but for `eval()`.

        `attention` is how all of them compute attention, see `ModelRunner`.

        Raises IncompatibleModelsError, a ValueError, if one is not a causal language model, if one keeps a
        recurrent state or has an encoder, if vocabularies differ by more than padding, or if the models are
        not on one device. Tokenizers cannot be compared here; `from_pretrained` compares them.
        """
        self.large_base = large_base
        self.small_tuned = list(small_tuned) if isinstance(small_tuned, Sequence) else [small_tuned]
        self.small_base = small_base
        self.tokenizer = tokenizer
        self.chat_tokenizer = chat_tokenizer
        self.attention = attention
        self._with_template: set[str] = set()
        self._runners: EFTRunners | None = None
        self._step_costs: dict[tuple[bool, int], StepCosts] = {}
        if not self.small_tuned:
            raise IncompatibleModelsError("small_tuned must hold at least one model.")
        for argument, model in self._by_argument():
            _check_model(argument, model)
        sizes = {argument: vocabulary_rows(model) for argument, model in self._by_argument()}
        for problem in size_problems(sizes):
            raise IncompatibleModelsError(problem)
        _check_devices(self._by_argument())
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
    ) -> EFTModels:
        """Load models by folder or Hub name, after checking all of them.

        `dtype` and `device_map` mean what they mean to transformers' `from_pretrained`, except that naming a
        single device, such as `"cuda"`, does not need accelerate. `tokenizer` replaces the large base's own.
        `attention` is how all of them compute attention, see `ModelRunner`.

        Raises IncompatibleModelsError, a ValueError, before anything is loaded if a model cannot be found or
        run or if tokenizers differ (see `find_sources`), if `tensor_parallel` is not 1, and for whatever
        `EFTModels` itself refuses; and with what each model needs if a GPU's memory does not hold them.
        """
        if tensor_parallel != 1:
            raise IncompatibleModelsError(
                f"tensor_parallel must be 1, not {tensor_parallel}: splitting a model is not supported yet."
            )
        sources = find_sources(large_base, small_tuned, small_base)
        free = free_bytes(torch.device(device_map)) if _is_one_device(device_map) else None
        try:
            loaded = [_load(source, dtype, device_map, trust_remote_code) for source in sources]
        except torch.OutOfMemoryError as error:
            needs = [_describe_unloaded(source, dtype, trust_remote_code) for source in sources]
            raise IncompatibleModelsError(weights_do_not_fit(needs, free)) from error
        if tokenizer is None:
            tokenizer = _load_tokenizer(sources, trust_remote_code)
        with_template = [source for source in sources[1:-1] if source.has_chat_template]
        chat_tokenizer = _load_tokenizer(with_template, trust_remote_code)
        models = cls(loaded[0], loaded[1:-1], loaded[-1], tokenizer, attention, chat_tokenizer)
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

        Raises ValueError for an architecture that turns out not to run with one length for each sequence, and
        for an `attention` that cannot run one of the models.
        """
        if self._runners is None:
            self._runners = EFTRunners(
                large=ModelRunner(self.large_base, self.attention),
                tuned=[ModelRunner(model, self.attention) for model in self.small_tuned],
                base=ModelRunner(self.small_base, self.attention),
            )
        return self._runners

    def step_costs(self, pair: bool, batch: int) -> StepCosts:
        """What a draft's step and a row cost for `batch` sequences, measured once on a machine.

        `pair` is whether the small base drafts along with the tuned models.
        """
        if (pair, batch) not in self._step_costs:
            runners = self.runners()
            drafting = [*runners.tuned, runners.base] if pair else runners.tuned
            device = runners.large.device
            on_gpu = device.type == "cuda"
            facts = [
                torch.__version__, backend(device), pair, batch, torch.get_num_threads(),
                torch.cuda.get_device_name(device) if on_gpu else device.type,
                *((row.architecture, row.parameters, row.dtype, row.vocabulary) for row in self.describe()),
            ]  # fmt: skip
            self._step_costs[pair, batch] = kept_step_costs(
                facts, lambda: measure_step_costs(runners, drafting, batch)
            )
        return self._step_costs[pair, batch]

    def describe(self) -> list[ModelDescription]:
        """A row for each model: large base, tuned models, small base."""
        return [
            describe_model(argument, model, argument in self._with_template)
            for argument, model in self._by_argument()
        ]

    def _by_argument(self) -> list[tuple[str, PreTrainedModel]]:
        tuned = zip(tuned_arguments(len(self.small_tuned)), self.small_tuned, strict=True)
        return [("large_base", self.large_base), *tuned, ("small_base", self.small_base)]


@dataclass
class TrioReport:
    """Whether models would work together, found without loading weights."""

    problems: list[str] = field(default_factory=list)
    """Why they would not, one sentence each."""
    differences: list[str] = field(default_factory=list)
    """What differs and does no harm."""
    models: list[ModelDescription] = field(default_factory=list)
    """A row for each model in the dtype of its configuration; empty if a model cannot be found."""

    @property
    def compatible(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""
        return sum(model.bytes for model in self.models)

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory of the keys and values of one token of one sequence in all models."""
        return sum(model.cache_bytes_per_token for model in self.models)


def inspect_trio(
    large_base: Name, small_tuned: Name | Sequence[Name], small_base: Name, trust_remote_code: bool = False
) -> TrioReport:
    """Tell from configurations and tokenizers alone whether models would work together and what they need.

    Never raises for models that do not fit: the report says what is wrong. It lists the first obstacle
    only, since a trio that cannot be found or has two tokenizers need not be looked at further.
    """
    try:
        sources = find_sources(large_base, small_tuned, small_base)
        models = []
        for source in sources:
            model = _without_weights(source, trust_remote_code)
            _check_model(source.argument, model)
            models.append(model)
    except IncompatibleModelsError as error:
        return TrioReport(problems=[str(error)])
    rows = [
        describe_model(source.argument, model, source.has_chat_template)
        for source, model in zip(sources, models, strict=True)
    ]
    problems = size_problems({row.role: row.vocabulary for row in rows})
    return TrioReport(problems, [*token_differences(sources), *_row_differences(rows)], rows)


def _row_differences(rows: Sequence[ModelDescription]) -> list[str]:
    found = []
    for what in ("architecture", "vocabulary", "context", "dtype", "chat_template"):
        values = [getattr(row, what) for row in rows]
        if len(set(values)) > 1:
            listed = ", ".join(f"{row.role} {value}" for row, value in zip(rows, values, strict=True))
            found.append(f"{what.replace('_', ' ')}: {listed}")
    return found


def _without_weights(source: Source, trust_remote_code: bool) -> PreTrainedModel:
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
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            device_map=None if one_device else device_map,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error
    return model.to(device_map) if one_device else model


def _is_one_device(device_map: Any) -> bool:
    return isinstance(device_map, torch.device | int) or (
        isinstance(device_map, str) and device_map.split(":")[0] in ("cpu", "cuda", "mps", "xpu")
    )


def _describe_unloaded(source: Source, dtype: str | torch.dtype, trust_remote_code: bool) -> ModelDescription:
    model = _without_weights(source, trust_remote_code)
    if dtype != "auto":
        torch.nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return describe_model(source.argument, model, source.has_chat_template)


def _cannot_load(source: Source, error: Exception) -> IncompatibleModelsError:
    reason = str(error).strip().splitlines()[0]
    return IncompatibleModelsError(f"{source.argument}: {source.name} cannot be loaded ({reason}).")


def _load_tokenizer(sources: Iterable[Source], trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    for source in sources:
        if source.has_tokenizer:
            return AutoTokenizer.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    return None


def _check_model(argument: str, model: PreTrainedModel) -> None:
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
    if not vocabulary_rows(model):
        raise IncompatibleModelsError(
            f"{argument} is a {kind}, which has no causal language model head; give a ...ForCausalLM."
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
