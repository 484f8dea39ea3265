"""The error of F(4x4, 3x3) for pairs of interpolation points 0, ±a, ±b, ∞, in the arithmetic of the kernel.

    python benchmarks/winograd_points.py

Transforms in fp32, the sum over C in blocks of 64, each from zero; against float64. Relative L2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILES, INPUTS, OUTPUTS, BLOCK = 64, 256, 32, 64
PAIRS = ((1, 2), (1, 1 / 2), (1 / 2, 3 / 2), (2 / 3, 3 / 2), (5 / 8, 3 / 2), (5 / 8, 5 / 4), (3 / 4, 3 / 2))
Array = NDArray[np.float64]


def transforms(a: float, b: float) -> tuple[Array, Array, Array]:
    """A^T [4, 6], G [6, 3], B^T [6, 6] of Toom and Cook's construction."""
    points = [0.0, a, -a, b, -b]
    outputs, weights, image = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for j, p in enumerate(points):
        others = points[:j] + points[j + 1 :]
        outputs[:, j] = p ** np.arange(4)
        weights[j] = p ** np.arange(3) / np.prod([p - q for q in others])
        image[j, :5] = np.poly(others)[::-1]
    outputs[3, 5] = weights[5, 2] = 1
    image[5] = np.poly(points)[::-1]
    return outputs, weights, image


def main() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((TILES, INPUTS, 6, 6))
    x = (x / (1 + np.exp(-x))).astype(np.float32)
    w = (draw.standard_normal((OUTPUTS, INPUTS, 3, 3)) / (3 * INPUTS**0.5)).astype(np.float32)
    oracle = np.zeros((TILES, OUTPUTS, 4, 4))
    chain = np.zeros((TILES, OUTPUTS, 4, 4), np.float32)
    for i, j in np.ndindex(3, 3):
        window = x[:, :, i : i + 4, j : j + 4]
        oracle += np.einsum("tcyx,oc->toyx", window.astype(float), w[:, :, i, j].astype(float))
        for c in range(INPUTS):
            chain += window[:, c, None] * w[None, :, c, i, j, None, None]

    def error(y: NDArray[np.float32]) -> float:
        return float(np.linalg.norm(y - oracle) / np.linalg.norm(oracle))

    print(f"direct sum in one chain {error(chain):.1e}")
    for a, b in PAIRS:
        outputs, weights, image = (m.astype(np.float32) for m in transforms(a, b))
        u = np.einsum("iy,ocyx,jx->ijoc", weights, w, weights)
        half = np.einsum("iy,tcyx->tcix", image, x)
        v = np.einsum("tcix,jx->ijtc", half, image)
        product = np.zeros((6, 6, TILES, OUTPUTS), np.float32)
        for first in range(0, INPUTS, BLOCK):
            block = np.zeros_like(product)
            for c in range(first, first + BLOCK):
                block += v[:, :, :, c, None] * u[:, :, None, :, c]
            product += block
        print(f"{a:.4g}, {b:.4g}: {error(np.einsum('yi,ijto,xj->toyx', outputs, product, outputs)):.1e}")


if __name__ == "__main__":
    main()
