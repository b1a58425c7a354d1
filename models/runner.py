"""Runs one network for a batch of sequences, each at its own length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from speculative_eft.kernels import (
    DraftLoop,
    backend,
    projections,
)

from .adapters import AdapterSwitch, adapter_layers, is_adapter_layer, is_low_rank, refuse_merged
from .attention import Attention, choose_attention
from .bodies import Block, Body, FalconAlibiBody, TransformersBody
from .configs import TESTED_FAMILIES, declared, logit_scale, longest_window, position_limit, text_config
from .describe import cache_bytes_per_token, vocabulary_rows
from .llama import EightBitCopies, LlamaBody, is_ordinary, is_plain, linear_of
from .placement import home_device
from .protocol import Runner, on_device
from .slot_cache import SlotCache, round_up

if TYPE_CHECKING:
    from .llama_cpu import CompiledLlama

_LONGEST_COMPARED, _BEYOND_A_WINDOW = 640, 72
"""Most tokens of a sequence by which an unknown model is compared with itself, and how many of them go beyond
its window: more than the steps in which caches grow."""

_MOST_ROWS = 512
"""Rows of a prompt's pass where it is compiled: each thread has inputs of its own, and more gain nothing."""


@dataclass
class _Storage:
    """Where a network's keys and values are, which copies of it share."""

    cache: SlotCache


class ModelRunner:
    """Runs a causal language model of transformers with a `SlotCache`: a `Runner`.

    One code path for every batch size and block length; a Llama-like model on a CPU runs compiled, where
    Numba is installed. Shapes depend on host integers only, and a pass reads nothing from the device.
    Sequences start at position 0 and never see each other, whatever their lengths and whatever padding stands
    behind them. The model itself is left as it was, but for `eval()`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: str = "auto",
        adapters: Sequence[str] | None = None,
        compile_body: bool = False,
    ) -> None:
        """Take `model`, which stays on its device and in its dtype.

        `attention` is how attention is computed: `"sdpa"` by torch's scaled_dot_product_attention with a
        mask, `"triton"` by the kernel of `kernels.attention`, or for Llama-like models that of
        `kernels.rotated_attention` (with sdpa for blocks of more than 16 tokens),
        `"flash_attn"` by flash-attn's `flash_attn_with_kvcache`, and `"auto"` by Triton's kernel on a GPU
        where it knows the model and its size of head, else by sdpa. `self.attention` says which it is.

        `adapters` names the LoRA adapters in `model` that are on in this runner's passes, whatever is on
        outside of them: none if it is empty. So several runners can share one model. None leaves them as they
        are.

        `compile_body` has torch.compile make passes of at most 16 rows a sequence, of a model that runs by
        its own modules: Llama-like ones have kernels of their own, and Falcon with alibi runs as it is. Each
        kind of pass is compiled when it is first met, which takes seconds to a minute.

        Raises ValueError for an `attention` that cannot run this model here, for a model that this runner
        cannot run, and for one that torch.compile cannot: an untested architecture, and a compiled one, is
        compared with its own plain forward pass and refused if the logits differ.
        """
        self.attention = choose_attention(attention, model)
        self.model = model.train(False)
        self.device = home_device(model)
        config = text_config(model.config)
        self.max_context = position_limit(config)
        self.vocab_size = vocabulary_rows(model)
        self._body = _choose_body(model, self.attention, adapters)
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = head.base_layer if not adapters and is_low_rank(head, adapters) else head
        self._head_is_fused = (
            self.attention == "triton" and type(self._head) is nn.Linear and is_plain(self._head)
        )
        self._adapter_layers = [] if adapters is None else adapter_layers(model)
        # Read one by one, weights need no switch; a captured graph keeps what was on at its capture.
        self._adapted: Callable[[], AbstractContextManager[None]] = nullcontext
        if adapters is not None and (not isinstance(self._body, LlamaBody) or is_adapter_layer(self._head)):
            self._adapted = AdapterSwitch(model, adapters)
        self._softcap = declared(config, "final_logit_softcapping")
        self._scale = logit_scale(config)
        self._compiled = self._compile_for_cpu(adapters)
        self._quantised: ModelRunner | None = None
        self._copies = EightBitCopies()
        self._storage = _Storage(SlotCache(0, 0, self.device, self.attention))
        self.reservations = 0
        if config.model_type not in TESTED_FAMILIES:
            self._compare_with_model(
                "cannot be run with one length for each sequence: its logits would not be its own; give a "
                f"model of a tested family ({', '.join(sorted(TESTED_FAMILIES))})"
            )
        if compile_body and self._compiled is None and isinstance(self._body, TransformersBody):
            self._body.compile()
            self._compare_with_model("cannot be run by torch.compile here; leave out compile_bodies")

    def _compile_for_cpu(self, adapters: Sequence[str] | None) -> CompiledLlama | None:
        decoder = self.model.get_decoder()
        if self.attention != "sdpa" or backend(decoder.device) != "numba":
            return None
        if not isinstance(self._body, LlamaBody):
            return None
        from .llama_cpu import CompiledLlama

        if not CompiledLlama.fits(self._body, self._head):
            return None
        return CompiledLlama(self._body, self._head, self._scale, self._softcap)

    @property
    def cache(self) -> SlotCache:
        """Keys and values, in another place after a `reserve` that needed more room."""
        return self._storage.cache

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory of one token's keys and values."""
        return cache_bytes_per_token(text_config(self.model.config), self.model.dtype)

    @property
    def addresses(self) -> list[float]:
        """Where its weights are, and the factors of its adapters, which a captured pass knows."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        layers = adapter_layers(self.model)
        factors = chain.from_iterable(getattr(layer, "scaling", {}).values() for layer in layers)
        return [*(tensor.data_ptr() for tensor in tensors), *factors]

    @property
    def lengths(self) -> Tensor:
        """int64 [batch]: tokens in the cache of each sequence. The caller moves it in place."""
        return self.cache.lengths

    @torch.inference_mode()
    def reserve(self, batch: int, length: int, keep: bool = False) -> None:
        """Start anew with room for `batch` sequences of up to `length` tokens; `lengths` become zero.

        The storage is kept if it is large enough. Weights changed in place since are seen from here on.
        With `keep` the tokens in the cache stay, and `lengths` with them.

        Raises IncompatibleModelsError if an adapter of shared weights has been merged into them meanwhile.
        """
        refuse_merged(self._adapter_layers)
        self.reservations += 1
        if keep:
            if not self.cache.holds(batch, length):
                self._storage.cache = self.cache.grown(batch, length)
            self.cache.keep(batch, length)
        else:
            if not self.cache.holds(batch, length):
                self._storage.cache = SlotCache(batch, length, self.device, self.attention)
            self.cache.restart(batch, length)
        self._prepare()
        if self._quantised is not None:
            # It stays where it is, as those of the layers do, which the body looks after.
            self._copies.of("head", linear_of(self._head, ()))
            self._quantised._prepare()

    def _prepare(self) -> None:
        (self._compiled or self._body).prepare(self.cache)

    def use(self, batch: int) -> None:
        """Go on with the first `batch` sequences alone; the caches of the others stay as they are."""
        self.cache.use(batch)

    @torch.inference_mode()
    def rearrange(self, slots: Sequence[int], sources: Sequence[int], span: int) -> None:
        """Let each of `slots` hold the sequence, of at most `span` tokens, of its source, another of them."""
        self.cache.rearrange(slots, sources, min(round_up(span), self.cache.capacity))

    @torch.inference_mode()
    def fill_slot(self, slot: int, tokens: Tensor) -> None:
        """Start the sequence of `slot` anew with int64 `tokens` [1, P], P may be 0; the others stay."""
        whole = self.cache
        try:
            self._take(whole.part(slot))
            self.prefill(tokens, torch.full((1,), tokens.shape[1], device=self.device))
        finally:
            self._take(whole)

    def _take(self, cache: SlotCache) -> None:
        self._storage.cache = cache
        if self._compiled is not None:
            self._compiled.use_storage(cache)

    def forward(self, tokens: Tensor, span: int) -> Tensor:
        """Run int64 `tokens` [batch, q] and return their logits [batch, q, vocab_size].

        They are of the model's dtype, or of float32 where the pass runs compiled for a CPU. Token `j`
        of sequence `b` stands at `lengths[b] + j`; its keys and values are written there and it sees
        everything up to there. `lengths` stay as they are. `span` is a host integer, at least
        `max(lengths) + q`. The logits need no gradient.
        """
        compiled = self._compiled
        return self._forward(tokens, span) if compiled is None else compiled(tokens, self.cache)

    @property
    def is_compiled(self) -> bool:
        """Whether passes run compiled for a CPU."""
        return self._compiled is not None

    @property
    def can_quantise(self) -> bool:
        """Whether there is a `quantised`: for Llama-like models without adapters, on a GPU by Triton.

        torch's operations write such weights out in full before each product.
        """
        body, head = self._body, self._head
        return (
            isinstance(body, LlamaBody)
            and not body.adapters
            and (self.attention == "triton" or self.device.type == "cpu")
            and type(head) is nn.Linear
            and is_plain(head)
            and is_ordinary(cast(nn.Parameter, head.weight))
        )

    @property
    def bytes_to_quantise(self) -> int:
        """Memory that `quantised` will take."""
        if self._quantised is not None:
            return 0
        return sum(weight.numel() for weight in self.model.parameters() if weight.ndim == 2)

    @torch.inference_mode()
    def quantised(self) -> ModelRunner:
        """This network by weights of eight bits, over this runner's cache, which alone is to be reserved.

        They are copied in the first call, and anew by a `reserve` that finds the model's own changed.
        """
        if self._quantised is None:
            own = self._body
            assert isinstance(own, LlamaBody)
            other = copy.copy(self)
            other._head = self._copies.of("head", linear_of(self._head, ()))
            other._body = LlamaBody(own.decoder, self.attention, own.adapters, self._copies)
            if self._compiled is not None:
                other._compiled = self._compiled.of(other._body, other._head)
            other._prepare()
            self._quantised = other
        return self._quantised

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, span: int) -> Tensor:
        with self._adapted():
            return self._finished(self._project(self._run(tokens, span)))

    def _finished(self, logits: Tensor) -> Tensor:
        """The logits after what some models do to the head's."""
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.to(self.device)

    def _project(self, hidden: Tensor) -> Tensor:
        """The head's logits of `hidden` [batch, q, inside]."""
        if self._head_is_fused:
            (logits,) = projections(hidden.flatten(0, 1), [self._head.weight], [self._head.bias])
            return logits.view(*hidden.shape[:2], -1)
        return cast(Tensor, self._head(hidden))

    @property
    def ends_drafts(self) -> bool:
        """`Runner.ends_drafts`: where compiled steps can run."""
        return self.is_compiled and backend(self.device) == "numba"

    @torch.inference_mode()
    def forward_together(self, others: Sequence[Runner], tokens: Tensor, span: int) -> list[Tensor] | None:
        """`Runner.forward_together`: of fused layers, where the others are this model but for adapters."""
        members: list[tuple[LlamaBody, SlotCache]] = []
        for runner in (self, *others):
            if not isinstance(runner, ModelRunner) or not self._fuses_with(runner):
                return None
            body = runner._fused(tokens.shape[1])
            if body is None:
                return None
            members.append((body, runner.cache))
        hidden = LlamaBody.fused(members, tokens, self._rounded(span))
        logits = self._finished(self._project(hidden))
        return [*logits.view(len(members), *tokens.shape, -1)]

    def _fuses_with(self, other: ModelRunner) -> bool:
        body, others = self._body, other._body
        return (
            isinstance(body, LlamaBody)
            and isinstance(others, LlamaBody)
            and body.fuses_with(others)
            and self._head is other._head
            and not is_adapter_layer(self._head)
            and self.cache.capacity == other.cache.capacity
        )

    def bind(self, block: Tensor, counts: Tensor, logits: Tensor) -> Callable[[], None] | None:
        """`Runner.bind`: where a compiled pass can run `block`."""
        return None if self._compiled is None else self._compiled.bind(block, self.cache, logits, counts)

    def bind_together(
        self, others: Sequence[Runner], block: Tensor, counts: Tensor, logits: Sequence[Tensor]
    ) -> Callable[[], None] | None:
        """`Runner.bind_together`: where the others are this model but for adapters."""
        own = self._compiled
        if own is None:
            return None
        networks = [(own, self.cache)]
        for other in others:
            if not isinstance(other, ModelRunner):
                return None
            compiled = other._compiled
            if compiled is None or not own.shares_weights(compiled):
                return None
            networks.append((compiled, other.cache))
        return own.bind_together(networks, block, counts, logits)

    def bind_draft(self, draft: DraftLoop, logits: Tensor) -> Callable[[], None] | None:
        """`Runner.bind_draft`: where compiled steps can run."""
        return None if self._compiled is None else self._compiled.bind_draft(draft, logits, self.cache)

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, prompt_lengths: Tensor, chunk: int = 512, begins: Tensor | None = None
    ) -> None:
        """Fill the cache from int64 `tokens` [batch, P] and set `lengths` to `prompt_lengths`, int64 [batch].

        `tokens` are padded on the right with anything; P may be 0. They run `chunk` positions at a time, or
        fewer where more gain nothing, and the output head does not run at all. `begins`, int64 [batch], is
        where each row's tokens stand: what the cache holds before them stays; None for the start.
        """
        total = tokens.shape[1]
        first = 0 if begins is None else int(begins.max())
        if total:
            own = prompt_lengths if begins is None else prompt_lengths - begins
            padding = torch.arange(total, device=self.device) >= own[:, None]
            tokens = tokens.masked_fill(padding, 0)
        if begins is None:
            self.lengths.zero_()
        else:
            self.lengths.copy_(begins)
        if self._compiled is not None:
            chunk = max(1, min(chunk, _MOST_ROWS // tokens.shape[0]))
        for start in range(0, total, chunk):
            part = tokens[:, start : start + chunk]
            if self._compiled is not None:
                self._compiled.fill(part, self.cache)
            else:
                with self._adapted():
                    self._fill(part, first + start + part.shape[1])
            self.lengths.add_(part.shape[1])
        self.lengths.copy_(prompt_lengths)

    def _run(self, tokens: Tensor, span: int) -> Tensor:
        body = self._fused(tokens.shape[1])
        if body is not None:
            return body.fused([(body, self.cache)], tokens, self._rounded(span))
        return self._body(self._begin(tokens, span), self.cache)

    def _fill(self, tokens: Tensor, span: int) -> None:
        if self._fused(tokens.shape[1]) is None:
            self._body.fill(self._begin(tokens, span), self.cache)
        else:
            self._run(tokens, span)

    def _fused(self, rows: int) -> LlamaBody | None:
        """The body, if its layers are fused for blocks of `rows` tokens."""
        body = self._body
        return body if isinstance(body, LlamaBody) and body.fuses(rows) else None

    def _rounded(self, span: int) -> int:
        return min(round_up(span), self.cache.capacity)

    def _begin(self, tokens: Tensor, span: int) -> Block:
        cache, span = self.cache, self._rounded(span)
        steps = cache.positions[: tokens.shape[1]]
        positions = cache.lengths.unsqueeze(1).add(steps).clamp_(max=cache.capacity - 1)
        cache.begin(positions, span)
        return Block(tokens, positions, cache.positions[:span])

    @torch.inference_mode()
    def _compare_with_model(self, refusal: str) -> None:
        length, beyond = 8, longest_window(text_config(self.model.config)) + _BEYOND_A_WINDOW
        if beyond <= _LONGEST_COMPARED and beyond <= (self.max_context or beyond):
            length = beyond
        failure: Exception | None = None
        agree = False
        try:
            # On which Triton launches, also where another GPU is the current one.
            with on_device(self.device):
                agree = self._agrees_with_model(length)
        except Exception as error:  # whatever an unknown model raises says the same: it cannot be run
            failure = error
        if not agree:
            # What torch.compile raises begins with a line that only says who failed.
            reason = " ".join(str(failure or "").strip().splitlines()[:2])
            raise ValueError(
                f"{type(self.model).__name__} {refusal}{f' ({reason})' if reason else ''}."
            ) from failure
        self._storage.cache = SlotCache(0, 0, self.device, self.attention)

    def _agrees_with_model(self, length: int) -> bool:
        """Whether logits of two sequences of `length` tokens are the model's own."""
        tokens = torch.arange(2, 2 + 2 * length, device=self.device).remainder(self.vocab_size)
        tokens = tokens.view(2, length)
        first = length - 5
        self.reserve(2, length)
        self.prefill(tokens[:, :first], torch.tensor([first, first - 1], device=self.device))
        block = torch.stack((tokens[0, first:-1], tokens[1, first - 1 : -2]))
        mine = self.forward(block, length - 1).float()
        with self._adapted():
            plain = self.model(tokens, use_cache=False).logits
        plain = torch.stack((plain[0, first:-1], plain[1, first - 1 : -2])).float()
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        return bool(((mine - plain).abs() <= tolerance * (1 + plain.abs())).all())


def _choose_body(model: PreTrainedModel, attention: Attention, adapters: Sequence[str] | None) -> Body:
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} cannot be run: its get_decoder() returns its {type(decoder).__name__}, "
            f"not its layers; give a model of a tested family ({', '.join(sorted(TESTED_FAMILIES))})."
        )
    if LlamaBody.fits(decoder, adapters):
        return LlamaBody(decoder, attention, adapters)
    if decoder.config.model_type == "falcon" and decoder.config.alibi:
        return FalconAlibiBody(decoder, attention)
    return TransformersBody(decoder, attention, model._supports_attention_backend)
