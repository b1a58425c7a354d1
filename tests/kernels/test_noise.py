"""Counter-based noise: known answers, ranges, independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from speculative_eft.kernels import Stream, derive_seeds, exponential_noise, gumbel_noise, uniform_noise
from speculative_eft.kernels import noise as noise_module
from speculative_eft.kernels.noise import philox_rounds

from ..device import on_device, test_device

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    def words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([value]) for value in values)

    assert tuple(word.item() for word in philox_rounds(words(key), words(counter))) == answer
    as_numpy = [np.array([value], dtype=np.uint64) for value in (*key, *counter)]
    words_numpy = philox_rounds((as_numpy[0], as_numpy[1]), tuple(as_numpy[2:]))
    assert tuple(int(word[0]) for word in words_numpy) == answer


def draw(seeds: Tensor, vocab_size: int = 37, stream: Stream = Stream.DRAFT) -> Tensor:
    counters = torch.arange(6).view(1, 2, 3)[:, :, 0].expand(len(seeds), -1)
    return exponential_noise(seeds, counters, torch.arange(2), stream, vocab_size)


def test_device_path_has_the_bits_of_the_host_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATIVE_EFT_BACKEND", "torch")
    with on_device(torch.device("cpu")):
        seeds = torch.tensor([3, -(2**63), 2**63 - 1, -1])
        on_host = draw(seeds)
    monkeypatch.setattr(noise_module, "_in_host_memory", lambda tensor: False)
    drawn = draw(seeds.to(test_device()))
    # A GPU's logarithm is another.
    torch.testing.assert_close(drawn.cpu(), on_host, rtol=6e-7 if drawn.is_cuda else 0, atol=0)


def test_a_few_draws_have_the_bits_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, counters = torch.tensor([3, -(2**63), -1]), torch.tensor([[0, 2**32 - 1]] * 3)
    few = uniform_noise(seeds, counters, torch.arange(2), Stream.ACCEPT)
    monkeypatch.setattr(noise_module, "_FEW_BLOCKS", 0)
    assert torch.equal(uniform_noise(seeds, counters, torch.arange(2), Stream.ACCEPT), few)


def test_draws_depend_on_their_own_address_alone() -> None:
    seeds = derive_seeds(9, 5).to(test_device())
    whole = draw(seeds)
    for index in range(5):
        assert torch.equal(draw(seeds[index : index + 1])[0], whole[index])
    assert torch.equal(draw(seeds, vocab_size=21), whole[..., :21])
    assert not torch.equal(draw(seeds, stream=Stream.RESIDUAL), whole)


def test_one_counter_may_be_expanded_over_rows(each_backend: str) -> None:
    seeds, rounds = derive_seeds(9, 3).to(test_device()), torch.tensor([5, 9, 2])[:, None]
    expanded = exponential_noise(seeds, rounds.expand(-1, 4), torch.arange(4), Stream.DRAFT, 6)
    for row in range(4):
        alone = exponential_noise(seeds, rounds, torch.full((1,), row), Stream.DRAFT, 6)
        assert torch.equal(expanded[:, row], alone[:, 0])


def test_seeds_of_a_larger_batch_extend_those_of_a_smaller_one() -> None:
    assert torch.equal(derive_seeds(-4, 9)[:5], derive_seeds(-4, 5))
    assert len(set(derive_seeds(-4, 1000).tolist()) | set(derive_seeds(-3, 1000).tolist())) == 2000


def test_uniforms_never_reach_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (0, ONES):
        words = (torch.full((1, 1, 2), word),) * 4
        monkeypatch.setattr(noise_module, "_philox_blocks", lambda *_, words=words: words)
        zero = torch.zeros(1, 1, dtype=torch.int64)
        uniform = uniform_noise(zero[0], zero, zero, Stream.ACCEPT)
        assert 0 < uniform.item() < 1
        exponential = exponential_noise(zero[0], zero, zero, Stream.ACCEPT, 8)
        assert exponential.isfinite().all()
        assert (exponential > 0).all()
        assert gumbel_noise(zero[0], zero, zero, Stream.ACCEPT, 8).isfinite().all()


def test_moments() -> None:
    seeds = derive_seeds(1, 4).to(test_device())
    counters = torch.arange(50).expand(4, -1)
    draws = exponential_noise(seeds, counters, torch.zeros(50, dtype=torch.int64), Stream.DRAFT, 5000)
    count = draws.numel()
    assert abs(draws.mean().item() - 1) < 6 / count**0.5
    assert abs(draws.var().item() - 1) < 6 * (8 / count) ** 0.5
    uniform = uniform_noise(
        seeds, torch.arange(20_000).expand(4, -1), torch.zeros(20_000).long(), Stream.ACCEPT
    )
    assert abs(uniform.mean().item() - 0.5) < 6 * (1 / 12 / uniform.numel()) ** 0.5
