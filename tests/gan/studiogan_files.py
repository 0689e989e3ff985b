"""BigGAN checkpoints in the layout of PyTorch-StudioGAN, by formula and without torch, and the networks that they are.

`arrays_of` names every tensor of a state dict; `torch_images` and `torch_features` are the networks as functions of
such a dictionary, with the spectral norm of evaluation: sigma = u^T W v with the stored vectors.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from tests.diffusion.weights import wave
from tests.nn.torch_writing import mapping, number, text, whole, write_zip

WIDTH, PART, SHARED, CLASSES, EMBEDDING = 8, 3, 4, 10, 5
BOTTOM, HIDDEN = 4 * WIDTH, 2 * WIDTH  # channels of the plan for 8 pixels

Arrays = dict[str, np.ndarray]


def _layer(arrays: Arrays, name: str, shape: tuple[int, ...], bias: bool = True) -> None:
    columns = int(np.prod(shape[1:]))
    matrix = 1.5 * wave(name, shape) / np.sqrt(columns)
    u = wave(f"{name} u", (shape[0],))
    v = matrix.reshape(shape[0], -1).T @ u  # so that u^T W v is no accident near zero
    arrays[f"{name}.weight_orig"] = matrix
    arrays[f"{name}.weight_u"], arrays[f"{name}.weight_v"] = u / np.linalg.norm(u), v / np.linalg.norm(v)
    if bias:
        arrays[f"{name}.bias"] = 0.2 * wave(f"{name} bias", shape[:1])


def _norm(arrays: Arrays, name: str, channels: int) -> None:
    arrays[f"{name}.running_mean"] = 0.2 * wave(f"{name} mean", (channels,))
    arrays[f"{name}.running_var"] = 1 + 0.3 * wave(f"{name} var", (channels,))
    arrays[f"{name}.num_batches_tracked"] = np.array(7)


def _attention(arrays: Arrays, name: str, channels: int) -> None:
    for part, shape in {
        "theta": (channels // 8, channels), "phi": (channels // 8, channels), "g": (channels // 2, channels),
        "attn": (channels, channels // 2),
    }.items():  # fmt: skip
        _layer(arrays, f"{name}.conv1x1_{part}", (*shape, 1, 1), bias=False)
    arrays[f"{name}.sigma"] = np.array([0.6])


def generator_arrays(shift: float = 0.0) -> Arrays:
    """The state dict of a generator for 8 pixels: one block and attention behind it. `shift` moves the last bias."""
    arrays: Arrays = {}
    _layer(arrays, "linear0", (16 * BOTTOM, PART))
    arrays["shared.weight"] = wave("shared", (CLASSES, SHARED))
    for place in (1, 2):
        name = f"blocks.0.0.bn{place}"
        _norm(arrays, f"{name}.bn", BOTTOM)
        for kind in ("gain", "bias"):
            _layer(arrays, f"{name}.{kind}", (BOTTOM, PART + SHARED), bias=False)
    for number_, size in ((0, 1), (1, 3), (2, 3)):
        _layer(arrays, f"blocks.0.0.conv2d{number_}", (BOTTOM, BOTTOM, size, size))
    _attention(arrays, "blocks.1.0", BOTTOM)
    _norm(arrays, "bn4", BOTTOM)
    arrays["bn4.weight"], arrays["bn4.bias"] = 1 + 0.2 * wave("scale", (BOTTOM,)), 0.2 * wave("shift", (BOTTOM,))
    _layer(arrays, "conv2d5", (3, BOTTOM, 3, 3))
    arrays["conv2d5.bias"] = arrays["conv2d5.bias"] + shift
    return _single(arrays)


def discriminator_arrays(head: str) -> Arrays:
    """The state dict of a discriminator for 8 pixels: three blocks, attention behind the first, and a head."""
    arrays: Arrays = {}
    for place, before, shortcut in ((0, 3, True), (2, HIDDEN, False), (3, HIDDEN, False)):
        name = f"blocks.{place}.0"
        if shortcut:
            _layer(arrays, f"{name}.conv2d0", (HIDDEN, before, 1, 1))
        _layer(arrays, f"{name}.conv2d1", (HIDDEN, before, 3, 3))
        _layer(arrays, f"{name}.conv2d2", (HIDDEN, HIDDEN, 3, 3))
    _attention(arrays, "blocks.1.0", HIDDEN)
    _layer(arrays, "linear1", (1, HIDDEN))
    if head == "ac":
        _layer(arrays, "linear2", (CLASSES, HIDDEN), bias=False)
    elif head == "embedding":
        _layer(arrays, "linear2", (EMBEDDING, HIDDEN))
        _layer(arrays, "embedding", (CLASSES, EMBEDDING), bias=False)
    else:
        _layer(arrays, "embedding", (CLASSES, HIDDEN), bias=False)
    return _single(arrays)


def _single(arrays: Arrays) -> Arrays:
    return {
        name: np.ascontiguousarray(a, np.int64 if a.dtype.kind == "i" else np.float32) for name, a in arrays.items()
    }


def save(path: Path, arrays: Arrays) -> Path:
    """A checkpoint as the released code writes it: the state dict, the step, and a score that is a NumPy number."""
    state = mapping({name: whole(str(i), array) for i, (name, array) in enumerate(arrays.items())})
    score = pickle.dumps(np.float64(7.79), protocol=2)[2:-1].replace(b"numpy._core", b"numpy.core")
    body = b"}(" + text("state_dict") + state + text("step") + number(76000) + text("best_fid") + score + b"u"
    return write_zip(path, body, {str(i): array.tobytes() for i, array in enumerate(arrays.values())})


# --- the networks in torch --------------------------------------------------------------------------------------------


def _weight(arrays: dict[str, Any], name: str) -> Any:
    weight = arrays[f"{name}.weight_orig"]
    sigma = arrays[f"{name}.weight_u"] @ weight.reshape(len(weight), -1) @ arrays[f"{name}.weight_v"]
    return weight / sigma


def _conv(arrays: dict[str, Any], name: str, x: Any) -> Any:
    import torch.nn.functional as F

    weight = _weight(arrays, name)
    return F.conv2d(x, weight, arrays.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def _attended(arrays: dict[str, Any], name: str, x: Any) -> Any:
    import torch
    import torch.nn.functional as F

    theta = _conv(arrays, f"{name}.conv1x1_theta", x).flatten(2)
    phi = F.max_pool2d(_conv(arrays, f"{name}.conv1x1_phi", x), 2).flatten(2)
    g = F.max_pool2d(_conv(arrays, f"{name}.conv1x1_g", x), 2).flatten(2)
    seen = g @ torch.softmax(theta.transpose(1, 2) @ phi, dim=-1).transpose(1, 2)
    out = _conv(arrays, f"{name}.conv1x1_attn", seen.reshape(len(x), -1, *x.shape[2:]))
    return x + arrays[f"{name}.sigma"] * out


def _normed(arrays: dict[str, Any], name: str, x: Any, **affine: Any) -> Any:
    import torch.nn.functional as F

    return F.batch_norm(x, arrays[f"{name}.running_mean"], arrays[f"{name}.running_var"], eps=1e-4, **affine)


def torch_images(arrays: Arrays, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images [B, C, H, W] of the generator in evaluation."""
    import torch
    import torch.nn.functional as F

    a = {name: torch.tensor(value) for name, value in arrays.items()}
    first, second = torch.tensor(z).split(PART, dim=1)
    condition = torch.cat([a["shared.weight"][torch.tensor(labels)], second], dim=1)
    x = F.linear(first, _weight(a, "linear0"), a["linear0.bias"]).view(-1, BOTTOM, 4, 4)
    hidden = x
    for place in (1, 2):
        name = f"blocks.0.0.bn{place}"
        gain, bias = (F.linear(condition, _weight(a, f"{name}.{kind}")) for kind in ("gain", "bias"))
        hidden = _normed(a, f"{name}.bn", hidden) * (1 + gain[:, :, None, None]) + bias[:, :, None, None]
        hidden = F.relu(hidden)
        hidden = F.interpolate(hidden, scale_factor=2) if place == 1 else hidden
        hidden = _conv(a, f"blocks.0.0.conv2d{place}", hidden)
    x = _attended(a, "blocks.1.0", hidden + _conv(a, "blocks.0.0.conv2d0", F.interpolate(x, scale_factor=2)))
    x = F.relu(_normed(a, "bn4", x, weight=a["bn4.weight"], bias=a["bn4.bias"]))
    return torch.tanh(_conv(a, "conv2d5", x)).numpy()


def torch_features(arrays: Arrays, images: np.ndarray, inplace_relu: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, F] and scores [B] of the discriminator in evaluation, of images [B, C, H, W]."""
    import torch
    import torch.nn.functional as F

    a = {name: torch.tensor(value) for name, value in arrays.items()}
    x = torch.tensor(images)
    hidden = _conv(a, "blocks.0.0.conv2d2", F.relu(_conv(a, "blocks.0.0.conv2d1", x)))
    x = F.avg_pool2d(hidden, 2) + _conv(a, "blocks.0.0.conv2d0", F.avg_pool2d(x, 2))
    x = _attended(a, "blocks.1.0", x)
    for place in (2, 3):
        # An activation in place changes the tensor that the shortcut was to add.
        active = F.relu(x, inplace=inplace_relu)
        x = x + _conv(a, f"blocks.{place}.0.conv2d2", F.relu(_conv(a, f"blocks.{place}.0.conv2d1", active)))
    features = F.relu(x).sum(dim=(2, 3))
    scores = F.linear(features, _weight(a, "linear1"), a["linear1.bias"])[:, 0]
    return features.numpy(), scores.numpy()
