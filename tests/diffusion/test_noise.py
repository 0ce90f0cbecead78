"""Counter-based noise: uniform, independent between indices and streams, and never to change."""

import pytest
import torch

from agrpo_megatron.diffusion import noise

torch.set_num_threads(1)
COUNT = 200_000
STREAMS = (noise.TOKENS, noise.POSITIONS, noise.STEPS, noise.PROBLEMS, noise.MASKS)


def numbers(*, seed=0, stream=noise.TOKENS, first=0, count=COUNT):
    return noise.uniform(noise.noise_key(seed, stream, torch.arange(first, first + count)))


def kolmogorov_smirnov(values):
    """Return sqrt(n) times the largest distance to the uniform distribution."""
    ordered, count = values.sort().values, len(values)
    grid = torch.arange(count + 1, dtype=torch.float64) / count
    gap = torch.maximum((ordered - grid[:-1]).abs().max(), (ordered - grid[1:]).abs().max())
    return float(gap) * count**0.5


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40])
@pytest.mark.parametrize("stream", STREAMS)
def test_numbers_are_uniform(seed, stream):
    assert kolmogorov_smirnov(numbers(seed=seed, stream=stream)) < 1.95  # 0.1 % level


def test_large_seeds_wrap_around_and_stay_apart():
    """Dates with their time and nanoseconds are seeds; the last product that fits is unchanged."""
    last = 9223344366821
    assert last * 1000003 + noise.MASKS < 2**63 <= (last + 1) * 1000003
    seeds = (last, last + 1, 20260131094500, 1769852700123456789, 2**63 - 1, 2**63 - 1 + 7919)
    index = torch.tensor([0])
    keys = {int(noise.noise_key(s, stream, index)) for s in seeds for stream in STREAMS}
    assert len(keys) == len(seeds) * len(STREAMS)
    wrapped = (2**63 - 1) * 1000003 % 2**64
    assert torch.equal(noise.noise_key(2**63 - 1, 0, index), noise.noise_key(0, wrapped, index))
    assert kolmogorov_smirnov(numbers(seed=1769852700123456789)) < 1.95


def test_fixed_values():
    """A newer version must draw the same noise, or a resumed run would not continue as it began."""
    key = noise.noise_key(7, noise.TOKENS, torch.tensor([0, 1, 2**40]), torch.tensor([3]))
    assert key.tolist() == [-619259228177592199, 1324057611241577088, -3646590204252291340]
    assert noise.uniform(key).tolist() == [
        0.636133335759074,
        0.5242120189391307,
        0.5649886546330706,
    ]
    below = noise.fold(key[:1, None], torch.tensor([0, 126335]))
    expected = [4.638494605899166, 1.1305913984696565]  # a logarithm may differ in its last bit
    assert noise.gumbel(below)[0].tolist() == pytest.approx(expected, rel=1e-15)
    assert int(noise.noise_key(0, noise.MASKS)) == 7958955049054603978


def test_finaliser_is_that_of_splitmix64():
    """The reference generator, started at 0, gives these numbers first."""
    state = torch.arange(3) * noise.GOLDEN
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in noise._mix(state).tolist()] == expected


def test_interval_is_open():
    extremes = torch.tensor([-(2**63), 2**63 - 1, 0, -1])
    bits = noise._shift_right(extremes, 12)
    assert bits.tolist() == [2**51, 2**51 - 1, 0, 2**52 - 1]
    ends = (bits.double() + 0.5) * 2.0**-52
    assert float(ends.min()) == 2.0**-53 and float(ends.max()) == 1 - 2.0**-53
    assert torch.isfinite(-torch.log(-torch.log(ends))).all()
    drawn = numbers()
    assert 0 < float(drawn.min()) < 1e-4 and 1 - 1e-4 < float(drawn.max()) < 1


@pytest.mark.parametrize(
    "other",
    [
        {"first": 1},
        {"first": 2},
        {"first": 1024},
        {"first": 2**32},
        {"seed": 1},
        {"seed": 2},
        {"stream": noise.POSITIONS},
        {"stream": noise.STEPS},
        {"seed": 1, "stream": noise.MASKS},
    ],
)
def test_neighbours_are_independent(other):
    """Correlation, and chi-square of the 16 x 16 table of pairs, at the 0.1 % level or so."""
    one, two = numbers(), numbers(**other)
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 3.3 / COUNT**0.5
    pairs = torch.bincount((one * 16).long() * 16 + (two * 16).long(), minlength=256)
    chi_square = float(((pairs - COUNT / 256) ** 2).sum() / (COUNT / 256))
    assert abs(chi_square - 255) < 3.3 * (2 * 255) ** 0.5


def test_every_index_counts_and_so_does_its_place():
    a, b = torch.tensor(5), torch.tensor(9)
    keys = [
        noise.noise_key(0, noise.TOKENS, a, b),
        noise.noise_key(0, noise.TOKENS, b, a),
        noise.noise_key(0, noise.TOKENS, a),
        noise.noise_key(0, noise.TOKENS, a, b, torch.tensor(0)),
        noise.noise_key(0, noise.TOKENS, a, a),
        noise.noise_key(0, noise.TOKENS, b, b),
        noise.noise_key(1, noise.TOKENS, a, b),
        noise.noise_key(0, noise.STEPS, a, b),
    ]
    assert len({int(key) for key in keys}) == len(keys)


def test_keys_of_a_run_do_not_collide():
    rollouts, steps, positions = (
        torch.arange(500)[:, None, None],
        torch.arange(40),
        torch.arange(50),
    )
    keys = noise.noise_key(0, noise.TOKENS, rollouts, steps[:, None], positions)
    assert keys.shape == (500, 40, 50)
    assert len(keys.unique()) == keys.numel()


def test_a_slice_of_the_indices_gives_a_slice_of_the_noise():
    rows = torch.arange(6)[:, None]
    whole = noise.gumbel(noise.noise_key(3, noise.TOKENS, rows, torch.arange(40)))
    part = noise.gumbel(noise.noise_key(3, noise.TOKENS, rows[2:4], torch.arange(25, 40)))
    assert torch.equal(whole[2:4, 25:], part)


def test_gumbel_max_draws_from_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, float("-inf")], dtype=torch.float64)
    keys = noise.noise_key(0, noise.TOKENS, torch.arange(COUNT)[:, None], torch.arange(5))
    drawn = (logits + noise.gumbel(keys)).argmax(-1)
    seen = torch.bincount(drawn, minlength=5).double()
    expected = logits.softmax(0) * COUNT
    assert int(seen[4]) == 0
    assert float(((seen - expected)[:4] ** 2 / expected[:4]).sum()) < 16.3  # 3 degrees of freedom


def test_gumbel_has_its_mean_and_variance():
    drawn = noise.gumbel(noise.noise_key(5, noise.TOKENS, torch.arange(COUNT)))
    assert abs(float(drawn.mean()) - 0.5772156649) < 4 * 1.2825 / COUNT**0.5
    assert abs(float(drawn.var()) - torch.pi**2 / 6) < 0.03
