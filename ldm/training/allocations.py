"""The memory that tensors take while code runs, without running it: counted on tensors that have no numbers.

Storages are counted from the operation that makes them until nothing holds them, as an allocator sees them.
What libraries allocate inside an operation (workspaces of convolutions) is not seen.

B batch, T and L positions, d width of a head.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most that ever were since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = 0
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and see what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage once, until it is gone."""
        storage = tensor.untyped_storage()
        key = id(storage)  # the same object as long as the storage lives
        if key in self.live or tensor.device.type != "meta":
            return
        self.live[key] = storage.nbytes()
        self.now += self.live[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key).atexit = False

    def drop(self, key: int) -> None:
        """A storage is gone."""
        self.now -= self.live.pop(key)

    def hold(self, module: nn.Module) -> int:
        """Count what a module holds already, in bytes."""
        before = self.now
        for tensor in (*module.parameters(), *module.buffers()):
            self.see(tensor)
        return self.now - before

    def reset(self) -> None:
        """Look for the most from here on."""
        self.most = self.now


class FusedAttention(torch.autograd.Function):
    """What attention in one kernel keeps: its arguments, its result and a number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, T, d), (B, heads, L, d) -> (B, heads, T, d)."""
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of the arguments."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


LOW = {
    F.conv1d,
    F.conv2d,
    F.conv_transpose2d,
    F.linear,
    F.scaled_dot_product_attention,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
}
FULL = {F.group_norm, F.layer_norm}
"""Functions that CUDA's autocast does in bfloat16, and in float32, as far as we use them."""


class AsOnGpu(TorchFunctionMode):
    """Within it operations take the memory that they take on a GPU: attention is one kernel.

    Args:
        autocast: as under CUDA's autocast to bfloat16, which tensors without numbers do not know.
    """

    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        if self.autocast and func in LOW:
            args = [cast(argument, torch.bfloat16) for argument in args]
        elif self.autocast and func in FULL:
            args = [cast(argument, torch.float32) for argument in args]
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value, of this type if it is a tensor of floats."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Backward pass to all leaves, in which what is computed again is counted like the rest.

    `torch.autograd.backward` would leave modes of torch functions aside.
    """
    _engine_run_backward(
        tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextmanager
def counted(*, autocast: bool = False) -> Iterator[Allocations]:
    """Within it tensors have shapes and no numbers, and what they take is counted.

    Nothing is computed and nothing is drawn from the global random state. Code that looks at numbers fails.

    Args:
        autocast: count as under autocast to bfloat16; weights stay float32.
    """
    with torch.device("meta"), AsOnGpu(autocast=autocast), Allocations() as allocations:
        yield allocations
