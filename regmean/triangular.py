"""Cholesky factors of large systems, and substitution.

On a CPU both are in blocks, so that nearly all of their work is matrix products. On some processors, LAPACK's own
routines reach half the rate of products or less. Block forms as in Golub and Van Loan, "Matrix Computations" (4th
edition), sections 3.1.4 and 4.2.9. Diagonal blocks are inverted, so that solving with them is a product as well. A GPU
would wait for the host at each block, so PyTorch's own routines are used there.
"""

import torch

BLOCK = 256  # rows of a diagonal block: more leave more work to LAPACK; with fewer, products are slower


class Factor:
    """Cholesky factor L with L L^T = A.

    Args:
        matrix: A, symmetric, (n, n); overwritten with the factor.

    Raises:
        ArithmeticError: A is not positive definite to working precision.
    """

    def __init__(self, matrix: torch.Tensor):
        # L below the diagonal blocks, L^T above them: rows of both are contiguous in memory.
        self._matrix = matrix
        self._blocks = [(start, min(start + BLOCK, len(matrix))) for start in range(0, len(matrix), BLOCK)]
        self._inverses: list[torch.Tensor] = []
        for start, stop in self._blocks:
            corner, failed = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
            if failed:
                raise ArithmeticError("not positive definite")
            identity = torch.eye(stop - start, dtype=corner.dtype, device=corner.device)
            self._inverses.append(torch.linalg.solve_triangular(corner, identity, upper=False).contiguous())
            below = matrix[stop:, start:stop] @ self._inverses[-1].T
            matrix[stop:, start:stop], matrix[start:stop, stop:] = below, below.T
            for first in range(stop, len(matrix), BLOCK):
                last = first + BLOCK
                rows = below[first - stop : last - stop]
                matrix[first:last, stop:last].addmm_(rows, below[: last - stop].T, alpha=-1.0)

    def solve(self, columns: torch.Tensor) -> torch.Tensor:
        """X with A X = columns, both (n, m), in the memory of `columns`."""
        blocks = list(zip(self._blocks, self._inverses, strict=True))
        for (start, stop), inverse in blocks:
            part = columns[start:stop]
            if start:
                part.addmm_(self._matrix[start:stop, :start], columns[:start], alpha=-1.0)
            part.copy_(inverse @ part)
        for (start, stop), inverse in reversed(blocks):
            part = columns[start:stop]
            if stop < len(columns):
                part.addmm_(self._matrix[start:stop, stop:], columns[stop:], alpha=-1.0)
            part.copy_(inverse.T @ part)
        return columns


class LibraryFactor:
    """Same as `Factor` by PyTorch's own routines; does not overwrite the matrix."""

    def __init__(self, matrix: torch.Tensor):
        self._lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed.item():
            raise ArithmeticError("not positive definite")

    def solve(self, columns: torch.Tensor) -> torch.Tensor:
        """X with A X = columns, both (n, m)."""
        return torch.cholesky_solve(columns, self._lower)


def factor_on(device: torch.device) -> type[Factor] | type[LibraryFactor]:
    """Class of Cholesky factors for matrices on this device."""
    return LibraryFactor if device.type == "cuda" else Factor
