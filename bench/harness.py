"""An EFT target in EleutherAI's lm-evaluation-harness: `--model speculative_eft`.

Needs the extra `[eval]`. Importing this module registers the model; as a program it is the harness itself:

    python -P -m speculative_eft.bench.harness run --model speculative_eft --tasks arc_easy \\
        --model_args large_base=L,small_tuned=F,small_base=B,alpha=1.0
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import StoppingCriteria

from speculative_eft.decoding import EFTConfig, EFTDecoder
from speculative_eft.models import EFTModels

__all__ = ["SpeculativeEFT", "main"]

_LONGEST = 2048

_log = logging.getLogger(__name__)


class _Until(StoppingCriteria):
    """Ends a sequence when the text generated so far has one of some strings in it."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :])
        return torch.tensor([any(string in text for string in self.strings) for text in texts])


@register_model("speculative_eft")
class SpeculativeEFT(TemplateLM):  # type: ignore[misc]
    """Likelihoods under the target by one pass of the three models, generation by the decoder.

    Args:
        large_base, small_tuned, small_base: folders or Hub names; several tuned models with ";" between them.
        demo: the bundled trio instead.
        alpha, beta, conservative_top_p, acceptance, draft_tokens: as in `EFTConfig`; several alphas with ";"
            between them.
        device: where the models are; on a machine without CUDA, "cuda..." is transformers' own choice there.
        batch_size: prompts that run together, for which "auto" chooses draft lengths.
        max_length: most tokens that the models read of a sequence, None for their context.
        max_gen_toks: most tokens to generate where a task does not say.
        seed: of sampling; request i of a run gets a seed derived from it and i.
        decoder, tokenizer: a ready decoder instead, and its tokenizer.

    Raises:
        ValueError: for models that are missing or do not belong together.
    """

    def __init__(
        self,
        large_base: str | None = None,
        small_tuned: str | None = None,
        small_base: str | None = None,
        demo: bool = False,
        alpha: float | str = 1.0,
        beta: float = 1.0,
        conservative_top_p: float | None = None,
        acceptance: Any = "block",
        draft_tokens: Any = "auto",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        trust_remote_code: bool = False,
        decoder: EFTDecoder | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        # "auto" asks for the largest that fits, which is not looked for.
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else max_batch_size or 8
        if decoder is None:
            if demo:
                models = EFTModels.demo()
            elif large_base is None or small_tuned is None or small_base is None:
                raise ValueError("model_args must name large_base, small_tuned and small_base, or demo=True")
            else:
                models = EFTModels.from_pretrained(
                    large_base,
                    small_tuned.split(";"),
                    small_base,
                    dtype=dtype,
                    device_map=_usable(device),
                    trust_remote_code=trust_remote_code,
                )
            alphas = tuple(map(float, alpha.split(";"))) if isinstance(alpha, str) else alpha
            config = EFTConfig(
                alphas,
                beta,
                draft_tokens,
                acceptance,
                conservative_top_p=conservative_top_p,
                expected_batch=self.batch_size,
            )
            decoder = EFTDecoder(models, config)
            tokenizer = models.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("the models have no tokenizer; give tokenizer=")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_length = max_length or decoder.runners.max_context or _LONGEST
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        self._requests_seen = 0

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.decoder.runners.large.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; for likelihoods without a context it comes before the text."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text by the tokenizer's template; all three models get the same text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, without special tokens unless asked for."""
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens)).input_ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"a continuation of {longest} tokens exceeds max_length={self.max_length}")
        results = []
        for batch in _batches(requests, self.batch_size):
            rows = [
                # The last token is asked about, but no model reads it.
                ((context or [self.prefix_token_id]) + continuation)[-self.max_length - 1 :]
                for _, context, continuation in batch
            ]
            scores = self.decoder.score(*_padded(rows, left=False))
            for (key, _, continuation), row, log_probs, greedy in zip(
                batch, rows, scores.log_probs, scores.is_greedy, strict=True
            ):
                last = slice(len(row) - 1 - len(continuation), len(row) - 1)
                result = (float(log_probs[last].double().sum()), bool(greedy[last].all()))
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, result)
                results.append(result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that give each token as much context as fits."""
        results = []
        for request in requests:
            windows = [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            results.append(sum(log_prob for log_prob, _ in self._loglikelihood_tokens(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of a request's strings, which is cut off, or to their end."""
        results: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(index)
        for indices in alike.values():
            options = dict(normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks))
            for batch in _batches(indices, self.batch_size):
                texts = self._generate([requests[index].args[0] for index in batch], batch, dict(options))
                for index, text in zip(batch, texts, strict=True):
                    results[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        self._requests_seen += len(requests)
        return results

    def _generate(self, contexts: list[str], indices: Sequence[int], options: dict[str, Any]) -> list[str]:
        # None and "" stand for no string, as in the harness's own models.
        until, new = list(filter(None, options.pop("until"))), options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks={new} leaves no room in a context of {self.max_length} tokens")
        rows = [(self.tok_encode(text) or [self.prefix_token_id])[-room:] for text in contexts]
        ids, mask = _padded(rows, left=True)
        generated: list[list[int]] = [[] for _ in rows]
        self.decoder.generate(
            ids,
            mask,
            seed=[(self.seed << 32) + self._requests_seen + index for index in indices],
            max_new_tokens=new,
            stopping_criteria=[_Until(self.tokenizer, until, ids.shape[1])] if until else [],
            streamer=lambda index, tokens: generated[index].extend(tokens.tolist()),
            **{"top_k": 0, **options},
        )
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [_before(text, until) for text in texts]


def _usable(device: str | None) -> str | None:
    """`device`, but None for a GPU of CUDA where torch has no CUDA.

    The harness passes cuda:0 unless it is told a device, and nothing tells its choice from a user's.
    """
    if device is None or not device.startswith("cuda") or torch.cuda.is_available():
        return device
    _log.warning(
        "torch has no CUDA here: %s, the harness's own choice unless --device says it, is left out", device
    )
    return None


def _before(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of any of the strings."""
    for string in strings:
        text = text.split(string, 1)[0]
    return text


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _padded(rows: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [batch, longest] each."""
    width = max(map(len, rows))
    spare = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, spare, strict=True)]
    mask = [
        pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in zip(rows, spare, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def main() -> None:
    """The harness's own command line, with this model known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
