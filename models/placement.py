"""Where a model is, also when accelerate keeps its weights elsewhere or spreads its layers over devices."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import first_line


def home_device(model: PreTrainedModel) -> torch.device:
    """The device on which the model takes its tokens: that of its embedding when it runs."""
    embedding: Any = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = getattr(embedding, "weight", None)
    return model.device if weight is None else weight.device


def check_device(device: torch.device | str | int) -> None:
    """Raise ValueError, saying what torch says, if it can place nothing on `device`."""
    try:
        torch.empty(0, device=device)
    # Without CUDA torch fails by an assertion, for a device that is not there by an error of its run.
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error


def is_dispatched(model: PreTrainedModel) -> bool:
    """Whether accelerate's hooks move its weights or its layers' inputs."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())
