"""What a layer makes of its weight: a matrix on the last dimension, or a convolution's kernel seen as a matrix."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
CONVOLUTIONS = tuple(_CONVOLVE)


class Matrix:
    """A linear layer: x (..., n) to (..., m)."""

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of x with another weight."""
        return F.linear(x, weight, bias)

    def inputs(self, x: Tensor) -> Tensor:
        """x as `product` is to read it. torch chooses how to multiply a strided x by whether the factor trains, and
        rounds by that choice: the two products of a residual start would not cancel."""
        return x.contiguous()

    def product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """x through down (r, n) and up (m, r), without their product."""
        return F.linear(F.linear(x, down), up)

    def rows(self, values: Tensor) -> Tensor:
        """One number for each output (m,), shaped so that it multiplies the layer's outputs."""
        return values


class Convolution(Matrix):
    """A convolution of one, two or three dimensions, its weight (out, in / groups, *kernel) a matrix (out, n).

    n = in / groups x the kernel's size. A product is the layer's own convolution to r channels a group, with its
    stride, padding and dilation, and one of kernel 1 to the outputs.
    """

    def __init__(self, module: _ConvNd):
        self.module = module
        self.convolve = next(call for kind, call in _CONVOLVE.items() if isinstance(module, kind))

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.module._conv_forward(x, weight, bias)

    def inputs(self, x: Tensor) -> Tensor:
        return x  # in the memory format that the convolution wants

    def product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        shape, groups = self.module.weight.shape, self.module.groups
        kernel = down.reshape(-1, *shape[1:])
        # Each group sends its own inputs through the same kernels, and its outputs read its own r channels.
        kernel = kernel if groups == 1 else kernel.repeat(groups, *[1] * (len(shape) - 1))
        inner = self.module._conv_forward(x, kernel, None)
        return self.convolve(inner, up.reshape(*up.shape, *[1] * (len(shape) - 2)), groups=groups)

    def rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.module.weight.dim() - 2))


MATRIX = Matrix()


def layer_of(module: nn.Module) -> Matrix:
    """How the module uses its weight."""
    return Convolution(module) if isinstance(module, CONVOLUTIONS) else MATRIX


def is_read(module: nn.Module) -> bool:
    """Whether an update must be seen by who reads the weight: what the module returns is not the weight's alone, or
    is never asked for (a convolution with a forward of its own, the parts of nn.MultiheadAttention)."""
    if isinstance(module, CONVOLUTIONS):
        return not any(type(module).forward is kind.forward for kind in CONVOLUTIONS)
    return isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear)
