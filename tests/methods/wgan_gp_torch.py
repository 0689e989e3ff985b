"""The gradient penalty by double backward in PyTorch, written apart from the JAX code, for the critics of the test.

`python -m tests.methods.wgan_gp_torch` writes its numbers to the fixture that is compared where there is no PyTorch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.wgan_gp_networks import FIXTURE, NETWORKS, ONE_SIDED_TARGET, case


def conv(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """x channels first; the padding of TensorFlow's SAME by hand, the larger half behind."""
    *window, _, _ = range(kernel.ndim)
    padding: list[int] = []
    for axis in reversed(window):
        size, width = x.shape[2 + axis], kernel.shape[axis]
        total = max((-(-size // stride) - 1) * stride + width - size, 0)
        padding += [total // 2, total - total // 2]
    function = F.conv2d if kernel.ndim == 4 else F.conv1d
    return function(F.pad(x, padding), kernel.permute(-1, -2, *window), stride=stride)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *(1,) * (like.ndim - 2))


def conv_bias(x: Tensor, p: dict[str, Tensor], layer: int, stride: int = 1) -> Tensor:
    x = conv(x, p[f"k{layer}"], stride)
    return x + per_channel(p[f"b{layer}"], x)


def layer_norm(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    axes = tuple(range(1, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(axes, keepdim=True) + 1e-5)
    return normed * per_channel(scale, x) + per_channel(offset, x)


def flat(x: Tensor) -> Tensor:
    """In the order of a flattened channels-last array."""
    return x.movedim(1, -1).reshape(len(x), -1)


def score(name: str, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The critic's scores; x [B, ..., C] as in JAX."""
    if name == "mlp":
        x = torch.tanh(x @ p["w0"] + p["b0"])
        return F.leaky_relu(x @ p["w1"] + p["b1"], 0.2) @ p["w2"] + p["b2"]
    x = x.movedim(-1, 1)
    if name in ("convolution", "layer_normed"):
        x = conv_bias(F.leaky_relu(conv_bias(x, p, 0, 2), 0.2), p, 1, 2)
        if name == "layer_normed":
            x = layer_norm(x, p["scale1"], p["offset1"])
        return flat(F.leaky_relu(x, 0.2)) @ p["w2"] + p["b2"]
    if name == "bottleneck":
        y = conv_bias(F.relu(conv_bias(F.relu(x), p, 0)), p, 1, 2)
        y = layer_norm(conv(F.relu(y), p["k2"]), p["scale2"], p["offset2"])
        return (flat(conv_bias(x, p, 3, 2) + 0.3 * y) @ p["w4"] + p["b4"]) / 5
    assert name == "text"
    x = conv_bias(x, p, 0)
    x = x + 0.3 * conv_bias(F.relu(conv_bias(F.relu(x), p, 1)), p, 2)
    return flat(x) @ p["w3"] + p["b3"]


def torch_numbers(name: str) -> dict[str, np.ndarray]:
    """The penalty, the one-sided one, and the gradient of the critic's whole loss, lambda = 10, in float64."""
    arrays, real, fake, epsilon = case(name)
    p = {key: torch.tensor(value, requires_grad=True) for key, value in arrays.items()}
    x, generated = torch.tensor(real), torch.tensor(fake)
    mix = torch.tensor(epsilon).reshape(-1, *(1,) * (x.ndim - 1))
    between = (mix * x + (1 - mix) * generated).requires_grad_()
    (slopes,) = torch.autograd.grad(score(name, p, between).sum(), between, create_graph=True)
    norms = slopes.flatten(1).norm(dim=1)
    penalty = ((norms - 1) ** 2).mean()
    loss = score(name, p, generated).mean() - score(name, p, x).mean() + 10 * penalty
    loss.backward()
    one_sided = (torch.clamp(norms - ONE_SIDED_TARGET, min=0) ** 2).mean()
    numbers = {"penalty": penalty, "one_sided": one_sided, "loss": loss}
    found = {key: value.detach().numpy() for key, value in numbers.items()}
    for key, value in p.items():
        found[f"gradient {key}"] = np.zeros(value.shape) if value.grad is None else value.grad.numpy()
    return found


def main() -> None:
    FIXTURE.parent.mkdir(exist_ok=True)
    numbers = {f"{name}:{key}": value for name in NETWORKS for key, value in torch_numbers(name).items()}
    np.savez_compressed(FIXTURE, **numbers)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
