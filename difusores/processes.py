"""The diffusion probabilistic models of 2015: a Markov chain destroys the data, a learned one restores it.

Sohl-Dickstein et al. 2015, "Deep unsupervised learning using nonequilibrium thermodynamics": Gaussian noise
for real data, bit flips for binary data. Both chains have T steps, t = 1 ... T; q is the destruction, p the
restoration, and `bound` is the upper bound on -log2 p(x0) (eqs. 13-14), term by term:

    KL(q(x_T | x0) || p(x_T)) + sum_{t > 1} KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) - log p(x0 | x_1)

The model is a function model(x_t, t) -> [B, ...] of x_t [B, ...] and t [B] int64 in 1 ... T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor, Tensor], Tensor]


def _as_table(betas: Sequence[float] | Tensor) -> Tensor:
    table = torch.as_tensor(betas, dtype=torch.float64).detach().clone()
    if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table <= 1)).all()):
        raise ValueError("betas must be at least two numbers in (0, 1], one per step")
    return table


class _Process:
    """What both chains share. alphas_cumprod: [T + 1] float64, index t, 1 at t = 0."""

    alphas_cumprod: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alphas_cumprod) - 1

    def _at(self, t: Tensor, like: Tensor) -> Tensor:
        if t.shape != like.shape[:1] or int(t.min()) < 0 or int(t.max()) > self.steps:
            raise ValueError(f"t must hold one step from 0 to {self.steps} per image, got {t.tolist()}")
        table = self.alphas_cumprod.to(like.device)[t.to(like.device)]
        return table.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))

    def bound(
        self, model: Model, x0: Tensor, *, generator: torch.Generator | None = None, terms: int | None = None
    ) -> Tensor:
        """Upper bound on -log2 p(x0) divided by the dimensions of an image: bits per dimension, [B].

        Args:
            model: see the class.
            x0: [B, ...] data.
            terms: how many of the terms of t > 1 are computed, evenly spaced from a random start, each
                standing for as many; None computes all. One sample of x_t is drawn for each.
        """
        total = self.prior(x0) + self._term_at(1, model, x0, generator)
        others = self.steps - 1
        count = others if terms is None else min(terms, others)
        offset = float(torch.rand((), generator=generator)) if count < others else 0.0
        for k in range(count):
            step = 2 + int((k + offset) * others / count)
            total = total + self._term_at(step, model, x0, generator) * (others / count)
        return total / (math.log(2) * x0[0].numel())

    def _term_at(self, step: int, model: Model, x0: Tensor, generator: torch.Generator | None) -> Tensor:
        t = torch.full((len(x0),), step)
        return self.term(model, x0, self.forward(x0, t, generator=generator), t)

    def prior(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x0) || p(x_T)) in nats, [B]."""
        raise NotImplementedError

    def forward(self, x0: Tensor, t: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A sample of q(x_t | x0)."""
        raise NotImplementedError

    def term(self, model: Model, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The bound's term of step t in nats, [B]: a KL divergence, -log p(x0 | x_1) where t is 1."""
        raise NotImplementedError


class BinomialProcess(_Process):
    """Bits that are flipped: q(x_t | x_{t-1}) = B(x_{t-1} (1 - beta_t) + beta_t / 2), table App. 1.

    The model returns logits of x0 = 1; p(x_{t-1} | x_t) is q(x_{t-1} | x_t, x0) averaged over that.

    Args:
        betas: [T], in (0, 1]; None: beta_t = 1 / (T - t + 1), which loses the same information at every step.
        steps: T, where betas is None.
    """

    def __init__(self, betas: Sequence[float] | Tensor | None = None, *, steps: int = 100) -> None:
        if betas is None:
            betas = [1 / (steps - t + 1) for t in range(1, steps + 1)]
        self.betas = _as_table(betas)
        self.alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), (1 - self.betas).cumprod(0)])

    def forward(self, x0: Tensor, t: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A sample of q(x_t | x0); x0: [B, ...] of zeros and ones."""
        a = self._at(t, x0)
        return torch.bernoulli(x0 * a + (1 - a) / 2, generator=generator)

    def posterior(self, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The probability that x_{t-1} = 1, given x_t and the probability x0 (or the bit) that x_0 = 1."""
        before, a = self._at(t - 1, xt), self._at(t, xt)
        keep = a / before  # 1 - beta_t
        ones = [before * bit + (1 - before) / 2 for bit in (0.0, 1.0)]  # q(x_{t-1} = 1 | x0)
        likely = torch.where(xt > 0.5, (1 + keep) / 2, (1 - keep) / 2)  # q(x_t | x_{t-1} = 1)
        unlikely = 1 - likely  # q(x_t | x_{t-1} = 0)
        zero, one = (likely * p / (likely * p + unlikely * (1 - p)) for p in ones)
        return zero + (one - zero) * x0

    def prior(self, x0: Tensor) -> Tensor:
        """KL to fair coins; 0 for the default betas."""
        a = float(self.alphas_cumprod[-1])
        p = x0 * a + (1 - a) / 2
        return _bernoulli_kl(p, torch.full_like(p, 0.5)).flatten(1).sum(1)

    def term(self, model: Model, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """See the base class."""
        guess = torch.sigmoid(model(xt, t))
        true, learned = self.posterior(xt, x0, t), self.posterior(xt, guess, t)
        return _bernoulli_kl(true, learned).flatten(1).sum(1)  # at t = 1 the true one is x0 itself

    def sample(
        self, model: Model, shape: Sequence[int], *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Data from the learned chain, [B, ...] of zeros and ones, begun at fair coins."""
        with torch.no_grad():
            x = torch.bernoulli(torch.full(tuple(shape), 0.5), generator=generator)
            for step in range(self.steps, 0, -1):
                t = torch.full((len(x),), step)
                x = torch.bernoulli(self.posterior(x, torch.sigmoid(model(x, t)), t), generator=generator)
        return x


class GaussianProcess(_Process):
    """Real data that noise is added to: q(x_t | x_{t-1}) = N(x_{t-1} sqrt(1 - beta_t), beta_t).

    The model returns the noise in x_t. p(x_{t-1} | x_t) has the variance of q(x_{t-1} | x_t, x0), and beta_1
    at t = 1, where the data are taken for integers: the Gaussian is integrated over the bins of 256 levels in
    [-1, 1], the outer ones open (Ho et al. 2020, eq. 13).

    Args:
        betas: [T], in (0, 1).
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        self.betas = _as_table(betas)
        self.alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), (1 - self.betas).cumprod(0)])

    def forward(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A sample of q(x_t | x0), or the one of a given noise."""
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        a = self._at(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def guess(self, model: Model, xt: Tensor, t: Tensor) -> Tensor:
        """x0 as the model sees it, within [-1, 1]."""
        a = self._at(t, xt)
        x0: Tensor = (xt - (1 - a).sqrt() * model(xt, t)) / a.sqrt()
        return x0.clamp(-1, 1)

    def posterior(self, xt: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x0)."""
        before, a = self._at(t - 1, xt), self._at(t, xt)
        beta = 1 - a / before
        mean = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * xt) / (1 - a)
        return mean, beta * (1 - before) / (1 - a)

    def prior(self, x0: Tensor) -> Tensor:
        """KL to the standard normal distribution."""
        a = float(self.alphas_cumprod[-1])
        return (0.5 * (a * x0**2 - a - math.log(1 - a))).flatten(1).sum(1)

    def term(self, model: Model, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """See the base class. All of t have to be 1, or none."""
        guess = self.guess(model, xt, t)
        if int(t[0]) > 1:
            mean, variance = self.posterior(xt, x0, t)
            learned, _ = self.posterior(xt, guess, t)
            kl: Tensor = (mean - learned) ** 2 / (2 * variance)
            return kl.flatten(1).sum(1)
        scale = math.sqrt(float(self.betas[0]))
        half = 1 / 255  # half a level
        x0, guess = x0.double(), guess.double()
        upper = torch.where(x0 > 1 - half, torch.inf, (x0 + half - guess) / scale)
        lower = torch.where(x0 < half - 1, -torch.inf, (x0 - half - guess) / scale)
        # in the lower tail, where a difference keeps its digits
        lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
        mass: Tensor = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        return -mass.clamp(min=1e-300).log().flatten(1).sum(1)

    def sample(
        self, model: Model, shape: Sequence[int], *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Data from the learned chain, [B, ...], begun at standard normal noise; the last step is a mean."""
        with torch.no_grad():
            x = torch.randn(tuple(shape), generator=generator)
            for step in range(self.steps, 0, -1):
                t = torch.full((len(x),), step)
                x, variance = self.posterior(x, self.guess(model, x, t), t)
                if step > 1:
                    x = x + variance.sqrt() * torch.randn(x.shape, generator=generator)
        return x


def _bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(B(p) || B(q)) in nats, element by element."""
    p, q = p.double(), q.double().clamp(1e-12, 1 - 1e-12)
    kl: Tensor = torch.special.xlogy(p, p) - p * q.log() + torch.special.xlogy(1 - p, 1 - p)
    return kl - (1 - p) * (1 - q).log()


def independent_pixel_bits(train: Tensor, held_out: Tensor, levels: int) -> float:
    """Bits per dimension of held-out data under pixels that know nothing of each other: the baseline.

    Args:
        train, held_out: [N, ...] integers in 0 ... levels - 1.
        levels: 2 for bits, 256 for grey values. One is added to every count.
    """
    counts = torch.stack([F.one_hot(image.long().flatten(), levels) for image in train]).sum(0).double() + 1
    logs = (counts / counts.sum(1, keepdim=True)).log2()
    rows = held_out.long().flatten(1)
    return float(-logs.gather(1, rows.T).mean())
