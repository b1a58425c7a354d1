"""Speculative emulated fine-tuning for `large.generate(custom_generate=<the folder above>, ...)`.

Beside the arguments of `generate` it takes `decoder`, an EFTDecoder of this model; or the loaded models
`small_tuned` and `small_base`, and `eft_config`.
"""

from typing import Any

from speculative_eft.decoding.adapter import generate_from_folder


def generate(
    model: Any,
    inputs: Any = None,
    decoder: Any = None,
    small_tuned: Any = None,
    small_base: Any = None,
    eft_config: Any = None,
    **arguments: Any,
) -> Any:
    return generate_from_folder(model, inputs, decoder, small_tuned, small_base, eft_config, arguments)
