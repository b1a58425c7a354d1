"""Counter-based noise: known answers, ranges, independence of the batch, and the compiled kernels' bits."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("vocab_size", [7, 4_096, 8_193])
def test_exponential_noise_has_the_references_bits(vocab_size: int, both: Any) -> None:
    seeds = torch.tensor([3, -5, 2**63 - 1, -(2**63)])
    counters = torch.tensor([[0, 2**32 - 1]] * 4)
    arguments = (seeds, counters, torch.tensor([2, 5]), Stream.RESIDUAL, vocab_size)
    expected, drawn = both(lambda: exponential_noise(*arguments), "triton")
    # On a GPU a division is off by up to two units in the last place, a logarithm by one, as torch's own is.
    torch.testing.assert_close(drawn, expected, rtol=6e-7 if drawn.is_cuda else 4e-7, atol=0)


@pytest.fixture
def races() -> Any:
    """Compiled noise: a uniform draw, a race of logits and one of weights, to be called from Python."""
    numba = pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    if test_device().type != "cpu":
        pytest.skip("Numba's kernels are a CPU's")
    from speculative_eft.kernels.cpu.noise import race_of_logits, race_of_weights, uniform

    return [
        numba.njit(lambda seed, counter, row, stream: uniform(seed, counter, row, stream)),
        numba.njit(lambda values, scale, *address: race_of_logits(values, scale, *address)),
        numba.njit(lambda values, *address: race_of_weights(values, *address)),
    ]


def where_of(seed: int, counter: int) -> tuple[Tensor, Tensor, Tensor, Stream]:
    """The noise of row 2 there, as the reference asks for it."""
    return torch.tensor([seed]), torch.tensor([[counter]]), torch.tensor([2]), Stream.ACCEPT


def test_noise_has_the_references_bits(races: Any) -> None:
    uniform, *_ = races
    for seed in (3, -5, 2**63 - 1, -(2**63)):
        first = uniform(seed, 2**32 - 1, 2, int(Stream.ACCEPT))
        assert first == uniform_noise(*where_of(seed, 2**32 - 1)).item()


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 3000.0])
@pytest.mark.parametrize("size", [3, 7, 4099, 151_936])
def test_races_have_the_references_winners(size: int, spread: float, temperature: float, races: Any) -> None:
    _, race_of_logits, race_of_weights = races
    generator = np.random.default_rng(0)
    counts = 0
    for counter in range(400 if size < 10_000 else 25):
        logits = (spread * generator.standard_normal(size)).astype(np.float32)
        logits[generator.random(size) < 0.2 * (counter % 2)] = -np.inf
        logits[counter % size] = spread
        noise = exponential_noise(*where_of(5, counter), size)[0, 0].double().numpy()
        address = (5, counter, 2, int(Stream.ACCEPT))
        weights = np.exp((logits - logits.max()) / np.float32(temperature)) / np.float32(size)
        scores = logits.astype(np.float64) - temperature * np.log(noise)
        shares = weights.astype(np.float64) / noise
        second, first = np.sort(scores)[-2:]
        if first - second > 1e-4 * temperature + 1e-6 * spread:
            counts += 1
            assert race_of_logits(logits, np.float32(temperature), *address) == scores.argmax()
        second, first = np.sort(shares)[-2:]
        if second < (1 - 1e-4) * first:
            assert race_of_weights(weights, *address) == shares.argmax()
    assert counts > 20


def test_a_race_that_nobody_can_win_is_the_first_ids(races: Any) -> None:
    _, race_of_logits, race_of_weights = races
    address = (5, 1, 2, int(Stream.ACCEPT))
    assert race_of_logits(np.full(9, -np.inf, np.float32), np.float32(1), *address) == 0
    assert race_of_weights(np.zeros(9, np.float32), *address) == 0
