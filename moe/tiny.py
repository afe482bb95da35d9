"""``tiny_cnn``: the small network of quick experiments, about 65 thousand parameters at width 16 and 3 channels.

Four convolutions, each with BatchNorm and ReLU, an average pool to 2 x 2, and a linear head.
"""

from __future__ import annotations

from torch import Tensor, nn

DEFAULT_WIDTH = 16


class TinyCNN(nn.Module):
    """conv5x5/2 w - conv3x3/2 2w - conv3x3 4w - conv3x3/2 4w - pool 2x2 - linear.

    Args:
        channels: of the input image.
        num_outputs: K.
        width: w; the features have 16 w numbers.
    """

    def __init__(self, channels: int, num_outputs: int, width: int = DEFAULT_WIDTH) -> None:
        super().__init__()
        self.block1 = _block(channels, width, kernel=5, stride=2)
        self.block2 = _block(width, 2 * width, kernel=3, stride=2)
        self.block3 = _block(2 * width, 4 * width, kernel=3, stride=1)
        self.block4 = _block(4 * width, 4 * width, kernel=3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(16 * width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]``, H and W at least 9."""
        x = self.block4(self.block3(self.block2(self.block1(x))))
        out: Tensor = self.fc(self.pool(x).flatten(1))
        return out


def _block(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())
