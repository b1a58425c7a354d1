"""`EFTDecoder` and `NaiveEFTDecoder`: `generate` over the rounds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from speculative_eft.kernels import (
    Coefficients,
    DraftLengthRule,
    DraftMemory,
    RoundState,
    Sampling,
    new_draft_memory,
    side_by_side,
    warm_up,
)
from speculative_eft.models import (
    EFTModels,
    EFTRunners,
    ModelRunner,
    caches_fit,
    caches_hold,
    captured_functions,
    check_caches,
)

from .adapter import continue_for_transformers
from .call import Arguments, Call, read_call
from .chat import Chat, PlainChat
from .config import EFTConfig
from .draft_length import LONGEST_DRAFT, DraftLengthPolicy
from .general import ScoreBuffers, general_round, new_score_buffers
from .options import GenerationOptions
from .output import CACHE_FIELD, EFTOutput, a_token_each, ordinary, table_of, totals
from .own_prompts import FirstRound, first_round_of_own_prompts
from .past import DEFAULT_CHUNK, EFTPast, extended, kept_lengths, reserved_cache
from .processors import PrefixFunction
from .prompts import Prompts, read_prompts, repeated
from .round import (
    PhaseTimer,
    RoundPlan,
    TraceBuffers,
    new_round_state,
    new_trace_buffers,
)
from .running import CapturedBatch, RunningBatch
from .scoring import TokenScores, score_tokens
from .sequences import end_rows
from .stopping import StopWatch, cut
from .streaming import Streamer, TokenCallback, begin_stream, end_stream, stream

__all__ = ["EFTDecoder", "NaiveEFTDecoder"]

_log = logging.getLogger(__name__)


class EFTDecoder:
    """Samples exactly from an emulated fine-tuned model by speculation.

    Args:
        models: the three models, or their runners: `EFTRunners` of anything with the `Runner` protocol.
        config: the target law and how it is drafted.

    Raises:
        ValueError: if `models` or `config` is of another type, or `config` does not fit the models.
    """

    def __init__(self, models: EFTModels | EFTRunners, config: EFTConfig | None = None) -> None:
        if not isinstance(models, EFTModels | EFTRunners):
            raise ValueError(f"models must be EFTModels or their runners, got {type(models).__name__}")
        if not isinstance(config, EFTConfig | None):
            raise ValueError(f"config must be an EFTConfig, got {type(config).__name__}")
        self.config = config or EFTConfig()
        self.models = models if isinstance(models, EFTModels) else None
        self.runners = models.runners() if isinstance(models, EFTModels) else models
        experts = len(self.runners.tuned)
        if len(self.config.alphas) not in (1, experts):
            raise ValueError(
                f"alpha has {len(self.config.alphas)} values: give one, or one for each tuned model "
                f"({experts} here)"
            )
        self.vocab_size = min(runner.vocab_size for runner in self.runners.every)
        if self._drafts_by_copies():
            if self.models is None:
                raise ValueError('draft_weights="int8" needs models, not their runners')
            drafters = self.models.quantised_drafters(self._drafts_as_pair())
            self.runners = dataclasses.replace(self.runners, drafters=drafters)
        warm_up(self.runners.large.device)
        if self.models is None and self.config.draft_tokens == "auto" and self.config.cost_ratio is None:
            raise ValueError('draft_tokens="auto" with bare runners needs cost_ratio')
        self._past: EFTPast | None = None
        device = self.runners.large.device
        # On a GPU the host starts a round before it has read the last one, and replays what it captured.
        self.lagging = device.type == "cuda"
        graphs = captured_functions(self.runners.every)
        self.captured = None if graphs is None else CapturedBatch(graphs)
        self._general_is_reported = self._batch_is_reported = False

    @cached_property
    def policy(self) -> DraftLengthPolicy | None:
        """Chooses draft lengths, by costs measured when it is first needed; None where they are fixed."""
        if self.config.draft_tokens != "auto":
            return None
        is_batched = self.config.expected_batch > 1
        if self.config.cost_ratio is not None:
            return DraftLengthPolicy(self.config.cost_ratio, self.config.row_cost, is_batched)
        assert self.models is not None
        costs = self.models.step_costs(
            self._drafts_as_pair(), self.config.expected_batch, bool(self.runners.drafters)
        )
        return DraftLengthPolicy(costs.cost_ratio, costs.row_cost, is_batched)

    def _alphas(self) -> tuple[float, ...]:
        alphas = self.config.alphas
        return alphas if len(alphas) > 1 else alphas * len(self.runners.tuned)

    def _drafts_as_pair(self) -> bool:
        if self.config.draft == "auto":
            return abs(sum(self._alphas()) - 1) > 1e-6
        return self.config.draft == "pair"

    def _drafts_by_copies(self) -> bool:
        """Whether copies of eight bits are to draft that do not yet."""
        if self.runners.drafters or self.config.draft_weights == "own":
            return False
        if self.config.draft_weights == "int8":
            return True
        return (
            self.config.expected_batch == 1
            and self.models is not None
            and self.models.drafts_faster_quantised(self._drafts_as_pair())
        )

    def _coefficients(self, batch: int, device: torch.device) -> Coefficients:
        # Made on the host, which would wait for a GPU's rounds to read a number from there.
        alphas = torch.tensor(self._alphas(), dtype=torch.float32)
        total = float(alphas.sum())
        draft_base = None
        draft_alphas = alphas
        if self._drafts_as_pair():
            draft_base = torch.full((batch,), 1 - total)
        elif total > 0:
            draft_alphas = alphas / total
        else:
            # The tuned models cancel out of the target; any law may draft, so all of them do.
            draft_alphas = torch.full_like(alphas, 1 / len(alphas))
        top_p = self.config.conservative_top_p
        if top_p == 1:
            # The set is all tokens; summing up masses would leave out those whose own underflows.
            top_p = None
        beta = torch.tensor(float(self.config.beta))
        base_weight = 1 - alphas.sum()
        weights = torch.stack([beta, *alphas, base_weight - beta, *draft_alphas])
        if draft_base is not None or top_p is not None:
            weights = torch.cat([weights, base_weight[None]])
        return Coefficients(
            # Kernels read a number a sequence.
            alpha=alphas.repeat(batch, 1).to(device, non_blocking=True),
            beta=beta.repeat(batch).to(device, non_blocking=True),
            draft_alpha=draft_alphas.repeat(batch, 1).to(device, non_blocking=True),
            draft_base=None if draft_base is None else draft_base.to(device, non_blocking=True),
            conservative_top_p=None if top_p is None else torch.full((batch,), top_p, device=device),
            some_weight_is_zero=bool((weights == 0).any()),
        )

    def _generation_configs(self) -> list[GenerationConfig]:
        if self.models is None:
            return []
        models = (self.models.large_base, *self.models.small_tuned, self.models.small_base)
        configs = [getattr(model, "generation_config", None) for model in models]
        return [config for config in configs if config is not None]

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        tuned_input_ids: Tensor | None = None,
        tuned_attention_mask: Tensor | None = None,
        chat: Chat | Sequence[Chat] | None = None,
        chat_rendering: PlainChat | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: PrefixFunction | None = None,
        tokenizer: Any = None,
        past_key_values: EFTPast | None = None,
        cache: EFTPast | None = None,
        inputs: Tensor | None = None,
        streamer: Streamer | TokenCallback | None = None,
        trace: bool = True,
        **generation_kwargs: Any,
    ) -> Tensor | EFTOutput:
        """Continue each prompt with tokens from the target.

        Every field of transformers' `GenerationConfig` is honoured or refused (docs/generation_config.md).

        Args:
            input_ids: integers [batch, width], the bases' prompts; padding anywhere `attention_mask` is 0.
            attention_mask: [batch, width], or None where nothing is padding; as in transformers a pad token
                then counts as padding unless it is an end of sequence of the large base, or of the call if
                that names some.
            generation_config: options as transformers names them; keywords take precedence over it.
            seed: an int (sequence i gets a seed derived from it and i), one int a sequence (whose output
                then depends on nothing else), or None to draw one from torch's default generator.
            tuned_input_ids: other prompts [batch, width'] for the tuned models, None for the bases' prompts;
                they may hold any id of the tuned models' vocabulary.
            tuned_attention_mask: [batch, width'], 0 where `tuned_input_ids` is padding.
            chat: instead of prompts, a list of messages `{"role": ..., "content": ...}` or a batch of such
                lists: the tuned models get their chat template, the bases a plain rendering.
            chat_rendering: makes the bases' text of a conversation, None for `plain_chat`.
            logits_processor: processors of the target's mixed logits, functions of `(input_ids, scores)`
                alone: along a draft they are asked about tokens that may not be kept.
            stopping_criteria: asked about every committed token; the first that says so ends its sequence.
            prefix_allowed_tokens_fn: as in transformers, from a sequence's index and tokens to allowed ids.
            tokenizer: for `stop_strings` and `chat`, None for the models' own.
            past_key_values: of the output of the call before, whose prompts these go on from: only what is
                new is prefilled.
            cache: newer transformers' name of `past_key_values`.
            inputs: another name of `input_ids`.
            streamer: receives the prompt and then each round's tokens, for one sequence; or a function that
                takes a sequence's index and its new tokens, for any batch.
            trace: whether an `EFTOutput` has the per-token trace, which costs a few per cent of a round of
                small models.
            **generation_kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
                `eos_token_id`, `pad_token_id`, `return_dict_in_generate`...

        Returns:
            int64 [batch * num_return_sequences, width + new tokens]; rows that end early are padded. With
            `return_dict_in_generate=True` an `EFTOutput` holding them, statistics and a per-token trace.

        Raises:
            ValueError: for bad input, before any model runs.
        """
        for name, other, both in (
            ("inputs", "input_ids", (inputs, input_ids)),
            ("cache", "past_key_values", (cache, past_key_values)),
        ):
            if all(value is not None for value in both):
                raise ValueError(f"{name} is another name of {other}; give one of them")
        given = Arguments(
            input_ids if inputs is None else inputs, attention_mask, generation_config, generation_kwargs,
            seed, tuned_input_ids, tuned_attention_mask, chat, chat_rendering, logits_processor,
            stopping_criteria, prefix_allowed_tokens_fn, tokenizer,
            past_key_values if cache is None else cache, streamer,
        )  # fmt: skip
        with self.runners.turn(), torch.inference_mode():
            call = read_call(
                given,
                self.models,
                self._generation_configs(),
                self.vocab_size,
                min(runner.vocab_size for runner in self.runners.tuned),
                self.runners.large.device,
                self.config.draft_temperature,
            )
            self._check_context(call.prompts, call.tuned_prompts, call.options)
            output = self._generate(call, trace)
        return ordinary(output)

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenScores:
        """What the target says of given tokens, by one pass of each model.

        Args:
            input_ids: integers [batch, width]; no model reads the last token of a row, which may lie one
                beyond their context.
            attention_mask: [batch, width], 0 where `input_ids` is padding; None where nothing is.

        Raises:
            ValueError: for bad input, before any model runs.
        """
        prompts = read_prompts(input_ids, attention_mask, self.vocab_size)
        context = self.runners.max_context
        if context is not None and prompts.longest - 1 > context:
            raise ValueError(
                f"input_ids has {prompts.longest} tokens, and all but the last exceed the context of "
                f"{context} tokens"
            )
        runners, batch = self.runners.every, prompts.tokens.shape[0]
        # Of a chunk every model's logits, and in float32 the mix, its normalised law, and one on the way.
        beside = (2 * len(runners) + 12) * min(prompts.longest, DEFAULT_CHUNK) * self.vocab_size
        check_caches(runners, batch, [prompts.longest] * len(runners), 0, beside, "input_ids")
        with self.runners.turn(), torch.inference_mode():
            self._past = None
            coefficients = self._coefficients(batch, self.runners.large.device)
            scores = score_tokens(self.runners, prompts, coefficients, self.vocab_size)
        return ordinary(scores)

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Sequence[StoppingCriteria],
        generation_config: GenerationConfig,
        *,
        seed: int | Sequence[int] | None = None,
        tuned_input_ids: Tensor | None = None,
        tuned_attention_mask: Tensor | None = None,
        eft_streamer: Streamer | TokenCallback | None = None,
        eft_stop_strings: str | Sequence[str] | None = None,
        eft_tokenizer: Any = None,
        trace: bool = True,
        **model_kwargs: Any,
    ) -> Tensor | EFTOutput:
        """For transformers: `large.generate(**inputs, custom_generate=decoder.custom_generate, ...)`.

        All of `generate`'s arguments mean what they mean there, and these may be given beside them:

        Args:
            model to generation_config: what `generate` prepares.
            seed, tuned_input_ids, tuned_attention_mask, trace: as in `EFTDecoder.generate`; prompts of the
                tuned models are one for each prompt, whatever `num_return_sequences` is.
            eft_streamer, eft_stop_strings, eft_tokenizer: `streamer`, `stop_strings` and `tokenizer`, which
                `generate` keeps to itself when `custom_generate` is a function.
        """
        copies = generation_config.num_return_sequences or 1
        stop_strings = {} if eft_stop_strings is None else {"stop_strings": eft_stop_strings}
        return continue_for_transformers(
            self,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            seed=seed,
            tuned_input_ids=repeated(tuned_input_ids, copies),
            tuned_attention_mask=repeated(tuned_attention_mask, copies),
            streamer=eft_streamer,
            tokenizer=eft_tokenizer,
            trace=trace,
            **stop_strings,
        )

    def _generate(self, call: Call, with_trace: bool) -> Tensor | EFTOutput:
        options, streamer = call.options, call.streamer
        # Where costs have to be measured first, that is no part of the prefill.
        _ = self.policy
        timer = PhaseTimer()
        kept = self._kept(call)
        self._past = None
        state, plan = self._start(call.prompts, call.tuned_prompts, options, call.seeds, kept)
        trace = None
        if options.return_dict_in_generate and with_trace:
            trace = new_trace_buffers(state, len(self.runners.tuned))
        if self.captured is not None:
            state, plan, trace = self.captured.take((state, plan, trace), self.runners)
        watch = None
        if call.criteria:
            watch = StopWatch(call.criteria, call.input_ids, options.max_new_tokens, options.pad_token_id)
        timer.mark("prefill")
        begin_stream(streamer, call.input_ids)
        # On the general path the models draft themselves.
        runners = self.runners if call.processing is None else dataclasses.replace(self.runners, drafters=[])
        first = first_round_of_own_prompts(runners, state, call.prompts, call.tuned_prompts)
        longest = max(call.prompts.longest, call.tuned_prompts.longest)
        if call.processing is None:
            buffers = ScoreBuffers(None, None)
            rounds = self._run(state, plan, longest, timer, trace, streamer, watch, first)
        else:
            self._report_general(call)
            buffers = new_score_buffers(state, self.vocab_size, options.output_scores, options.output_logits)
            rounds = self._run_general(
                runners, state, plan, call, longest, timer, trace, buffers, watch, first
            )
        if watch is not None:
            cut(state, trace, watch.stopped, options.pad_token_id)
        end_stream(streamer)
        return self._output(call, state, rounds, timer, trace, buffers)

    def _check_numbers(self) -> None:
        """Refuse what came of passes whose results are no numbers: such logits leave every token out."""
        for name, runner in zip(self.runners.names, self.runners.every, strict=True):
            if isinstance(runner, ModelRunner) and not bool(runner.cache.holds_numbers()):
                kind = f"{type(runner.model).__name__}, {str(runner.model.dtype).removeprefix('torch.')}"
                raise ValueError(
                    f"{name} ({kind}) gave values that are not finite: its weights are broken, or "
                    "its activations are beyond its dtype, as those of some models are beyond float16; try "
                    'dtype="bfloat16"'
                )

    def _kept(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """For each prompt, the tokens that the bases' and the tuned models' caches hold already."""
        past = call.past
        if past is None or past is not self._past or not call.options.use_cache:
            return None
        if past.base.tokens.shape[0] != call.prompts.tokens.shape[0]:
            return None
        if past.reservations != self.runners.large.reservations:
            return None
        return kept_lengths(past.base, call.prompts), kept_lengths(past.tuned, call.tuned_prompts)

    def _report_general(self, call: Call) -> None:
        if not self._general_is_reported:
            self._general_is_reported = True
            names = ", ".join(call.options.general) or "logits_processor or prefix_allowed_tokens_fn"
            _log.warning("%s: not known to the fused rounds; decoding takes the general, slower path", names)

    def _report_batch(self, batch: int) -> None:
        expected = self.config.expected_batch
        if self.config.draft_tokens == "auto" and batch >= 2 * expected and not self._batch_is_reported:
            self._batch_is_reported = True
            _log.warning(
                "a batch of %d, but draft lengths are chosen for %d at a time: EFTConfig(expected_batch=%d) "
                "is faster, and the law the same", batch, expected, batch,
            )  # fmt: skip

    def _check_context(self, prompts: Prompts, tuned_prompts: Prompts, options: GenerationOptions) -> None:
        for runner in self.runners.every:
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

    @property
    def _ends_drafts(self) -> bool:
        """Whether rounds can end a draft by what was drawn, and are faster for it.

        In a batch steps are shared: a draft that outlasts the others pays for its own alone, and one that
        ends before them spares none.
        """
        if self.policy is None or self.lagging or self._drafts_as_pair() or self.config.expected_batch > 1:
            return False
        drafting = self.runners.drafters or self.runners.tuned
        return len(drafting) == 1 and drafting[0].ends_drafts

    def _draft_length_rule(self, device: torch.device) -> DraftLengthRule | None:
        return None if self.policy is None else self.policy.rule(device, self._ends_drafts)

    def first_draft_len(self, greedy: bool) -> int:
        """Most tokens that the first round drafts for sequences that are `greedy` or not."""
        if self.config.draft_tokens != "auto":
            return self.config.draft_tokens
        assert self.policy is not None
        return self.policy.first(self._ends_drafts, greedy)

    def _new_memory(self, batch: int, longest_draft: int, device: torch.device) -> DraftMemory | None:
        if self.config.remembered == 0 or longest_draft == 0:
            return None
        slots = max(self.config.remembered, longest_draft + 1)
        return new_draft_memory(batch, slots, self.vocab_size, device)

    def _start(
        self,
        prompts: Prompts,
        tuned_prompts: Prompts,
        options: GenerationOptions,
        seeds: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[RoundState, RoundPlan]:
        batch = prompts.tokens.shape[0]
        device = self.runners.large.device
        self._report_batch(batch)
        room = options.max_new_tokens + self.longest_draft + 1
        kept = self._room_for_caches(prompts, tuned_prompts, options.max_new_tokens, kept)
        fills = []
        for runner in self.runners.every:
            is_tuned = runner in self.runners.tuned
            own = tuned_prompts if is_tuned else prompts
            held = None if kept is None else kept[is_tuned]
            fills.append(reserved_cache(runner, own, room, held, options.prefill_chunk_size))
        by_large, *by_small = fills
        side_by_side(device, by_large, lambda: [fill() for fill in by_small])
        last_token = prompts.tokens.gather(1, (prompts.lengths - 1)[:, None])[:, 0].to(device)
        state = self.new_state(
            last_token, prompts.lengths.to(device), seeds.to(device), options.max_new_tokens,
            options.pad_token_id, greedy=options.temperature == 0,
        )  # fmt: skip
        temperature = options.temperature
        draft_temperature = self.config.draft_temperature if temperature > 0 else None
        plan = self.new_plan(
            options.sampling(batch, self.vocab_size, temperature, device),
            options.sampling(batch, self.vocab_size, draft_temperature or temperature, device),
            options.eos_token_ids,
            options.return_dict_in_generate,
        )
        return state, plan

    def _room_for_caches(
        self,
        prompts: Prompts,
        tuned_prompts: Prompts,
        max_new_tokens: int,
        kept: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor] | None:
        """`kept`, or None where memory holds no larger caches beside the present ones; raises ValueError."""
        batch, beyond = prompts.tokens.shape[0], self.longest_draft + 1
        runners, beside = self.runners.every, self.bytes_beside_caches
        longest = [(tuned_prompts if runner in self.runners.tuned else prompts).longest for runner in runners]
        lengths = [length + max_new_tokens for length in longest]
        whole = [length + beyond for length in lengths]
        if self.captured is not None and not caches_hold(runners, batch, whole):
            # Memory of graphs, which other caches make useless, would count as free.
            self.captured.forget()
        if kept is not None and caches_fit(runners, batch, whole, beside, growing=True):
            return kept
        names = "input_ids and max_new_tokens"
        check_caches(runners, batch, lengths, beyond, beside, names)
        return None

    @property
    def bytes_beside_caches(self) -> int:
        """Bytes a sequence for what it remembers and for the logits of a round."""
        rows = self.longest_draft + 1
        drafters = len(self.runners.drafters)
        # The drafters' own, and in float32 the law that they make.
        logits = 2 * rows * (len(self.runners.every) + drafters + 2 * (drafters > 0)) * self.vocab_size
        # Its log-ratios, their mean, and the corrections of a draft.
        remembered = max(self.config.remembered, rows) + rows if self.config.remembered and rows > 1 else 0
        return int(logits + 4 * remembered * self.vocab_size)

    @property
    def longest_draft(self) -> int:
        """Most tokens that a round of any sequences may draft: greedy ones never draft less than others."""
        return self._longest_draft_of(greedy=True)

    def _longest_draft_of(self, greedy: bool) -> int:
        first = self.first_draft_len(greedy)
        # Where nothing is drafted nothing is learnt of drafts: what begins with plain steps stays with them.
        return first if self.policy is None or first == 0 else LONGEST_DRAFT

    def new_state(
        self,
        last_token: Tensor,
        lengths: Tensor,
        seeds: Tensor,
        max_new_tokens: int,
        pad_token_id: int,
        greedy: bool = False,
        longest_draft: int | None = None,
    ) -> RoundState:
        """The state of sequences whose prompts, of `lengths` tokens, are filled up to `last_token`.

        All of these are int64 [batch]. Memory of the draft and draft lengths are those of the config.
        `longest_draft` is what there is room for, None for what such sequences, `greedy` or not, may draft.
        """
        batch, device = last_token.shape[0], last_token.device
        early_stop = self.policy.early_stop(batch, device) if self._ends_drafts and self.policy else None
        if longest_draft is None:
            longest_draft = self._longest_draft_of(greedy)
        first = min(self.first_draft_len(greedy), max_new_tokens - 1)
        return new_round_state(
            last_token=last_token,
            prompt_lengths=lengths,
            seeds=seeds,
            max_new_tokens=max_new_tokens,
            draft_lens=torch.full((batch,), first, dtype=torch.int64, device=device),
            longest_draft=longest_draft,
            pad_token_id=pad_token_id,
            memory=self._new_memory(batch, longest_draft, device),
            prior_accepted=self.policy.prior_accepted(self._ends_drafts, greedy) if self.policy else 0.0,
            early_stop=early_stop,
            lagging=self.lagging,
        )

    def new_plan(
        self, sampling: Sampling, draft_sampling: Sampling, eos_token_ids: Sequence[int], statistics: bool
    ) -> RoundPlan:
        """The plan of rounds of this decoder's law for sequences with this sampling."""
        batch, device = sampling.temperature.shape[0], sampling.temperature.device
        return RoundPlan(
            coefficients=self._coefficients(batch, device),
            sampling=sampling,
            draft_sampling=draft_sampling,
            acceptance=self.config.acceptance,
            drafts_as_pair=self._drafts_as_pair(),
            vocab_size=self.vocab_size,
            eos_token_ids=torch.tensor(eos_token_ids, dtype=torch.int64).to(device, non_blocking=True),
            draft_length_rule=self._draft_length_rule(device),
            statistics=statistics,
        )

    def _run(
        self,
        state: RoundState,
        plan: RoundPlan,
        longest_prompt: int,
        timer: PhaseTimer,
        trace: TraceBuffers | None,
        streamer: Streamer | TokenCallback | None,
        watch: StopWatch | None = None,
        first: FirstRound | None = None,
    ) -> int:
        batch = state.done.shape[0]
        running = RunningBatch(
            self.runners,
            state,
            plan,
            trace,
            [longest_prompt] * batch,
            (longest_prompt + state.limits).tolist(),
            self.captured,
        )
        if first is not None:
            running.runners = first.runners
        drafted = int(state.draft_lens.max())
        lengths = [0] * batch
        while drafted >= 0:
            report = running.advance(drafted, timer, first=first is not None)
            if report is None:
                continue
            rows = [report.get(index, [0, -1]) for index in range(batch)]
            if watch is not None:
                running.end(watch.see(rows))
            stream(streamer, enumerate(rows), lengths, trace)
            lengths = [length + row[0] for length, row in zip(lengths, rows, strict=True)]
            drafted = max(row[1] for row in rows)
            if first is not None:
                drafted = first.finish(state, drafted)
                running.runners, first = self.runners, None
            if drafted >= 0 and running.pays_for_done:
                running.compact()
            timer.mark("other")
        running.restore()
        return running.rounds

    def _run_general(
        self,
        runners: EFTRunners,
        state: RoundState,
        plan: RoundPlan,
        call: Call,
        longest_prompt: int,
        timer: PhaseTimer,
        trace: TraceBuffers | None,
        buffers: ScoreBuffers,
        watch: StopWatch | None,
        first: FirstRound | None,
    ) -> int:
        stepping = runners if first is None else first.runners
        assert call.processing is not None
        drafted = int(state.draft_lens.max())
        rounds = 0
        lengths = [0] * state.done.shape[0]
        while drafted >= 0:
            span = longest_prompt + max(lengths) + drafted + 1
            report = general_round(
                stepping, state, plan, call.processing, lengths, drafted, span, timer, trace, buffers
            )
            rounds += 1
            rows = report.tolist()
            if watch is not None:
                scores = None if buffers.scores is None else buffers.scores.unbind(1)
                end_rows(state, watch.see(rows, scores))
            stream(call.streamer, enumerate(rows), lengths, trace)
            lengths = [length + row[0] for length, row in zip(lengths, rows, strict=True)]
            drafted = max(row[1] for row in rows)
            if first is not None:
                drafted = first.finish(state, drafted)
                stepping, first = runners, None
            timer.mark("other")
        return rounds

    def _output(
        self,
        call: Call,
        state: RoundState,
        rounds: int,
        timer: PhaseTimer,
        trace: TraceBuffers | None,
        buffers: ScoreBuffers,
    ) -> Tensor | EFTOutput:
        input_ids, options = call.input_ids, call.options
        self._check_numbers()
        new = int(state.generated.max())
        output = state.output[:, :new].clone()
        sequences = torch.cat([input_ids, output.to(input_ids.device)], dim=1)
        if options.use_cache:
            self._past = EFTPast(
                reservations=self.runners.large.reservations,
                base=extended(call.prompts, output, state.generated),
                tuned=extended(call.tuned_prompts, output, state.generated),
            )
        if not options.return_dict_in_generate:
            return sequences
        width = self.runners.large.vocab_size
        result = EFTOutput(
            sequences=cast("torch.LongTensor", sequences),
            scores=a_token_each(buffers.scores, state.generated, width),
            logits=a_token_each(buffers.logits, state.generated, width),
            stats=totals(state, rounds, timer.seconds, self.policy),
            trace=None if trace is None else table_of(trace, output),
        )
        if self._past is not None:
            setattr(result, CACHE_FIELD, self._past)
        return result


class NaiveEFTDecoder(EFTDecoder):
    """Plain decoding of the target: one step of each model a token, on the same runners and caches.

    It draws with the noise of `acceptance="shared_seed"`, so a speculative decoder of that rule gives
    the same tokens for the same seed. How to draft plays no part.
    """

    def __init__(self, models: EFTModels | EFTRunners, config: EFTConfig | None = None) -> None:
        config = config or EFTConfig()
        plain = dataclasses.replace(
            config, acceptance="shared_seed", draft_tokens=1, draft_weights="own", remembered=0
        )
        super().__init__(models, plain)

    def first_draft_len(self, greedy: bool) -> int:
        """None."""
        return 0
