"""Random draws that depend only on (seed, phase, sample)."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import to_device

STRATA = 16


@dataclass(frozen=True)
class Rng:
    """Random draws for one micro-batch, whose first sample is number `sample` of the phase.

    Every draw has its own generator, seeded from these fields. So a resumed run makes the same draws as an
    uninterrupted one, and the process-wide generators, which samplers use, are not touched.
    `quantile` marks an evaluation: every timestep is at that quantile, and regularisers are off.
    """

    seed: int
    phase: str
    sample: int
    quantile: float | None = None

    @property
    def evaluating(self) -> bool:
        return self.quantile is not None

    def fork(self, name: str) -> "Rng":
        """Independent draws for the same micro-batch."""
        return Rng(self.seed, f"{self.phase}/{name}", self.sample, self.quantile)

    def generator(self, purpose: str, sample: int | None = None, device: torch.device | None = None) -> torch.Generator:
        key = (self.seed, self.phase, self.sample if sample is None else sample, purpose)
        return derived_generator(*key, device=device)

    def noise_like(self, x: Tensor) -> Tensor:
        """N(0, 1) noise like `x` [B, ...]. It is drawn on the CPU, so it is equal on every device."""
        noise = torch.stack(
            [torch.randn(x.shape[1:], generator=self.generator("noise", self.sample + i)) for i in range(len(x))]
        )
        return to_device(noise, x.device, x.dtype)

    def uniform(self, count: int, stratified: bool = True) -> Tensor:
        """Uniform numbers in (0, 1) [count]. Stratified: 16 consecutive samples fall in 16 different sixteenths."""
        if self.quantile is not None:
            return torch.full((count,), self.quantile)
        return torch.stack([self._uniform(self.sample + i, stratified) for i in range(count)])

    def _uniform(self, sample: int, stratified: bool) -> Tensor:
        u = torch.rand((), generator=self.generator("timestep", sample))
        if stratified:
            window, place = divmod(sample, STRATA)
            order = torch.randperm(STRATA, generator=self.generator("strata", window))
            u = (order[place] + u) / STRATA
        return u.clamp(1e-4, 1 - 1e-4)


def derived_generator(*key: object, device: torch.device | None = None) -> torch.Generator:
    """A generator whose seed is a hash of `key`, by default on the CPU."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
