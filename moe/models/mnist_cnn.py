"""DomainBed's network for 28 x 28 inputs: four convolutions with GroupNorm, a global average pool, 128 features.

Source: Gulrajani and Lopez-Paz (arXiv 2007.01434), appendix; public code, commit b93c22a1. Note the order: convolution,
ReLU, norm.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 128
GROUPS = 8


class MnistCNN(nn.Module):
    """conv3x3 64 - conv3x3/2 128 - conv3x3 128 - conv3x3 128, each with ReLU and GroupNorm; pool; linear head.

    State-dict names of the features are the official ones: ``conv{1..4}.*``, ``bn{0..3}.*``.

    Args:
        channels: of the input image.
        num_outputs: K; 0 leaves the head out, and the network gives its features.
    """

    def __init__(self, channels: int, num_outputs: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, FEATURES, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.conv4 = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.bn0 = nn.GroupNorm(GROUPS, 64)
        self.bn1, self.bn2, self.bn3 = (nn.GroupNorm(GROUPS, FEATURES) for _ in range(3))
        self.head: nn.Module = nn.Linear(FEATURES, num_outputs) if num_outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` (or features ``[B, 128]``) of images ``[B, C, H, W]`` of any size."""
        x = self.bn0(F.relu(self.conv1(x)))
        x = self.bn1(F.relu(self.conv2(x)))
        x = self.bn2(F.relu(self.conv3(x)))
        x = self.bn3(F.relu(self.conv4(x)))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out
