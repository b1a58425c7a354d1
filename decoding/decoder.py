"""`EFTDecoder` and `NaiveEFTDecoder`: `generate` over the rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from speculative_eft.kernels import Coefficients, DraftMemory, RoundState, new_draft_memory, warm_up
from speculative_eft.models import EFTModels, EFTRunners

from .config import EFTConfig
from .draft_length import DraftLengthPolicy
from .output import EFTOutput, EFTStats, EFTTrace
from .request import GenerationOptions, Prompts, read_options, read_prompts, read_seeds
from .round import (
    PhaseTimer,
    RoundPlan,
    TraceBuffers,
    new_round_state,
    new_trace_buffers,
    speculative_round,
)

__all__ = ["EFTDecoder", "NaiveEFTDecoder", "Streamer"]


class Streamer(Protocol):
    """What receives tokens as they are committed; transformers' streamers fit."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, int64 [1, width], and then each round's tokens, int64 [count]."""

    def end(self) -> None:
        """The output is complete."""


class EFTDecoder:
    """Samples exactly from an emulated fine-tuned model by speculation.

    Args:
        models: the three models, or their runners (anything with the `Runner` protocol).
        config: the target law and how it is drafted.

    Raises:
        ValueError: if `config` does not fit the models.
    """

    def __init__(self, models: EFTModels | EFTRunners, config: EFTConfig | None = None) -> None:
        self.config = config or EFTConfig()
        self.models = models if isinstance(models, EFTModels) else None
        self.runners = models.runners() if isinstance(models, EFTModels) else models
        experts = len(self.runners.tuned)
        if len(self.config.alphas) not in (1, experts):
            raise ValueError(f"alpha has {len(self.config.alphas)} values for {experts} tuned models")
        self.vocab_size = min(runner.vocab_size for runner in self._all_runners())
        warm_up(self.runners.large.device)
        self.policy = self._policy()

    def _all_runners(self) -> list[Any]:
        return [self.runners.large, *self.runners.tuned, self.runners.base]

    def _policy(self) -> DraftLengthPolicy | None:
        if self.config.draft_tokens != "auto":
            return None
        if self.config.cost_ratio is not None:
            return DraftLengthPolicy(self.config.cost_ratio)
        if self.models is None:
            raise ValueError('draft_tokens="auto" with bare runners needs cost_ratio')
        sizes = [
            sum(parameter.numel() for parameter in model.parameters())
            for model in (self.models.large_base, *self.models.small_tuned, self.models.small_base)
        ]
        stepping = sum(sizes[1:]) if self._drafts_as_pair() else sum(sizes[1:-1])
        return DraftLengthPolicy(stepping / sizes[0])

    def _alphas(self) -> tuple[float, ...]:
        alphas = self.config.alphas
        return alphas if len(alphas) > 1 else alphas * len(self.runners.tuned)

    def _drafts_as_pair(self) -> bool:
        if self.config.draft == "auto":
            return abs(sum(self._alphas()) - 1) > 1e-6
        return self.config.draft == "pair"

    def _coefficients(self, batch: int, device: torch.device) -> Coefficients:
        alphas = torch.tensor(self._alphas(), dtype=torch.float32, device=device)
        total = float(alphas.sum())
        draft_base = None
        draft_alphas = alphas
        if self._drafts_as_pair():
            draft_base = torch.full((batch,), 1 - total, device=device)
        elif total > 0:
            draft_alphas = alphas / total
        else:
            # The tuned models cancel out of the target; any law may draft, so all of them do.
            draft_alphas = torch.full_like(alphas, 1 / len(alphas))
        top_p = self.config.conservative_top_p
        beta = torch.tensor(float(self.config.beta), device=device)
        base_weight = 1 - alphas.sum()
        weights = torch.stack([beta, *alphas, base_weight - beta, *draft_alphas])
        if draft_base is not None or top_p is not None:
            weights = torch.cat([weights, base_weight[None]])
        return Coefficients(
            alpha=alphas.expand(batch, -1),
            beta=beta.expand(batch),
            draft_alpha=draft_alphas.expand(batch, -1),
            draft_base=draft_base,
            conservative_top_p=None if top_p is None else torch.full((batch,), top_p, device=device),
            some_weight_is_zero=bool((weights == 0).any()),
        )

    def _generation_configs(self) -> list[GenerationConfig]:
        if self.models is None:
            return []
        models = (self.models.large_base, *self.models.small_tuned, self.models.small_base)
        configs = [getattr(model, "generation_config", None) for model in models]
        return [config for config in configs if config is not None]

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        tuned_input_ids: Tensor | None = None,
        streamer: Streamer | None = None,
        trace: bool = True,
        **generation_kwargs: Any,
    ) -> Tensor | EFTOutput:
        """Continue each prompt with tokens from the target.

        Args:
            input_ids: integers [batch, width], the bases' prompts; padding anywhere `attention_mask` is 0.
            attention_mask: [batch, width], or None where nothing is padding.
            generation_config: options as transformers names them; keywords take precedence over it.
            seed: an int (sequence i gets a seed derived from it and i), one int a sequence (whose output
                then depends on nothing else), or None to draw one from torch's default generator.
            tuned_input_ids: other prompts [batch, width'] for the tuned models, without padding; None for
                the bases' prompts.
            streamer: receives the prompt and then each round's tokens; for one sequence only.
            trace: whether an `EFTOutput` has the per-token trace, which costs a few per cent of a round of
                small models.
            **generation_kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
                `eos_token_id`, `pad_token_id`, `return_dict_in_generate`...

        Returns:
            int64 [batch, width + new tokens]; rows that end early are padded. With
            `return_dict_in_generate=True` an `EFTOutput` holding them, statistics and a per-token trace.

        Raises:
            ValueError: for bad input, before any model runs.
        """
        prompts = read_prompts(input_ids, attention_mask, self.vocab_size)
        options = read_options(
            generation_config, generation_kwargs, self._generation_configs(), input_ids.shape[1]
        )
        tuned_prompts = prompts
        if tuned_input_ids is not None:
            tuned_prompts = read_prompts(tuned_input_ids, None, self.vocab_size, "tuned_input_ids")
        batch = prompts.tokens.shape[0]
        if tuned_prompts.tokens.shape[0] != batch:
            raise ValueError(f"tuned_input_ids has {tuned_prompts.tokens.shape[0]} prompts for {batch}")
        if streamer is not None and batch > 1:
            raise ValueError(f"streamer takes one sequence, got a batch of {batch}")
        seeds = read_seeds(seed, batch)
        self._check_context(prompts, tuned_prompts, options)

        timer = PhaseTimer()
        state, plan = self._start(prompts, tuned_prompts, options, seeds)
        buffers = None
        if options.return_dict_in_generate and trace:
            buffers = new_trace_buffers(state, len(self.runners.tuned))
        timer.mark("prefill")
        if streamer is not None:
            streamer.put(input_ids.cpu())
        longest = max(prompts.longest, tuned_prompts.longest)
        rounds = self._run(state, plan, longest, timer, buffers, streamer)
        if streamer is not None:
            streamer.end()
        return self._output(input_ids, state, options, rounds, timer, buffers)

    def _check_context(self, prompts: Prompts, tuned_prompts: Prompts, options: GenerationOptions) -> None:
        for runner in self._all_runners():
            longest = (tuned_prompts if runner in self.runners.tuned else prompts).longest
            context = runner.max_context
            if context is not None and longest + options.max_new_tokens > context:
                raise ValueError(
                    f"a prompt of {longest} tokens and max_new_tokens={options.max_new_tokens} exceed the "
                    f"context of {context} tokens; "
                    + (
                        f"at most {context - longest} new tokens fit"
                        if longest < context
                        else "shorten the prompt"
                    )
                )

    def _first_draft_lens(self, batch: int, device: torch.device) -> Tensor:
        if self.config.draft_tokens != "auto":
            return torch.full((batch,), self.config.draft_tokens, dtype=torch.int64, device=device)
        assert self.policy is not None
        nothing = torch.zeros(batch, device=device)
        return self.policy.rule(device).draft_lens(nothing, nothing)

    def _new_memory(self, batch: int, longest_draft: int, device: torch.device) -> DraftMemory | None:
        if self.config.remembered == 0:
            return None
        slots = max(self.config.remembered, longest_draft + 1)
        return new_draft_memory(batch, slots, self.vocab_size, device)

    def _start(
        self,
        prompts: Prompts,
        tuned_prompts: Prompts,
        options: GenerationOptions,
        seeds: Tensor,
    ) -> tuple[RoundState, RoundPlan]:
        batch = prompts.tokens.shape[0]
        device = self.runners.large.device
        draft_lens = self._first_draft_lens(batch, device)
        longest_draft = self.policy.longest if self.policy is not None else int(draft_lens.max())
        draft_lens.clamp_(max=options.max_new_tokens - 1)
        for runner in self._all_runners():
            own = tuned_prompts if runner in self.runners.tuned else prompts
            runner.reserve(batch, own.longest + options.max_new_tokens + longest_draft + 1)
            runner.prefill(own.tokens[:, : own.longest - 1].to(device), (own.lengths - 1).to(device))
        last_token = prompts.tokens.gather(1, (prompts.lengths - 1)[:, None])[:, 0].to(device)
        state = new_round_state(
            last_token=last_token,
            prompt_lengths=prompts.lengths.to(device),
            seeds=seeds.to(device),
            max_new_tokens=options.max_new_tokens,
            draft_lens=draft_lens,
            longest_draft=longest_draft,
            pad_token_id=options.pad_token_id,
            memory=self._new_memory(batch, longest_draft, device),
        )
        temperature = options.temperature
        draft_temperature = self.config.draft_temperature if temperature > 0 else None
        plan = RoundPlan(
            coefficients=self._coefficients(batch, device),
            sampling=options.sampling(batch, self.vocab_size, temperature, device),
            draft_sampling=options.sampling(batch, self.vocab_size, draft_temperature or temperature, device),
            acceptance=self.config.acceptance,
            drafts_as_pair=self._drafts_as_pair(),
            vocab_size=self.vocab_size,
            eos_token_ids=torch.tensor(options.eos_token_ids, dtype=torch.int64, device=device),
            draft_length_rule=None if self.policy is None else self.policy.rule(device),
            statistics=options.return_dict_in_generate,
        )
        return state, plan

    def _run(
        self,
        state: RoundState,
        plan: RoundPlan,
        longest_prompt: int,
        timer: PhaseTimer,
        trace: TraceBuffers | None,
        streamer: Streamer | None,
    ) -> int:
        drafted = int(state.draft_lens.max())
        most_generated = rounds = 0
        totals = [0] * state.done.shape[0]
        while drafted >= 0:
            span = longest_prompt + most_generated + drafted + 1
            report = speculative_round(self.runners, state, plan, drafted, span, timer, trace)
            rounds += 1
            rows = report.tolist()
            for index, (count, _, *tokens) in enumerate(rows):
                totals[index] += count
                if streamer is not None and count:
                    streamer.put(torch.tensor(tokens[:count]))
            most_generated = max(totals)
            drafted = max(row[1] for row in rows)
            timer.mark("other")
        return rounds

    def _output(
        self,
        input_ids: Tensor,
        state: RoundState,
        options: GenerationOptions,
        rounds: int,
        timer: PhaseTimer,
        buffers: TraceBuffers | None,
    ) -> Tensor | EFTOutput:
        new = int(state.generated.max())
        sequences = torch.cat([input_ids, state.output[:, :new].to(input_ids)], dim=1)
        if not options.return_dict_in_generate:
            return sequences
        tested = state.tested.sum().item()
        pairs = zip(state.accepted_at.tolist(), state.tested_at.tolist(), strict=True)
        stats = EFTStats(
            rounds=rounds,
            sequence_rounds=int(state.rounds.sum()),
            drafted_tokens=int(state.drafted.sum()),
            tested_tokens=int(tested),
            accepted_tokens=int(state.accepted.sum()),
            emitted_tokens=int(state.generated.sum()),
            accepted_by_position=tuple(accepted / count for accepted, count in pairs if count),
            expected_acceptance=float(state.expected.sum() / tested) if tested else 0.0,
            seconds=timer.seconds,
        )
        traced = None
        if buffers is not None:
            traced = EFTTrace(
                source_ids=buffers.source[:, :new],
                large=buffers.large[:, :new],
                tuned=[tuned[:, :new] for tuned in buffers.tuned],
                base=buffers.base[:, :new],
                target=buffers.target[:, :new],
            )
        return EFTOutput(sequences=cast("torch.LongTensor", sequences), stats=stats, trace=traced)


class NaiveEFTDecoder(EFTDecoder):
    """Plain decoding of the target: one step of each model a token, on the same runners and caches.

    It draws with the noise of `acceptance="shared_seed"`, so a speculative decoder of that rule gives
    the same tokens for the same seed. How to draft plays no part.
    """

    def __init__(self, models: EFTModels | EFTRunners, config: EFTConfig | None = None) -> None:
        config = config or EFTConfig()
        plain = dataclasses.replace(config, acceptance="shared_seed", draft_tokens=1, remembered=0)
        super().__init__(models, plain)

    def _first_draft_lens(self, batch: int, device: torch.device) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=device)
