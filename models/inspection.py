"""Whether models would work together and what they would need, told without their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from .adapters import adapter_shapes, check_shapes
from .describe import ModelDescription, describe_model
from .eft_models import Name, check_model, without_weights
from .errors import IncompatibleModelsError, UnavailableModelsError
from .sources import find_sources, size_problems, token_differences

__all__ = ["TrioReport", "inspect_trio"]


@dataclass
class TrioReport:
    """Whether models would work together, found without loading weights."""

    problems: list[str] = field(default_factory=list)
    """Why they would not, one sentence each."""
    differences: list[str] = field(default_factory=list)
    """What differs and does no harm."""
    models: list[ModelDescription] = field(default_factory=list)
    """A row for each model in the dtype of its configuration; empty if a model cannot be found."""
    checked: bool = True
    """Whether all models could be looked at; if not, the problem is why."""


def inspect_trio(large_base: Name, small_tuned: Name | Sequence[Name], small_base: Name) -> TrioReport:
    """Tell from configurations and tokenizers alone whether models would work together and what they need.

    Never raises for models that do not fit: the report says what is wrong. It lists the first obstacle
    only, since a trio that cannot be found or has two tokenizers need not be looked at further.
    """
    try:
        sources = find_sources(large_base, small_tuned, small_base)
        models = []
        for source in sources:
            model = without_weights(source.base or source)
            check_model(source.argument, model)
            models.append(model)
        sizes = {source.argument: adapter_shapes(source) for source in sources if source.is_adapter}
        for source in sources:
            if source.is_adapter:
                check_shapes(source, sizes[source.argument], models[-1])
    except IncompatibleModelsError as error:
        return TrioReport(problems=[str(error)], checked=not isinstance(error, UnavailableModelsError))
    rows = [
        describe_model(source.argument, model, source.has_chat_template)
        for source, model in zip(sources, models, strict=True)
    ]
    rows = [_of_adapter(row, sizes[row.role], models[-1]) if row.role in sizes else row for row in rows]
    problems = size_problems({row.role: row.vocabulary for row in rows})
    return TrioReport(problems, [*token_differences(sources), *_row_differences(rows)], rows)


def _of_adapter(
    row: ModelDescription, shapes: dict[str, tuple[int, ...]], base: PreTrainedModel
) -> ModelDescription:
    parameters = sum(map(math.prod, shapes.values()))
    return replace(row, parameters=parameters, bytes=parameters * base.dtype.itemsize)


def _row_differences(rows: Sequence[ModelDescription]) -> list[str]:
    found = []
    for what in ("architecture", "vocabulary", "context", "dtype", "chat_template"):
        values = [getattr(row, what) for row in rows]
        if len(set(values)) > 1:
            listed = ", ".join(f"{row.role} {value}" for row, value in zip(rows, values, strict=True))
            found.append(f"{what.replace('_', ' ')}: {listed}")
    return found
