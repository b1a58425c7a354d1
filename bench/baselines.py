"""What speculative EFT is compared with beside `NaiveEFTDecoder`, as decoders with the same `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, EFTStats, Streamer, TokenCallback
from speculative_eft.decoding.bound import BoundRound, Room, bind_pass, can_bind
from speculative_eft.decoding.options import read_options
from speculative_eft.decoding.prompts import read_prompts, read_seeds
from speculative_eft.decoding.round import PhaseTimer, RoundPlan, new_round_state
from speculative_eft.decoding.running import CapturedBatch, RunningBatch, rounded_span
from speculative_eft.decoding.streaming import begin_stream, check_streamer, end_stream, stream
from speculative_eft.kernels import Coefficients, RoundState, Sampling, Stream, commit, draft_step
from speculative_eft.models import (
    EFTModels,
    EFTRunners,
    Runner,
    StepByStep,
    StepCosts,
    captured_functions,
)

__all__ = [
    "AssistedDecoder",
    "SingleModelDecoder",
    "SingleModelRounds",
    "TransformersLoop",
    "UniformRunner",
    "ordinary_speculation",
]


class SingleModelRounds(RunningBatch):
    """Rounds that are one step of one model alone; captured, compacted and read as EFT's are.

    The model stands in the large base's place among the runners.
    """

    def _runners(self) -> list[Runner]:
        return [self.runners.large]

    def _round(self, drafted: int, span: int, timer: PhaseTimer, first: bool) -> Tensor:
        state, plan, _ = self._parts
        if self._captured is None:
            return _step(self.runners.large, state, plan, span, timer)
        span = rounded_span(span)
        report: Tensor = self._captured.run(
            (self.rows, span), lambda: _step(self.runners.large, state, plan, span, PhaseTimer())
        )
        return report

    def _bind(self, drafted: int) -> BoundRound | None:
        state, plan, _ = self._parts
        return _bind_step(self.runners.large, state, plan)


def _bind_step(runner: Runner, state: RoundState, plan: RoundPlan) -> BoundRound | None:
    """`_step` as calls that take no arguments, as the rounds of EFT are, where Numba's kernels run."""
    if not can_bind(state):
        return None
    from speculative_eft.kernels.cpu.round_end import bind_round_end

    room, batch = Room(0), state.last_token.shape[0]
    logits, *laws = (
        room.take(name, batch, 1, plan.vocab_size) for name in ("logits", "log target", "target", "draft")
    )
    block, counts = state.last_token[:, None], torch.ones(batch, dtype=torch.int64)
    verdict, report, end_round = bind_round_end(
        state, [logits], block, counts, plan.coefficients, plan.sampling, plan.sampling, plan.acceptance,
        plan.eos_token_ids, None, [(runner.lengths, False)], laws,
    )  # fmt: skip
    step, runs_all = bind_pass(runner, block, counts, logits)
    steps = [("step", step), ("verify", lambda _: end_round())]
    return BoundRound(
        steps, counts, counts.numpy().max, verdict, report, report.numpy().tolist, [logits],
        pays_for_done=runs_all,
    )  # fmt: skip


def _step(runner: Runner, state: RoundState, plan: RoundPlan, span: int, timer: PhaseTimer) -> Tensor:
    logits = runner.forward(state.last_token[:, None], span)[:, 0]
    timer.mark("step")
    token = draft_step(
        [logits], None, plan.coefficients, plan.sampling, state.noise, Stream.SHARED, 0, plan.vocab_size
    )
    timer.mark("verify")
    nothing = state.last_token.new_zeros(state.last_token.shape[0], 0)
    report = commit(
        state, nothing, torch.zeros_like(token), token, None, plan.eos_token_ids, None,
        [(runner.lengths, False)],
    )  # fmt: skip
    timer.mark("other")
    return report


class SingleModelDecoder:
    """Plain decoding of one of the models alone: one step a token, on the runner and cache that EFT uses.

    Its tokens come from that model's own law, not from the target of emulated fine-tuning: it is here for
    its speed.

    Args:
        models: the three models, or their runners; only one runs.
        role: which one: the large base, or the first tuned model.
    """

    longest_draft = 0

    def __init__(
        self, models: EFTModels | EFTRunners, role: Literal["large_base", "small_tuned"] = "large_base"
    ) -> None:
        self._generation_configs: list[GenerationConfig] = []
        if isinstance(models, EFTModels):
            model = models.large_base if role == "large_base" else models.small_tuned[0]
            config = getattr(model, "generation_config", None)
            self._generation_configs += [] if config is None else [config]
            models = models.runners()
        self.runner = models.large if role == "large_base" else models.tuned[0]
        self._phase = "large" if role == "large_base" else "draft"
        # A batch asks for three roles, and for nothing but the lengths of what does not run.
        self.runners = EFTRunners(self.runner, [], self.runner)
        device = self.runner.device
        self.lagging = device.type == "cuda"
        graphs = captured_functions([self.runner])
        self.captured = None if graphs is None else CapturedBatch(graphs)

    def new_state(
        self, last_token: Tensor, lengths: Tensor, seeds: Tensor, max_new_tokens: int, pad_token_id: int
    ) -> RoundState:
        """As `EFTDecoder.new_state`, without a draft."""
        no_draft = torch.zeros_like(last_token)
        return new_round_state(
            last_token, lengths, seeds, max_new_tokens, no_draft, 0, pad_token_id, None, lagging=self.lagging
        )

    def new_plan(
        self, sampling: Sampling, draft_sampling: Sampling, eos_token_ids: Sequence[int], statistics: bool
    ) -> RoundPlan:
        """As `EFTDecoder.new_plan`, of the model's own law."""
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
        streamer: Streamer | TokenCallback | None = None,
        trace: bool = False,
        **generation_kwargs: Any,
    ) -> Tensor | EFTOutput:
        """Continue each prompt with tokens from the model; arguments and errors as in `EFTDecoder`.

        Returns:
            int64 [batch, width + new tokens], or an `EFTOutput` without a trace.
        """
        _refuse_trace(trace)
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
        check_streamer(streamer, batch)
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
        begin_stream(streamer, input_ids)
        ends = [prompts.longest + options.max_new_tokens] * batch
        running = SingleModelRounds(
            self.runners, state, plan, None, [prompts.longest] * batch, ends, self.captured
        )
        following = 0
        while following >= 0:
            report = running.advance(0, timer)
            if report is None:
                continue
            stream(streamer, report.items())
            following = max(row[1] for row in report.values())
            if following >= 0:
                running.compact()
            timer.mark("other")
        running.restore()
        new = int(state.generated.max())
        sequences = torch.cat([input_ids, state.output[:, :new].to(input_ids)], dim=1)
        timer.mark("other")
        end_stream(streamer)
        if not options.return_dict_in_generate:
            return sequences
        timer.seconds[self._phase] = timer.seconds.pop("step", 0.0)
        emitted = int(state.generated.sum())
        return _output(sequences, _plain_stats(running.rounds, emitted, emitted, timer.seconds))


def _nothing_to_do() -> None:
    pass


class UniformRunner(StepByStep):
    """A `Runner` without a network: every token is equally likely, and nothing is computed.

    Args:
        vocab_size: columns of its logits, all 0.
        device: where the logits are.
    """

    max_context: int | None = None

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._all_lengths = self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self._logits = torch.zeros(0, 0, vocab_size, device=device)
        self.reservations, self.addresses = 0, list[float]()

    def reserve(self, batch: int, length: int, keep: bool = False) -> None:
        self.reservations += 1
        if not keep:
            self._all_lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.lengths = self._all_lengths[:batch]

    def use(self, batch: int) -> None:
        self.lengths = self._all_lengths[:batch]

    def rearrange(self, slots: Sequence[int], sources: Sequence[int], span: int) -> None:
        self._all_lengths[list(slots)] = self._all_lengths[list(sources)]

    def fill_slot(self, slot: int, tokens: Tensor) -> None:
        self._all_lengths[slot] = tokens.shape[1]

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        batch, rows = tokens.shape
        if self._logits.shape[0] != batch or self._logits.shape[1] < rows:
            self._logits = torch.zeros(batch, rows, self.vocab_size, device=self.device)
        return self._logits[:, :rows]

    def bind(self, block: Tensor, counts: Tensor, logits: Tensor) -> Callable[[], None]:
        logits.zero_()
        return _nothing_to_do

    def prefill(
        self, tokens: Tensor, prompt_lengths: Tensor, chunk: int = 512, begins: Tensor | None = None
    ) -> None:
        self.lengths.copy_(prompt_lengths)


def ordinary_speculation(
    runners: EFTRunners, draft_tokens: int | Literal["auto"], costs: StepCosts, batch: int
) -> EFTDecoder:
    """The large base alone, with drafts by the small base: ordinary speculative decoding, by the block rule.

    It is the target p ∝ L (F / B) with F = B, drafted by `small_base` in the tuned model's place. At
    alpha = 0 nobody reads F for the target, and a uniform B leaves L alone, so the small base runs once, as
    the draft, and never as the base. Drafts are not corrected, as nowhere in ordinary speculation.

    Args:
        runners: of the three models; those of `large` and `base` run.
        draft_tokens: as in `EFTConfig`.
        costs: of a step of the small base and of a row.
        batch: sequences that will run together.
    """
    uniform = UniformRunner(runners.large.vocab_size, runners.large.device)
    config = EFTConfig(
        alpha=0.0,
        draft="tuned",
        draft_tokens=draft_tokens,
        cost_ratio=costs.cost_ratio,
        row_cost=costs.row_cost,
        expected_batch=batch,
        remembered=0,
    )
    return EFTDecoder(EFTRunners(large=runners.large, tuned=[runners.base], base=uniform), config)


class TransformersLoop:
    """Naive EFT as one writes it over transformers: three models, their caches, mixed logits, a loop.

    Prompts are padded on the left and run in one pass a model, whose output layer runs for the last
    position alone; then each model takes one token a step with a `DynamicCache`. Ends of sequences are not
    looked for.

    Args:
        models: the three models.
        alpha, beta: of the target, as in `EFTConfig`.
    """

    def __init__(self, models: EFTModels, alpha: float = 1.0, beta: float = 1.0) -> None:
        self.networks = models.forward_passes()
        tuned = len(models.small_tuned)
        # B + sum alpha (F - B) + beta (L - B); the models' normalisers cancel.
        self._weights = [beta, *[alpha] * tuned, 1 - tuned * alpha - beta]
        self._vocab_size = models.vocab_size

    def step(
        self, tokens: Tensor, caches: Sequence[DynamicCache], timer: PhaseTimer, **inputs: Tensor | None
    ) -> Tensor:
        """The target's logits, float32 [batch, vocabulary], after `tokens`, int64 [batch, width].

        Each model's pass goes on from its cache, with what `inputs` say besides.
        """
        mixed: Tensor | None = None
        phases = ["large", *["draft"] * (len(self.networks) - 2), "base"]
        for (model, in_its_role), cache, weight, phase in zip(
            self.networks, caches, self._weights, phases, strict=True
        ):
            with in_its_role():
                logits = model(
                    input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs
                ).logits[:, -1, : self._vocab_size]
            timer.mark(phase)
            if weight != 0:
                part = logits.float() * weight
                mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        seed: int | None = None,
        streamer: Streamer | TokenCallback | None = None,
        trace: bool = False,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        eos_token_id: Sequence[int] = (),
        return_dict_in_generate: bool = False,
    ) -> Tensor | EFTOutput:
        """Continue each prompt, padded on the left, with `max_new_tokens` tokens from the target.

        Raises:
            ValueError: for filters and ends, which this loop does not have.
        """
        _refuse_trace(trace)
        _refuse_filters_and_ends(top_k, eos_token_id)
        device = self.networks[0][0].device
        generator = torch.Generator(device)
        generator.manual_seed(0 if seed is None else seed)
        batch = input_ids.shape[0]
        check_streamer(streamer, batch)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.to(device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        tokens = input_ids.to(device)
        caches = [DynamicCache(config=model.config) for model, _ in self.networks]
        timer = PhaseTimer()
        begin_stream(streamer, input_ids)
        output: list[Tensor] = []
        for step in range(max_new_tokens):
            # Without padding the mask says nothing, and transformers is faster without it.
            padding = None if attention_mask is None else mask
            mixed = self.step(tokens, caches, timer, attention_mask=padding, position_ids=positions)
            if step == 0:
                timer.seconds = {"prefill": sum(timer.seconds.values())}
            if do_sample and temperature > 0:
                law = torch.softmax(mixed / temperature, dim=-1)
                tokens = torch.multinomial(law, 1, generator=generator)
            else:
                tokens = mixed.argmax(dim=-1, keepdim=True)
            timer.mark("verify")
            output.append(tokens)
            stream(streamer, ((index, [1, 0, token]) for index, (token,) in enumerate(tokens.tolist())))
            positions = positions[:, -1:] + 1
            if attention_mask is not None:
                mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            timer.mark("other")
        sequences = torch.cat([input_ids, torch.cat(output, dim=1).to(input_ids)], dim=1)
        timer.mark("other")
        end_stream(streamer)
        if not return_dict_in_generate:
            return sequences
        emitted = batch * max_new_tokens
        return _output(sequences, _plain_stats(max_new_tokens, emitted, emitted, timer.seconds))


class AssistedDecoder:
    """transformers' assisted generation, as it comes: the large base, assisted by the small base.

    Its target is the large base's law. transformers runs it for one sequence at a time only.

    Args:
        models: the three models; the tuned ones take no part.
    """

    def __init__(self, models: EFTModels) -> None:
        (self._large, large_in_its_role), *_, (self._small, small_in_its_role) = models.forward_passes()
        self._in_their_roles = (large_in_its_role, small_in_its_role)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        seed: int | None = None,
        streamer: Streamer | None = None,
        trace: bool = False,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        eos_token_id: Sequence[int] = (),
        return_dict_in_generate: bool = False,
    ) -> Tensor | EFTOutput:
        """Continue one prompt with `max_new_tokens` tokens.

        Raises:
            ValueError: for more than one prompt, filters and ends.
        """
        _refuse_trace(trace)
        _refuse_filters_and_ends(top_k, eos_token_id)
        if input_ids.shape[0] != 1:
            raise ValueError(f"input_ids must hold one prompt, got {input_ids.shape[0]}")
        torch.manual_seed(0 if seed is None else seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if do_sample:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        device = self._large.device
        large, small = _PassTimer(), _PassTimer()
        start = perf_counter()

        def enter(stack: ExitStack) -> None:
            stack.enter_context(_without_ends(self._large, self._small))
            for in_its_role in self._in_their_roles:
                stack.enter_context(in_its_role())
            stack.enter_context(large.on(self._large))
            stack.enter_context(small.on(self._small))

        with ExitStack() as stack:
            enter(stack)
            generate: Any = self._large.generate
            sequences = generate(
                input_ids.to(device),
                attention_mask=torch.ones_like(input_ids).to(device),
                assistant_model=self._small,
                streamer=None if streamer is None else _Aside(streamer, stack, enter),
                max_new_tokens=max_new_tokens,
                **sampling,
            )
        seconds = perf_counter() - start
        sequences = sequences.to(input_ids)
        if not return_dict_in_generate:
            return cast(Tensor, sequences)
        split = {"large": large.seconds, "draft": small.seconds}
        split["other"] = seconds - sum(split.values())
        return _output(
            sequences,
            _plain_stats(large.passes, large.passes, sequences.shape[1] - input_ids.shape[1], split),
        )


class _Aside:
    """A streamer whose receiver may run the same networks, in roles of their own, before it gives back."""

    def __init__(self, streamer: Streamer, stack: ExitStack, enter: Callable[[ExitStack], None]) -> None:
        self._streamer, self._stack, self._enter = streamer, stack, enter

    def put(self, value: Tensor) -> None:
        self._stack.close()
        self._streamer.put(value)
        self._enter(self._stack)

    def end(self) -> None:
        self._streamer.end()


class _PassTimer:
    """Counts a model's forward passes and their seconds; meaningful where passes are synchronous."""

    def __init__(self) -> None:
        self.passes = 0
        self.seconds = 0.0
        self._start = 0.0

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        def before(*_: Any) -> None:
            self._start = perf_counter()

        def after(*_: Any) -> None:
            self.passes += 1
            self.seconds += perf_counter() - self._start

        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _without_ends(*models: PreTrainedModel) -> Iterator[None]:
    """For a while the models' generation configs name no end of a sequence and no sampling options."""
    kept = [model.generation_config for model in models]
    for model in models:
        plain: Any = GenerationConfig
        model.generation_config = plain(pad_token_id=0)
    try:
        yield
    finally:
        for model, config in zip(models, kept, strict=True):
            model.generation_config = config


def _refuse_trace(trace: bool) -> None:
    if trace:
        raise ValueError("trace must be False: a baseline has no log-ratios to trace")


def _refuse_filters_and_ends(top_k: int, eos_token_id: Sequence[int]) -> None:
    if top_k != 0 or len(eos_token_id):
        raise ValueError(
            f"top_k must be 0 and eos_token_id empty, got {top_k} and {list(eos_token_id)}: this baseline "
            "has neither filters nor ends"
        )


def _plain_stats(rounds: int, sequence_rounds: int, emitted: int, seconds: dict[str, float]) -> EFTStats:
    return EFTStats(
        rounds=rounds,
        sequence_rounds=sequence_rounds,
        drafted_tokens=0,
        tested_tokens=0,
        accepted_tokens=0,
        emitted_tokens=emitted,
        accepted_by_position=(),
        expected_acceptance=0.0,
        seconds=seconds,
    )


def _output(sequences: Tensor, stats: EFTStats) -> EFTOutput:
    return EFTOutput(sequences=cast("torch.LongTensor", sequences), stats=stats)
