"""The same distillation steps in PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ._contest import Run
from ._distilled import STUDENT, TEACHER


def _mlp(sizes: tuple[int, ...]) -> Any:
    from torch import nn

    layers: list[Any] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _resnet(width: int) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, a: int, b: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, 1, 1, bias=False),
                nn.BatchNorm2d(b),
            )
            self.short = nn.Sequential()
            if stride > 1 or a != b:
                self.short = nn.Sequential(
                    nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)
                )

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.short(x))

    layers: list[Any] = [
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(3):
        for block in range(3):
            features = width * 2**stage
            layers.append(Block(channels, features, 2 if stage and not block else 1))
            channels = features
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def step(pair: str, size: int) -> Run:
    """A step of a student in training mode by a teacher in evaluation mode, with Adam."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    shape = (size, 28, 28) if pair == "mlp" else (size, 1, 28, 28)
    images = torch.from_numpy(rng.integers(0, 256, shape, np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, size))
    student, teacher = (
        (_mlp(STUDENT), _mlp(TEACHER)) if pair == "mlp" else (_resnet(8), _resnet(16))
    )
    teacher.eval()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)

    def run() -> object:
        x = images.float() / 255
        with torch.no_grad():
            target = torch.softmax(teacher(x) / 4, 1)
        optimizer.zero_grad(set_to_none=True)
        z = student(x)
        soft = F.kl_div(F.log_softmax(z / 4, 1), target, reduction="batchmean") * 16
        loss = 0.1 * F.cross_entropy(z, labels) + 0.9 * soft
        loss.backward()
        optimizer.step()
        return loss.item()

    return run
