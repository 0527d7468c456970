"""What planning a run takes itself."""

from pathlib import Path
from types import SimpleNamespace

import torch
from kinoloom.trainers.core.memory import make_plan
from kinoloom.trainers.core.placement import Placement
from torch import Tensor


class Wide(torch.nn.Module):
    """A block that keeps 64 MiB for backward."""

    def __init__(self, resident: list[int]) -> None:
        super().__init__()
        self.weight, self.resident = torch.nn.Parameter(torch.ones(())), resident

    def forward(self, x: Tensor) -> Tensor:
        out = (x * self.weight).sin()
        self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        return out


def test_the_plan_keeps_the_activations_of_one_block_at_a_time() -> None:
    resident: list[int] = []
    module = torch.nn.Sequential(*(Wide(resident) for _ in range(6)))
    backbone = SimpleNamespace(module=module, blocks=list(module), placement=Placement())
    x = torch.zeros(16 << 20)
    _, plan = make_plan(backbone, "auto", lambda: iter([module(x)]), 0, 1 << 40)
    assert plan.memory_needed > 6 * x.nbytes
    assert resident[-1] - resident[1] < 3 * x.nbytes, [r >> 20 for r in resident]
