"""The 2015 Inception once more, on NumPy or on torch: NCHW, the published names, one function for each operation.

It shares nothing with the network under test. The NumPy operations are loops over windows; torch's are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

EPSILON = 1e-3


class NumpyOperations:
    """On arrays [B, C, H, W]."""

    def convolution(self, x, weight, stride, padding):
        x = np.pad(x, ((0, 0), (0, 0), *((size, size) for size in padding)))
        windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]  # [B, C, H, W, h, w]
        return np.moveaxis(np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))), -1, 1)

    def normalised(self, x, scale, bias, mean, variance):
        scale, bias, mean, variance = (array[:, None, None] for array in (scale, bias, mean, variance))
        return scale * (x - mean) / np.sqrt(variance + EPSILON) + bias

    def positive(self, x):
        return np.maximum(x, 0)

    def largest(self, x, stride, padding):
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=-np.inf)
        return sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride].max((-1, -2))

    def mean(self, x):
        height, width = x.shape[2:]
        result = np.empty_like(x)
        for i in range(height):
            for j in range(width):
                window = x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                result[:, :, i, j] = window.mean((2, 3))
        return result

    def joined(self, parts):
        return np.concatenate(parts, 1)

    def everywhere(self, x):
        return x.mean((2, 3))

    def linear(self, x, weight, bias):
        return x @ weight.T + bias


class TorchOperations:
    """On tensors [B, C, H, W]."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.functional = torch.nn.functional

    def convolution(self, x, weight, stride, padding):
        return self.functional.conv2d(x, weight, stride=stride, padding=padding)

    def normalised(self, x, scale, bias, mean, variance):
        return self.functional.batch_norm(x, mean, variance, scale, bias, eps=EPSILON)

    def positive(self, x):
        return self.functional.relu_(x)

    def largest(self, x, stride, padding):
        return self.functional.max_pool2d(x, 3, stride, padding)

    def mean(self, x):
        return self.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def joined(self, parts):
        return self.torch.cat(parts, 1)

    def everywhere(self, x):
        return x.mean((2, 3))

    def linear(self, x, weight, bias):
        return self.functional.linear(x, weight, bias)


class Reference:
    """`arrays`: the published names, in the operations' own kind of array."""

    def __init__(self, operations: Any, arrays: Mapping[str, Any]) -> None:
        self.operations = operations
        self.arrays = arrays

    def layer(self, x, name, stride=1, valid=False):
        weight = self.arrays[f"{name}.conv.weight"]
        padding = (0, 0) if valid or stride == 2 else tuple(size // 2 for size in weight.shape[2:])
        x = self.operations.convolution(x, weight, stride, padding)
        norm = (self.arrays[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        return self.operations.positive(self.operations.normalised(x, *norm))

    def chain(self, x, block, names, last_stride=1):
        *first, last = names.split()
        for name in first:
            x = self.layer(x, f"{block}.{name}")
        return self.layer(x, f"{block}.{last}", last_stride)

    def stem(self, x):
        x = self.layer(x, "Conv2d_1a_3x3", stride=2)
        x = self.layer(x, "Conv2d_2a_3x3", valid=True)
        x = self.operations.largest(self.layer(x, "Conv2d_2b_3x3"), 2, 0)
        x = self.layer(self.layer(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", valid=True)
        return self.operations.largest(x, 2, 0)

    def block(self, x, name):
        """One of `Mixed_5b` to `Mixed_7c`."""
        pooled = self.operations.largest(x, 1, 1) if name == "Mixed_7c" else self.operations.mean(x)
        if name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            chains = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")
            parts = [self.chain(x, name, names) for names in chains]
        elif name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            double = " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
            chains = ("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3", double)
            parts = [self.chain(x, name, names) for names in chains]
        elif name in ("Mixed_7b", "Mixed_7c"):
            three = self.chain(x, name, "branch3x3_1")
            double = self.chain(x, name, "branch3x3dbl_1 branch3x3dbl_2")
            parts = [self.chain(x, name, "branch1x1")]
            parts += [self.chain(three, name, f"branch3x3_2{half}") for half in "ab"]
            parts += [self.chain(double, name, f"branch3x3dbl_3{half}") for half in "ab"]
        else:  # the two that halve the size
            chains = {
                "Mixed_6a": ("branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"),
                "Mixed_7a": ("branch3x3_1 branch3x3_2", " ".join(f"branch7x7x3_{i}" for i in range(1, 5))),
            }[name]
            parts = [self.chain(x, name, names, last_stride=2) for names in chains]
            return self.operations.joined([*parts, self.operations.largest(x, 2, 0)])
        return self.operations.joined([*parts, self.chain(pooled, name, "branch_pool")])

    def __call__(self, x):
        """Preprocessed [B, 3, 299, 299] -> (pool3, logits)."""
        x = self.stem(x)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.block(x, f"Mixed_{name}")
        pool3 = self.operations.everywhere(x)
        return pool3, self.operations.linear(pool3, self.arrays["fc.weight"], self.arrays["fc.bias"])
