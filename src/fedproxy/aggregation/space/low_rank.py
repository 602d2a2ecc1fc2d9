"""The best approximation of a matrix by one of low rank, and its two balanced factors."""

import torch

DENSE = 512
"""Smaller dimension up to which all singular values are computed; beyond, only the leading ones, iteratively."""

EXTRA = 8
"""Columns of a block of the iteration beyond the rank: what lies just below it then hardly slows the iteration down."""

GAIN = 1e-6
"""The iteration ends when a step takes no more than this share off the squared error."""

ROUNDING = 1e-13
"""Share of a matrix's squared norm that its float32 rounding may make up."""

NOISE = 2.0**-22
"""A singular value below this share of the largest is what float32 cannot tell from zero."""

_SEED = 0

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def leading(matrix: torch.Tensor, count: int) -> Triplets:
    """The leading singular triplets: U_c diag(S_c) V_cᵀ is the best approximation of rank c.

    The same matrix gives the same bits; the global random state is neither used nor changed.

    Args:
        matrix: [m, n], float32, finite.
        count: c, from 1 to min(m, n).

    Returns:
        U [m, c] and Vᵀ [c, n] of orthonormal columns and rows, and S [c], falling; all float64.

    Reference: Eckart, Young, "The Approximation of One Matrix by Another of Lower Rank", 1936.
    """
    if min(matrix.shape) <= DENSE:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u[:, :count], s[:count], vh[:count]
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _leading_tall(matrix.T, count)
        return vh.T, s, u.T
    return _leading_tall(matrix, count)


def _leading_tall(matrix: torch.Tensor, count: int) -> Triplets:
    """Block Krylov iteration on MᵀM from a fixed start, with Rayleigh-Ritz over all blocks so far.

    The matrix is multiplied in float32, the blocks are kept orthonormal in float64. What a step takes off the squared
    error, ‖M‖² - Σ s², tells when to end: tightly clustered singular values need not be told apart for it.

    Args:
        matrix: M, [m, n] with m ≥ n.
        count: c.

    Returns:
        As of `leading`.

    Reference: Musco, Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition", 2015, Alg. 2.
    """
    rows, columns = matrix.shape
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(columns, min(count + EXTRA, columns), dtype=torch.float64, generator=generator)
    block = torch.linalg.qr(start.to(matrix.device)).Q
    basis = block[:, :0]
    images = torch.empty(rows, 0, dtype=torch.float64, device=matrix.device)
    gram = torch.empty(0, 0, dtype=torch.float64, device=matrix.device)
    captured = 0.0
    while True:
        image = matrix @ block.float()
        wide = image.double()
        cross = images.T @ wide
        gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, wide.T @ wide], 1)])
        basis, images = torch.cat([basis, block], 1), torch.cat([images, wide], 1)
        values, vectors = torch.linalg.eigh(gram)
        before, captured = captured, float(values[-count:].sum())
        gain = captured - before
        if gain <= max(GAIN * (total - captured), ROUNDING * total) or basis.shape[1] == columns:
            break
        image /= image.abs().max()  # MᵀM itself would leave float32's range where M is tiny
        block = (matrix.T @ image).double()[:, : columns - basis.shape[1]]
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    chosen = vectors[:, -count:]
    u, s, wh = torch.linalg.svd(images @ chosen, full_matrices=False)
    return u, s, wh @ (basis @ chosen).T


def of_product(b: torch.Tensor, a: torch.Tensor, count: int) -> Triplets:
    """The leading singular triplets of B·A without the product: from QR of both factors and an r × r core.

    Args:
        b: B, [m, r].
        a: A, [r, n].
        count: c, from 1 to min(m, r, n).

    Returns:
        As of `leading`.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u[:, :count], s[:count], vh[:count] @ right.Q.T


def balanced(triplets: Triplets, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of equal weight: B = U S^½ and A = S^½ Vᵀ.

    A component without a singular value of its own (see `NOISE`) would have zeros in both factors, and no gradient
    would ever bring it back. It gets a zero column of B and a spare row of A instead, as a fresh adapter has: it adds
    nothing to the product, and can be trained.

    Args:
        triplets: c ≤ r of them, falling.
        spare: [r, n]; row i stands in for component i.

    Returns:
        B [m, r] and A [r, n], float32.
    """
    u, s, vh = triplets
    live = int((s > NOISE * s[0]).sum())
    root = s[:live].sqrt()
    b = torch.zeros(u.shape[0], spare.shape[0], device=spare.device)
    a = spare.float().clone()
    b[:, :live], a[:live] = u[:, :live] * root, root[:, None] * vh[:live]
    return b, a
