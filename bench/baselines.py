"""What speculation is compared with beside `NaiveEFTDecoder`: the large model decoding alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from speculative_eft.decoding import EFTOutput, EFTStats
from speculative_eft.decoding.request import read_options, read_prompts, read_seeds
from speculative_eft.decoding.round import PhaseTimer
from speculative_eft.kernels import Coefficients, NoiseKey, Stream, draft_step
from speculative_eft.models import EFTModels, EFTRunners

__all__ = ["LargeOnlyDecoder"]


class LargeOnlyDecoder:
    """Plain decoding of the large base alone: one step a token, on the runner and cache that EFT uses.

    Its tokens come from the large base's own law, not from the target of emulated fine-tuning: it is here
    for its speed.

    Args:
        models: the three models, or their runners; only the large one runs.
    """

    def __init__(self, models: EFTModels | EFTRunners) -> None:
        self._generation_configs: list[GenerationConfig] = []
        if isinstance(models, EFTModels):
            config = getattr(models.large_base, "generation_config", None)
            self._generation_configs += [] if config is None else [config]
            models = models.runners()
        self.runner = models.large

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        trace: bool = False,
        **generation_kwargs: Any,
    ) -> Tensor | EFTOutput:
        """Continue each prompt with tokens from the large base; arguments and errors as in `EFTDecoder`.

        Returns:
            int64 [batch, width + new tokens], or an `EFTOutput` without a trace.
        """
        if trace:
            raise ValueError("trace must be False: one model alone has no log-ratios to trace")
        runner = self.runner
        prompts = read_prompts(input_ids, attention_mask, runner.vocab_size)
        options = read_options(
            generation_config, generation_kwargs, self._generation_configs, input_ids.shape[1]
        )
        unread = [*options.general]
        unread += ["stop_strings"] * bool(options.stop_strings) + ["max_time"] * (
            options.max_time is not None
        )
        unread += ["num_return_sequences"] * (options.num_return_sequences > 1)
        if unread:
            raise ValueError(f"{unread[0]} is not supported by the large base's plain decoding here")
        batch, device = prompts.tokens.shape[0], runner.device
        seeds = read_seeds(seed, batch).to(device)
        length = prompts.longest + options.max_new_tokens
        if runner.max_context is not None and length > runner.max_context:
            raise ValueError(
                f"a prompt of {prompts.longest} tokens and max_new_tokens={options.max_new_tokens} exceed "
                f"the context of {runner.max_context} tokens"
            )
        weights = torch.ones(batch, 1, device=device)
        coefficients = Coefficients(alpha=weights, beta=weights[:, 0], draft_alpha=weights, draft_base=None)
        sampling = options.sampling(batch, runner.vocab_size, options.temperature, device)
        ends = torch.tensor(options.eos_token_ids, dtype=torch.int64, device=device)

        timer = PhaseTimer()
        runner.reserve(batch, length)
        lengths = prompts.lengths.to(device)
        runner.prefill(prompts.tokens[:, : prompts.longest - 1].to(device), lengths - 1)
        token = prompts.tokens.gather(1, (prompts.lengths - 1)[:, None])[:, 0].to(device)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        emitted = 0
        output: list[Tensor] = []
        timer.mark("prefill")
        for step in range(options.max_new_tokens):
            logits = runner.forward(token[:, None], prompts.longest + step)[:, 0]
            timer.mark("large")
            runner.lengths.add_(1)
            noise = NoiseKey(seeds=seeds, rounds=runner.lengths, positions=runner.lengths)
            token = draft_step(
                [logits], None, coefficients, sampling, noise, Stream.SHARED, 0, runner.vocab_size
            )
            timer.mark("verify")
            output.append(token.masked_fill(done, options.pad_token_id))
            emitted += batch - int(done.sum())
            done |= (token[:, None] == ends).any(dim=1)
            timer.mark("other")
            if bool(done.all()):
                break
        sequences = torch.cat([input_ids, torch.stack(output, dim=1).to(input_ids)], dim=1)
        if not options.return_dict_in_generate:
            return sequences
        stats = EFTStats(
            rounds=len(output),
            sequence_rounds=emitted,
            drafted_tokens=0,
            tested_tokens=0,
            accepted_tokens=0,
            emitted_tokens=emitted,
            accepted_by_position=(),
            expected_acceptance=0.0,
            seconds=timer.seconds,
        )
        return EFTOutput(sequences=cast("torch.LongTensor", sequences), stats=stats)
