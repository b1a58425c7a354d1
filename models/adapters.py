"""LoRA adapters of peft: a base and the models tuned from it over one copy of the weights.

Nothing here imports peft before it is given one of its models or one of its folders.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import IncompatibleModelsError, UnavailableModelsError, first_line
from .extras import install_command
from .locks import reentrant_lock
from .sources import Source, adapter_problem

if TYPE_CHECKING:
    from peft import PeftModel

BROKEN_WEIGHTS = (SafetensorError, RuntimeError, EOFError, UnpicklingError)
"""What safetensors and torch raise for a file that is empty, cut short, or no file of weights."""

_PREFIX = "base_model.model."
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""Where a layer of peft's keeps what its adapters' files hold."""
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of layers that several models share, by the first of them."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a linear layer: `scaling * (up @ (down @ x) + bias)`."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    bias: Tensor | None
    """[out]"""
    scaling: float


class AdapterSwitch:
    """Runs a model's modules with some of its adapters on, or none, and leaves it as it was.

    The layers are found once; a pass then sets two entries of each, on the host alone. Passes of several
    threads over the same layers take turns.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str]) -> None:
        self._adapters = list(adapters)
        layers = adapter_layers(model)
        # peft's own switches also change which weights require gradients; writing past nn.Module's
        # attribute machinery costs a tenth.
        self._layers = list(map(vars, layers))
        self._lock = _LOCKS.setdefault(layers[0], reentrant_lock()) if layers else reentrant_lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock, self._switched():
            yield

    @contextmanager
    def _switched(self) -> Iterator[None]:
        before = [(layer.get("_disable_adapters"), layer["_active_adapter"]) for layer in self._layers]
        disabled, adapters = not self._adapters, self._adapters
        try:
            for layer in self._layers:
                layer["_disable_adapters"], layer["_active_adapter"] = disabled, adapters
            yield
        finally:
            for layer, (was_disabled, active) in zip(self._layers, before, strict=True):
                layer["_active_adapter"] = active
                if was_disabled is None:
                    del layer["_disable_adapters"]
                else:
                    layer["_disable_adapters"] = was_disabled


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether peft put `module` in the place of one of the model's own."""
    return hasattr(module, "_disable_adapters")


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that `is_adapter_layer`, in its order."""
    return list(filter(is_adapter_layer, model.modules()))


def refuse_merged(layers: Iterable[Any]) -> None:
    """Raise IncompatibleModelsError if an adapter was merged into the weights of one of peft's `layers`."""
    merged = sorted({adapter for layer in layers for adapter in layer.merged_adapters})
    if merged:
        raise IncompatibleModelsError(
            f"the adapter {', '.join(merged)} was merged into its base's weights, where it counts twice, "
            "and for other models that share them: unmerge it (unmerge_adapter)"
        )


def is_low_rank(module: Any, adapters: Sequence[str] | None) -> bool:
    """Whether `module` is torch's linear layer and, of each of `adapters`, a `LowRank` or nothing.

    Never for `adapters` None, which leaves to the module what it does.
    """
    if adapters is None or not is_adapter_layer(module):
        return False
    from peft.tuners.lora import Linear

    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not module.merged
        and not any(adapter in module.lora_variant for adapter in adapters)
        and all(
            type(part) is nn.Linear
            for adapter in adapters
            if adapter in module.lora_A
            for part in (module.lora_A[adapter], module.lora_B[adapter])
        )
    )


def low_ranks(module: Any, adapters: Sequence[str]) -> list[LowRank]:
    """What `adapters` add to `module`, which `is_low_rank`."""
    return [
        LowRank(
            module.lora_A[adapter].weight,
            module.lora_B[adapter].weight,
            module.lora_B[adapter].bias,
            module.scaling[adapter],
        )
        for adapter in adapters
        if adapter in module.lora_A
    ]


def parameters_with(model: nn.Module, adapters: Sequence[str] | None) -> list[nn.Parameter]:
    """The parameters of `model` without those of adapters other than `adapters`; all for None."""
    parameters = list(model.parameters())
    if adapters is None:
        return parameters
    layers: list[Any] = adapter_layers(model)
    others = {
        id(parameter)
        for module in layers
        for name in module.adapter_layer_names
        for adapter, part in getattr(module, name).items()
        if adapter not in adapters
        for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    return [parameter for parameter in parameters if id(parameter) not in others]


def is_peft_model(model: object) -> bool:
    """Whether `model` is a `peft.PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def chosen_adapters(argument: str, model: PeftModel, adapter: str | None) -> tuple[str, ...]:
    """The adapters of `model` to run: the one named, else those that are active now.

    Raises IncompatibleModelsError if there is none of that name, or one that is no LoRA, or if adapters are
    merged into the weights or all switched off.
    """
    known = list(model.peft_config)
    layers = adapter_layers(model)
    if any(getattr(layer, "merged_adapters", ()) for layer in layers):
        raise IncompatibleModelsError(
            f"{argument} has adapters merged into its weights; call its unmerge_adapter(), or give what its "
            "merge_and_unload() returns, with a small_base of its own."
        )
    if adapter is None and layers and all(vars(layer)["_disable_adapters"] for layer in layers):
        raise IncompatibleModelsError(
            f"{argument} has its adapters switched off; switch them on (enable_adapter_layers), or give the "
            "model below them."
        )
    chosen = model.active_adapters if adapter is None else [adapter]
    for name in chosen:
        if name not in known:
            raise IncompatibleModelsError(
                f"{argument} has no adapter {name!r}; it has {', '.join(map(repr, known))}."
            )
        if problem := adapter_problem(model.peft_config[name].to_dict(), shares_base=False):
            raise IncompatibleModelsError(f"{argument}: its adapter {name!r} {problem}.")
    return tuple(chosen)


def check_sharing(argument: str, model: PeftModel) -> None:
    """Raise IncompatibleModelsError if `model` with its adapters off is not the base it was made from."""
    for name, config in model.peft_config.items():
        if problem := adapter_problem(config.to_dict(), shares_base=True):
            raise IncompatibleModelsError(f"{argument}: its adapter {name!r} {problem}.")


def adapter_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in an adapter's file, by its name there.

    Raises UnavailableModelsError for a file that cannot be read.
    """
    tensors = source.find("adapter_model.safetensors")
    path = tensors or source.find("adapter_model.bin")
    assert path is not None
    try:
        if tensors:
            with safe_open(tensors, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return {key: tuple(w.shape) for key, w in torch.load(path, "meta", weights_only=True).items()}
    except (OSError, AttributeError, *BROKEN_WEIGHTS) as error:
        raise UnavailableModelsError(
            f"{source.argument}: cannot read {path} ({why_broken(error)})."
        ) from error


def why_broken(error: Exception) -> str:
    """What `error`, of loading weights, says about their file."""
    # torch's own words are none, or advice to run whatever the file holds.
    unpickled = isinstance(error, EOFError | UnpicklingError)
    return "it is no file that torch.save wrote" if unpickled else first_line(error)


def check_shapes(source: Source, shapes: dict[str, tuple[int, ...]], base: PreTrainedModel) -> None:
    """Raise IncompatibleModelsError if weights of these `shapes` are not those of an adapter of `base`.

    `base` may be on the meta device.
    """
    modules = dict(base.named_modules())
    saved = source.read("adapter_config.json").get("modules_to_save") or ()
    for key, shape in shapes.items():
        name = key.removeprefix(_PREFIX)
        path, _, kind = name.partition(".lora_")
        if not kind:
            if "trainable_tokens" not in name and not _is_within(name, saved):
                raise IncompatibleModelsError(
                    f"{source.argument}: {source.name} holds other weights for the base itself ({name}); "
                    "merge it into a model of its own (merge_and_unload)."
                )
            continue
        if ".experts" in path:  # transformers keeps experts in one module, for which peft renames weights
            continue
        wanted = _wanted(modules.get(path), kind)
        if path not in modules or (wanted is not None and shape[wanted[0]] != wanted[1]):
            fault = f"{name} is {list(shape)}" if path in modules else f"there is no {path} there"
            raise IncompatibleModelsError(
                f"{source.argument}: the adapter {source.name} is not of small_base's shape ({fault}); "
                "give the model it was trained on as small_base."
            )


def _is_within(name: str, saved: Sequence[str]) -> bool:
    """Whether the weight `name` is of one of the modules `saved`, of whose names peft takes any end."""
    modules = accumulate(name.split("."), "{}.{}".format)
    return any(module.endswith(tuple(saved)) for module in modules)


def _wanted(module: Any, kind: str) -> tuple[int, int] | None:
    """The axis of a LoRA's weight that its layer fixes, and its size; None where this is not known."""
    inputs: int
    outputs: int
    if isinstance(module, nn.Linear):
        inputs, outputs = module.in_features, module.out_features
    elif isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
    elif isinstance(module, nn.Embedding):
        inputs, outputs = module.num_embeddings, module.embedding_dim
    else:
        return None
    return {"A": (1, inputs), "B": (0, outputs)}.get(kind.removeprefix("embedding_")[0])


def check_peft(source: Source) -> None:
    """Raise IncompatibleModelsError where an adapter cannot be loaded for want of peft."""
    if find_spec("peft") is None:
        raise IncompatibleModelsError(
            f"{source.argument}: {source.name} is an adapter, which needs peft ({install_command('peft')})."
        )


def load_adapters(base: PreTrainedModel, sources: Sequence[Source]) -> list[tuple[PeftModel, str]]:
    """Load adapters over one `base`, in its dtype; each as the model and its name there.

    Raises IncompatibleModelsError for what peft refuses, and for an adapter that lacks weights of a layer.
    """
    from peft import PeftModel

    model: PeftModel | None = None
    loaded = []
    for index, source in enumerate(sources):
        name = f"tuned_{index}"
        try:
            if model is None:
                model = PeftModel.from_pretrained(
                    base, source.location, adapter_name=name, autocast_adapter_dtype=False
                )
            else:
                model.load_adapter(source.location, adapter_name=name, autocast_adapter_dtype=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise IncompatibleModelsError(
                f"{source.argument}: {source.name} cannot be loaded ({first_line(error)})."
            ) from error
        filled: dict[str, set[str]] = {}
        for key in adapter_shapes(source):
            path, _, kind = key.removeprefix(_PREFIX).partition(".lora_")
            filled.setdefault(path, set()).add(f"lora_{kind.partition('.')[0]}")
        for path, module in base.named_modules():
            held = {kind for kind in _KINDS if name in getattr(module, kind, ())}
            if not held or ".experts" in path:
                continue
            if path not in filled:
                raise IncompatibleModelsError(
                    f"{source.argument}: the adapter {source.name} is not of small_base's shape (it has no "
                    f"weights for {path}); give the model it was trained on as small_base."
                )
            for kind in sorted(held - filled[path]):  # peft would leave them as a new adapter has them
                raise IncompatibleModelsError(
                    f"{source.argument}: the adapter {source.name} lacks the weights of {path}.{kind}."
                )
        loaded.append((model, name))
    return loaded
