"""The Inception network in PyTorch, written from its description.

Layer names are those of the public file, so that a state dict of this one reads
as that one does.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
  def __init__(self, before, after, kernel, stride=1, padding=0):
    super().__init__()
    self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
    self.bn = nn.BatchNorm2d(after, eps=0.001)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)))


def mean3(x):
  return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Fine(nn.Module):
  def __init__(self, before, pooled):
    super().__init__()
    self.branch1x1 = Conv(before, 64, 1)
    self.branch5x5_1 = Conv(before, 48, 1)
    self.branch5x5_2 = Conv(48, 64, 5, padding=2)
    self.branch3x3dbl_1 = Conv(before, 64, 1)
    self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
    self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
    self.branch_pool = Conv(before, pooled, 1)

  def forward(self, x):
    dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat([
      self.branch1x1(x),
      self.branch5x5_2(self.branch5x5_1(x)),
      self.branch3x3dbl_3(dbl),
      self.branch_pool(mean3(x)),
    ], 1)  # fmt: skip


class ShrinkFine(nn.Module):
  def __init__(self):
    super().__init__()
    self.branch3x3 = Conv(288, 384, 3, 2)
    self.branch3x3dbl_1 = Conv(288, 64, 1)
    self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
    self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

  def forward(self, x):
    dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat(
      [self.branch3x3(x), self.branch3x3dbl_3(dbl), F.max_pool2d(x, 3, 2)], 1
    )


class Middle(nn.Module):
  def __init__(self, c):
    super().__init__()
    wide, high = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    self.branch1x1 = Conv(768, 192, 1)
    self.branch7x7_1 = Conv(768, c, 1)
    self.branch7x7_2 = Conv(c, c, *wide)
    self.branch7x7_3 = Conv(c, 192, *high)
    self.branch7x7dbl_1 = Conv(768, c, 1)
    self.branch7x7dbl_2 = Conv(c, c, *high)
    self.branch7x7dbl_3 = Conv(c, c, *wide)
    self.branch7x7dbl_4 = Conv(c, c, *high)
    self.branch7x7dbl_5 = Conv(c, 192, *wide)
    self.branch_pool = Conv(768, 192, 1)

  def forward(self, x):
    seven, dbl = x, x
    for i in range(1, 4):
      seven = getattr(self, f"branch7x7_{i}")(seven)
    for i in range(1, 6):
      dbl = getattr(self, f"branch7x7dbl_{i}")(dbl)
    return torch.cat(
      [self.branch1x1(x), seven, dbl, self.branch_pool(mean3(x))], 1
    )


class ShrinkMiddle(nn.Module):
  def __init__(self):
    super().__init__()
    self.branch3x3_1 = Conv(768, 192, 1)
    self.branch3x3_2 = Conv(192, 320, 3, 2)
    self.branch7x7x3_1 = Conv(768, 192, 1)
    self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
    self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
    self.branch7x7x3_4 = Conv(192, 192, 3, 2)

  def forward(self, x):
    seven = x
    for i in range(1, 5):
      seven = getattr(self, f"branch7x7x3_{i}")(seven)
    three = self.branch3x3_2(self.branch3x3_1(x))
    return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class Coarse(nn.Module):
  def __init__(self, before, pool):
    super().__init__()
    self.pool = pool
    wide, high = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    self.branch1x1 = Conv(before, 320, 1)
    self.branch3x3_1 = Conv(before, 384, 1)
    self.branch3x3_2a = Conv(384, 384, *wide)
    self.branch3x3_2b = Conv(384, 384, *high)
    self.branch3x3dbl_1 = Conv(before, 448, 1)
    self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
    self.branch3x3dbl_3a = Conv(384, 384, *wide)
    self.branch3x3dbl_3b = Conv(384, 384, *high)
    self.branch_pool = Conv(before, 192, 1)

  def forward(self, x):
    three = self.branch3x3_1(x)
    dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat([
      self.branch1x1(x),
      self.branch3x3_2a(three),
      self.branch3x3_2b(three),
      self.branch3x3dbl_3a(dbl),
      self.branch3x3dbl_3b(dbl),
      self.branch_pool(self.pool(x)),
    ], 1)  # fmt: skip


class Inception(nn.Module):
  def __init__(self):
    super().__init__()
    self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
    self.Conv2d_2a_3x3 = Conv(32, 32, 3)
    self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
    self.Conv2d_3b_1x1 = Conv(64, 80, 1)
    self.Conv2d_4a_3x3 = Conv(80, 192, 3)
    self.Mixed_5b = Fine(192, 32)
    self.Mixed_5c = Fine(256, 64)
    self.Mixed_5d = Fine(288, 64)
    self.Mixed_6a = ShrinkFine()
    for name, c in zip("bcde", (128, 160, 160, 192), strict=True):
      setattr(self, f"Mixed_6{name}", Middle(c))
    self.Mixed_7a = ShrinkMiddle()
    self.Mixed_7b = Coarse(1280, mean3)
    self.Mixed_7c = Coarse(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
    self.fc = nn.Linear(2048, 1008)

  def forward(self, x):
    """Return (pooled, spatial, probabilities) of normalised images."""
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
    x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
    x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
    spatial = self.Mixed_6d.branch1x1(x)[:, :7]
    x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
    pooled = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
    probs = torch.softmax(pooled @ self.fc.weight.T, 1)
    return pooled, spatial.permute(0, 2, 3, 1).flatten(1), probs


@functools.cache
def seeded():
  """Return a network whose batch normalisation does something."""
  torch.manual_seed(0)
  network = Inception().eval()
  for name, x in network.state_dict().items():
    if "bn.running_var" in name:
      x.uniform_(0.5, 2.0)
    elif ".bn." in name and x.ndim:
      x.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    elif name.endswith("conv.weight"):
      x.normal_(0.0, (2 / x[0].numel()) ** 0.5)
  return network
