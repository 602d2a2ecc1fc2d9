import pytest
import torch

from fedproxy.aggregation.space import low_rank
from fedproxy.aggregation.space.low_rank import DENSE, NOISE, balanced, leading, of_product

RANK = 8
TALL = (DENSE + 180, DENSE + 30)


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def spectrum(values, shape=TALL, seed=0):
    """A float32 matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (orthonormal(side, len(values), generator) for side in shape)
    return ((left * values) @ right.T).float()


def noise(shape=TALL, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LENGTH = min(TALL)
POSITIONS = torch.arange(1, LENGTH + 1, dtype=torch.float64)
MATRICES = {
    "noise": noise(),
    "trimmed noise": noise() * (noise().abs() > 2),
    "slow decay": spectrum(POSITIONS**-0.5),
    "fast decay": spectrum(POSITIONS**-2),
    "all equal": spectrum(torch.ones(LENGTH, dtype=torch.float64)),
    "a gap above the rank": spectrum(torch.where(POSITIONS < RANK, 1.0, 0.9)),
    "a cluster around the rank": spectrum(torch.where(POSITIONS < 5 * RANK, 1.0, 0.1)),
    "low rank under noise": spectrum(torch.ones(RANK, dtype=torch.float64)) + 1e-3 * noise(),
    "rank of twenty clients": spectrum(torch.linspace(1, 2, 20 * RANK, dtype=torch.float64)),
    "tiny values": spectrum(1e-25 * POSITIONS**-0.5),
    "large values": spectrum(1e15 * POSITIONS**-0.5),
}


def rebuilt(triplets):
    u, s, vh = triplets
    return (u * s) @ vh


def is_orthonormal(matrix):
    return torch.allclose(matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("name", MATRICES)
def test_the_iteration_errs_as_little_as_the_tail_of_the_exact_singular_values(name, turned):
    matrix = MATRICES[name].T if turned else MATRICES[name]
    u, s, vh = leading(matrix, RANK)
    best = torch.linalg.svdvals(matrix.double())[RANK:].norm()
    assert (matrix.double() - rebuilt((u, s, vh))).norm() <= best * (1 + 1e-6)
    assert is_orthonormal(u)
    assert is_orthonormal(vh.T)
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("rank", [1, RANK, RANK + 1, 3 * RANK])
def test_the_iteration_is_exact_to_float32_where_the_rank_is_low(rank):
    matrix = spectrum(torch.logspace(0, -3, RANK, dtype=torch.float64))
    if rank >= RANK:
        assert (matrix - rebuilt(leading(matrix, rank))).norm() <= 1e-6 * matrix.norm()
    else:
        assert leading(matrix, rank)[1].tolist() == pytest.approx([1.0])


def test_all_singular_values_can_be_asked_for():
    matrix = noise()
    assert torch.allclose(leading(matrix, LENGTH)[1], torch.linalg.svdvals(matrix.double()), rtol=1e-5, atol=1e-5)


def test_a_matrix_of_zeros_has_singular_values_of_zero():
    for shape in (TALL, (5, 3)):
        assert not leading(torch.zeros(shape), 2)[1].any()


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_small_matrices_take_the_exact_decomposition(shape, count):
    matrix = noise(shape)
    u, s, vh = leading(matrix, count)
    exact = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(s, exact[:count], rtol=1e-12)
    error = (matrix.double() - rebuilt((u, s, vh))).norm()
    assert error.item() == pytest.approx(exact[count:].norm().item(), abs=1e-12)


def test_the_same_matrix_gives_the_same_bits_whatever_the_global_generator():
    state = torch.random.get_rng_state()
    first = leading(MATRICES["noise"], RANK)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert all(torch.equal(a, b) for a, b in zip(first, leading(MATRICES["noise"].clone(), RANK), strict=True))


def test_the_iteration_agrees_with_the_exact_decomposition_below_its_own_limit(monkeypatch):
    matrix = spectrum(torch.logspace(0, -2, 40, dtype=torch.float64), shape=(60, 40))
    exact = leading(matrix, 4)
    monkeypatch.setattr(low_rank, "DENSE", 0)
    assert torch.allclose(rebuilt(leading(matrix, 4)), rebuilt(exact), atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 4, 7), (3, 4, 7), (9, 4, 2)])
def test_the_triplets_of_a_product_are_those_of_the_multiplied_matrix(shape):
    m, r, n = shape
    generator = torch.Generator().manual_seed(3)
    b, a = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    count = min(2, *shape)
    found = of_product(b, a, count)
    u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    assert torch.allclose(found[1], s[:count])
    assert torch.allclose(rebuilt(found), rebuilt((u[:, :count], s[:count], vh[:count])))


def test_balanced_by_hand():
    # 4 at (0, 1) and 0.25 at (1, 0): B = (2, 0; 0, 0.5), A = (0, 2; 0.5, 0), up to common signs.
    b, a = balanced(leading(torch.tensor([[0.0, 4.0], [0.25, 0.0]]), 2), torch.zeros(2, 2))
    assert b.abs().tolist() == [[2.0, 0.0], [0.0, 0.5]]
    assert a.abs().tolist() == [[0.0, 2.0], [0.5, 0.0]]
    assert (b @ a).tolist() == [[0.0, 4.0], [0.25, 0.0]]


def test_factors_are_balanced():
    triplets = leading(noise((9, 6)), 4)
    b, a = balanced(triplets, torch.zeros(4, 6))
    for gram in (b.T @ b, a @ a.T):
        assert torch.allclose(gram.double(), triplets[1].diag(), atol=1e-5)


def test_components_without_a_singular_value_can_still_be_trained():
    spare = noise((3, 4), seed=2)
    matrix = torch.zeros(5, 4)
    matrix[2, 1] = 9.0
    b, a = balanced(leading(matrix, 3), spare)
    assert torch.equal(a[1:], spare[1:])
    assert not b[:, 1:].any()
    assert torch.allclose(b @ a, matrix)
    matrix[0, 0] = 9.0 * NOISE / 2
    assert not balanced(leading(matrix, 3), spare)[0][:, 1:].any()
    matrix[0, 0] = 9.0 * NOISE * 2
    assert balanced(leading(matrix, 3), spare)[0][:, 1].any()
