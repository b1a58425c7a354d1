"""What speculation is compared with beside `NaiveEFTDecoder`: the large model alone, and a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from speculative_eft.decoding import EFTOutput, EFTStats
from speculative_eft.decoding.request import read_options, read_prompts, read_seeds
from speculative_eft.decoding.round import PhaseTimer, RoundPlan, new_round_state
from speculative_eft.decoding.running import CapturedBatch, RunningBatch, rounded_span
from speculative_eft.kernels import (
    Coefficients,
    NoiseKey,
    RoundState,
    Sampling,
    Stream,
    commit,
    draft_step,
)
from speculative_eft.models import CapturedFunctions, EFTModels, EFTRunners, Runner, graph_budget

__all__ = ["LargeOnlyDecoder", "LargeOnlyRounds", "PlainLoop"]


class LargeOnlyRounds(RunningBatch):
    """Rounds that are one step of the large base alone; captured, compacted and read as EFT's are."""

    def _runners(self) -> list[Runner]:
        return [self.runners.large]

    def _round(self, drafted: int, span: int, timer: PhaseTimer) -> Tensor:
        state, plan, _ = self._parts
        if self._captured is None:
            return _step(self.runners.large, state, plan, span, timer)
        span = rounded_span(span)
        report: Tensor = self._captured.graphs.run(
            (self.rows, span), lambda: _step(self.runners.large, state, plan, span, PhaseTimer())
        )
        return report


def _step(runner: Runner, state: RoundState, plan: RoundPlan, span: int, timer: PhaseTimer) -> Tensor:
    logits = runner.forward(state.last_token[:, None], span)[:, 0]
    timer.mark("large")
    noise = NoiseKey(seeds=state.seeds, rounds=state.rounds, positions=state.positions)
    token = draft_step(
        [logits], None, plan.coefficients, plan.sampling, noise, Stream.SHARED, 0, plan.vocab_size
    )
    timer.mark("verify")
    nothing = state.last_token.new_zeros(state.last_token.shape[0], 0)
    report = commit(
        state, nothing, torch.zeros_like(token), token, None, plan.eos_token_ids, None,
        [(runner.lengths, False)],
    )  # fmt: skip
    timer.mark("other")
    return report


class LargeOnlyDecoder:
    """Plain decoding of the large base alone: one step a token, on the runner and cache that EFT uses.

    Its tokens come from the large base's own law, not from the target of emulated fine-tuning: it is here
    for its speed.

    Args:
        models: the three models, or their runners; only the large one runs.
    """

    longest_draft = 0

    def __init__(self, models: EFTModels | EFTRunners) -> None:
        self._generation_configs: list[GenerationConfig] = []
        if isinstance(models, EFTModels):
            config = getattr(models.large_base, "generation_config", None)
            self._generation_configs += [] if config is None else [config]
            models = models.runners()
        self.runner = models.large
        # A batch asks for three roles, and for nothing but the lengths of what does not run.
        self.runners = EFTRunners(models.large, [], models.large)
        device = self.runner.device
        self.lagging = device.type == "cuda"
        graphs = CapturedFunctions(device, graph_budget(device)) if self.lagging else None
        self.captured = None if graphs is None else CapturedBatch(graphs)

    def new_state(
        self, last_token: Tensor, lengths: Tensor, seeds: Tensor, max_new_tokens: int, pad_token_id: int
    ) -> RoundState:
        """As `EFTDecoder.new_state`, without a draft."""
        no_draft = torch.zeros_like(last_token)
        return new_round_state(
            last_token, lengths, seeds, max_new_tokens, no_draft, 0, pad_token_id, None, self.lagging
        )

    def new_plan(
        self, sampling: Sampling, draft_sampling: Sampling, eos_token_ids: Sequence[int], statistics: bool
    ) -> RoundPlan:
        """As `EFTDecoder.new_plan`, of the large base's own law."""
        weights = torch.ones(sampling.temperature.shape[0], 1, device=self.runner.device)
        return RoundPlan(
            coefficients=Coefficients(
                alpha=weights, beta=weights[:, 0], draft_alpha=weights, draft_base=None
            ),
            sampling=sampling,
            draft_sampling=draft_sampling,
            acceptance="shared_seed",
            drafts_as_pair=False,
            vocab_size=self.runner.vocab_size,
            eos_token_ids=torch.tensor(eos_token_ids, dtype=torch.int64, device=self.runner.device),
            draft_length_rule=None,
            statistics=statistics,
        )

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
        batch, device = prompts.tokens.shape[0], runner.device
        seeds = read_seeds(seed, batch).to(device)
        length = prompts.longest + options.max_new_tokens
        if runner.max_context is not None and length > runner.max_context:
            raise ValueError(
                f"a prompt of {prompts.longest} tokens and max_new_tokens={options.max_new_tokens} exceed "
                f"the context of {runner.max_context} tokens"
            )
        timer = PhaseTimer()
        # One more: a round that the host has begun before it knows of the end.
        runner.reserve(batch, length + 1)
        lengths = prompts.lengths.to(device)
        runner.prefill(prompts.tokens[:, : prompts.longest - 1].to(device), lengths - 1)
        token = prompts.tokens.gather(1, (prompts.lengths - 1)[:, None])[:, 0].to(device)
        state = self.new_state(token, lengths, seeds, options.max_new_tokens, options.pad_token_id)
        sampling = options.sampling(batch, runner.vocab_size, options.temperature, device)
        plan = self.new_plan(sampling, sampling, options.eos_token_ids, False)
        if self.captured is not None:
            state, plan, _ = self.captured.take((state, plan, None), self.runners)
        timer.mark("prefill")
        ends = [prompts.longest + options.max_new_tokens] * batch
        running = LargeOnlyRounds(
            self.runners, state, plan, None, [prompts.longest] * batch, ends, self.captured
        )
        following, rounds = 0, 0
        while following >= 0:
            report = running.advance(0, timer)
            rounds += 1
            if report is None:
                continue
            following = max(row[1] for row in report.values())
            if following >= 0:
                running.compact([index for index, row in report.items() if row[1] < 0])
            timer.mark("other")
        running.restore()
        new = int(state.generated.max())
        sequences = torch.cat([input_ids, state.output[:, :new].to(input_ids)], dim=1)
        if not options.return_dict_in_generate:
            return sequences
        emitted = int(state.generated.sum())
        stats = EFTStats(
            rounds=rounds,
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


class PlainLoop:
    """Naive EFT as it is written in a few lines of transformers: three models, three `DynamicCache`s.

    Args:
        models: the three models, with one tuned model.
    """

    def __init__(self, models: EFTModels) -> None:
        self.models: list[PreTrainedModel] = [models.large_base, models.small_tuned[0], models.small_base]
        self.vocab_size = models.vocab_size
        self.caches: list[DynamicCache] = []

    @torch.inference_mode()
    def start(self, batch: int, context: int) -> None:
        """Begin with caches that hold random keys and values of `context` tokens a sequence."""
        self.caches = []
        for model in self.models:
            config = model.config
            heads = config.num_key_value_heads
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            cache = DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                shape = (batch, heads, context, dim)
                keys, values = (
                    torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in range(2)
                )
                cache.update(keys, values, layer)
            self.caches.append(cache)

    @torch.inference_mode()
    def run(self, token: Tensor, steps: int) -> Tensor:
        """Sample `steps` tokens after `token`, int64 [batch]; the last one."""
        for _ in range(steps):
            large, tuned, base = (
                model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
                .logits[:, -1, : self.vocab_size]
                .float()
                .log_softmax(dim=-1)
                for model, cache in zip(self.models, self.caches, strict=True)
            )
            law = (large + tuned - base).softmax(dim=-1)
            token = torch.multinomial(law, 1)[:, 0]
        return token
