"""The border between pictures as bytes and pictures as tensors: here alone dtype, range and layout change.

N pictures, H W height and width.
"""

import numpy as np
import torch
from torch import Tensor

from ldm.device import CPU, placed


def from_uint8(images: np.ndarray, *, device: torch.device = CPU) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1] on a device, channels-last in memory."""
    levels = placed(torch.from_numpy(np.ascontiguousarray(images)), device)  # a byte for a number of four
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) float in [-1, 1] -> (N, H, W, 3) uint8, clamped and rounded to the nearest level."""
    levels = ((images.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
