"""What numbers networks compute in while they are trained."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ldm.training_config import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which a network's forward pass computes in that precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def set_products(precision: Precision) -> None:
    """Let GPUs round the factors of products to TF32, or not; by default torch does in convolutions alone."""
    for setting in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):  # pyright: ignore[reportAttributeAccessIssue]
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
