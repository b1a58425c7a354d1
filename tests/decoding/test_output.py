"""What `generate` returns: the table of a trace, and tensors of the caller's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from speculative_eft.decoding import EFTConfig, EFTDecoder, EFTOutput, NaiveEFTDecoder
from speculative_eft.models import EFTModels

from ..models.families import tiny_model
from ..tiny_models import VOCAB, ragged_prompts, tiny_trio
from ..tokenizers_of_words import word_tokenizer


@pytest.fixture(scope="module")
def models() -> EFTModels:
    models = tiny_trio("llama")
    models.tokenizer = word_tokenizer(VOCAB)
    return models


def test_the_table_of_a_trace(models: EFTModels) -> None:
    output = EFTDecoder(models, EFTConfig(draft_tokens=3)).generate(
        **ragged_prompts(3), max_new_tokens=8, seed=1, do_sample=True, return_dict_in_generate=True
    )
    assert isinstance(output, EFTOutput)
    assert output.trace is not None
    table = output.trace.table(models.tokenizer)
    assert list(table) == [
        "sequence", "position", "token", "text", "source", "accepted", "large", "tuned", "base", "target",
        "log_ratio",
    ]  # fmt: skip
    assert len({len(column) for column in table.values()}) == 1
    for sequence, position, token, text in zip(*(table[name] for name in list(table)[:4]), strict=True):
        assert output.sequences[sequence, 11 + position] == token
        assert text == f"w{token}"
    assert table["accepted"] == [source == "draft" for source in table["source"]]
    assert table["log_ratio"] == pytest.approx(
        [one - other for one, other in zip(table["large"], table["base"], strict=True)], abs=1e-6
    )


def test_pandas_takes_the_table(models: EFTModels) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    output = EFTDecoder(models).generate(
        torch.tensor([[5, 6]]), max_new_tokens=6, eos_token_id=[], return_dict_in_generate=True
    )
    assert isinstance(output, EFTOutput)
    assert output.trace is not None
    frame = pandas.DataFrame(output.trace.table())
    assert frame.shape == (6, 10)
    assert frame["token"].tolist() == output.sequences[0, 2:].tolist()


def test_outputs_may_be_written_to(models: EFTModels) -> None:
    output = EFTDecoder(models).generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    assert isinstance(output, Tensor)
    output[output == 5] = 6
    assert output[0, 0] == 6
    several = EFTDecoder(models).generate(
        torch.tensor([[5, 6]]), max_new_tokens=3, return_dict_in_generate=True, output_scores=True,
        output_logits=True,
    )  # fmt: skip
    assert isinstance(several, EFTOutput) and several.scores is not None and several.logits is not None
    assert several.trace is not None
    trace = several.trace
    for tensor in (
        several.sequences, several.scores[0], several.logits[0], trace.source_ids, trace.tokens, trace.large,
        trace.base, trace.target, *trace.tuned,
    ):  # fmt: skip
        tensor.add_(1)


@pytest.mark.parametrize("decoder_type", [EFTDecoder, NaiveEFTDecoder])
def test_with_the_conservative_filter_processors_and_outputs_have_log_probabilities(
    decoder_type: type[EFTDecoder],
) -> None:
    seen: list[Tensor] = []

    def watching(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores)
        return scores

    decoder = decoder_type(
        tiny_trio("llama", scale=0.05), EFTConfig(beta=2.0, conservative_top_p=0.5, draft_tokens=3)
    )
    output = decoder.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=8, eos_token_id=[], logits_processor=[watching],
        return_dict_in_generate=True, output_logits=True, output_scores=True,
    )  # fmt: skip
    assert isinstance(output, EFTOutput) and output.trace is not None
    # The first is of zeros: a processor is tried out before any model runs.
    for law in (*output.logits, *output.scores, *seen[1:]):
        torch.testing.assert_close(law.exp().sum(dim=-1), torch.ones(1))
    chosen = torch.stack([law[0].max() for law in output.logits])
    torch.testing.assert_close(chosen, output.trace.target[0], atol=1e-5, rtol=0)


def test_ids_that_only_the_large_base_has_get_no_score() -> None:
    small = tiny_model("llama")
    models = EFTModels(tiny_model("llama", 0, VOCAB + 8), small, small)
    output = EFTDecoder(models, EFTConfig(draft_tokens=2)).generate(
        torch.tensor([[5, 6]]), max_new_tokens=4, return_dict_in_generate=True, output_scores=True
    )
    assert isinstance(output, EFTOutput) and output.scores is not None
    for rows in output.scores:
        assert rows.shape == (1, VOCAB + 8)
        assert rows[:, :VOCAB].isfinite().all() and rows[:, VOCAB:].isneginf().all()
