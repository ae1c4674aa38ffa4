"""Data for which everything is known: x0 ~ N(mean, variance), independent in every dimension.

Then x_t ~ N(sqrt(a) mean, a variance + 1 - a), and the best guess of the noise is linear in x_t: no network to train,
no integral that is not a sum. a is alpha_bar_t.
"""

import numpy as np
import torch
from torch import Tensor


def marginal(mean, variance, a):
    """Mean and variance of x_t."""
    return a**0.5 * mean, a * variance + 1 - a


def best_eps(x_t, mean, variance, a):
    """E[eps | x_t]."""
    of_x_t, total = marginal(mean, variance, a)
    return (1 - a) ** 0.5 * (x_t - of_x_t) / total


def normal_nodes(dimensions: int) -> tuple[Tensor, Tensor]:
    """Points [3^dimensions, dimensions] and weights, exact for means of polynomials of degree 5 in standard normals."""
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.stack(np.meshgrid(*[points] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    of_grid = np.stack(np.meshgrid(*[weights / weights.sum()] * dimensions, indexing="ij"), -1)
    return torch.from_numpy(grid), torch.from_numpy(of_grid.reshape(-1, dimensions).prod(1))
