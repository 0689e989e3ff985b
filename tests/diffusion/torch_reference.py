"""U-ViT and the DDPM UNet in PyTorch, written apart from the package: the oracle of the fixtures.

Functions of a flat dictionary of parameters in the package's own names and layouts, so that gradients compare entry by
entry. `python -m tests.diffusion.torch_reference` writes the fixtures anew; they hold numbers only.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F

from stabletrain.diffusion.unet import DDPM
from tests.diffusion import sampler_reference
from tests.diffusion.cases import (
    TRAINING,
    TRAINING_STEPS,
    TRAJECTORY_CASES,
    TRAJECTORY_NETWORKS,
    UNET_CASES,
    UVIT_CASES,
    case_inputs,
    shapes_of,
    training_inputs,
    training_shapes,
    trajectory_inputs,
)
from tests.diffusion.sampler_reference import GUIDANCE, TRAJECTORIES
from tests.diffusion.weights import by_name, filled, summary_of, wave

FIXTURES = Path(__file__).parent / "fixtures"


class Params(dict):
    """Parameters with the layers' own conventions undone: PyTorch wants [out, in] and OIHW."""

    def linear(self, x, name):
        return F.linear(x, self[f"{name}/kernel"].T, self.get(f"{name}/bias"))

    def conv(self, x, name, stride=1, padding=1):
        kernel = self[f"{name}/kernel"].permute(3, 2, 0, 1).contiguous()
        return F.conv2d(x, kernel, self[f"{name}/bias"], stride=stride, padding=padding)

    def layer_norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}/scale"], self[f"{name}/bias"], 1e-5)

    def group_norm(self, x, name, epsilon):
        width = x.shape[1]
        groups = min(32, width // 4)
        assert width % groups == 0
        return F.group_norm(x, groups, self[f"{name}/scale"], self[f"{name}/bias"], epsilon)


def coefficients(case, count, exponents):
    scaling, kappa = case["skip_scaling"], case.get("kappa", 0.7)
    if scaling == "sqrt2":
        return [math.sqrt(0.5)] * count
    if scaling == "const":
        return [kappa] * count
    if scaling == "cs":
        return [kappa**e for e in exponents]
    return [1.0] * count


def gate(p, name, squeezed):
    return torch.sigmoid(p.linear(F.relu(p.linear(squeezed, f"{name}/squeeze")), f"{name}/excite"))


def merged(p, case, i, h, s, constant, squeeze, shared_name):
    """The concatenation [h, s] over the last axis, scaled."""
    scaling = case["skip_scaling"]
    s = s * constant
    if scaling == "ls":
        s = s * squeeze(s, shared_name)
    elif scaling == "ls-per-skip":
        s = s * squeeze(s, f"merge_{i}/gate")
    elif scaling == "learned-scalar":
        s = s * p[f"merge_{i}/coefficient"]
    elif scaling == "mp-cat":
        total = math.sqrt((h.shape[-1] + s.shape[-1]) / (0.5**2 + 0.5**2))
        h, s = h * 0.5 * total / math.sqrt(h.shape[-1]), s * 0.5 * total / math.sqrt(s.shape[-1])
    both = torch.cat([h, s], dim=-1)
    return p.layer_norm(both, f"merge_{i}") if scaling == "layernorm" else both


def uvit(p, case, images, times, labels):
    size, patch, width, heads, depth = (case[k] for k in ("image_size", "patch_size", "width", "heads", "depth"))
    channels, side, count = case["channels"], size // patch, depth // 2

    def block(x, name):
        batch, length, _ = x.shape
        qkv = p.linear(p.layer_norm(x, f"{name}/norm1"), f"{name}/qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + p.linear(y, f"{name}/proj")
        y = F.gelu(p.linear(p.layer_norm(x, f"{name}/norm2"), f"{name}/fc1"))
        return x + p.linear(y, f"{name}/fc2")

    kernel = p["patch_kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(images.permute(0, 3, 1, 2), kernel, p["patch_bias"], stride=patch).flatten(2).transpose(1, 2)
    half = width // 2
    angles = times[:, None] * torch.pow(10_000.0, -torch.arange(half, dtype=times.dtype) / half)
    time = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if case.get("time_mlp"):
        time = p.linear(F.silu(p.linear(time, "time_0")), "time_1")
    extras = time[:, None]
    if "context_shape" in case:
        extras = torch.cat([extras, p.linear(labels, "context_embedding")], dim=1)
    elif labels is not None:
        extras = torch.cat([p["label_embedding/embedding"][labels][:, None], extras], dim=1)
    x = torch.cat([extras, x], dim=1) + p["position_embedding"]

    def squeeze(s, name):
        return gate(p, name, s.mean(dim=-1))[..., None]

    skips = []
    for i in range(count):
        x = block(x, f"in_block_{i}")
        skips.append(x)
    x = block(x, "mid_block")
    scales = coefficients(case, count, range(count))
    for i in range(count - 1, -1, -1):
        both = merged(p, case, i, x, skips[i], scales[i], squeeze, "gate")
        x = block(p.linear(both, f"skip_linear_{i}"), f"out_block_{i}")
    x = p.linear(p.layer_norm(x, "norm"), "decoder")[:, extras.shape[1] :]
    # F.fold takes (C p1 p2); the network's packing is (p1 p2 C).
    x = x.unflatten(-1, (patch * patch, channels)).transpose(-1, -2).flatten(-2)
    x = F.fold(x.transpose(1, 2), (side * patch, side * patch), kernel_size=patch, stride=patch)
    if case.get("final_convolution", True):
        x = p.conv(x, "final_conv")
    return x.permute(0, 2, 3, 1)


def resampled(x, direction, taps):
    """NCHW at half or twice the resolution, by PyTorch's own pooling and interpolation or a convolution."""
    if taps == (1, 1):
        return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
    line = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = torch.outer(line, line).expand(x.shape[1], 1, -1, -1)
    margin = len(taps) // 2 - 1
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=margin, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=margin, groups=x.shape[1])


def unet(p, case, images, times, labels):
    channels, multipliers, blocks = case["channels"], case["multipliers"], case["blocks"]
    style = case.get("style", DDPM)
    epsilon, both_branches = style.epsilon, style.residual_scale

    half = channels // 2
    last = half if style.time_order == "cos-sin" else half - 1
    rates = torch.exp(torch.arange(half, dtype=times.dtype) * (-math.log(10_000.0) / last))
    angles = times[:, None] * rates
    waves = [angles.cos(), angles.sin()] if style.time_order == "cos-sin" else [angles.sin(), angles.cos()]
    time = torch.cat(waves, dim=-1)
    if labels is not None and style.label_before_mlp:
        classes = case["num_classes"]
        one_hot = F.one_hot(labels, classes + 1)[:, :classes].to(time.dtype)
        time = time + p.linear(one_hot * math.sqrt(classes), "label_projection")
    time = p.linear(F.silu(p.linear(time, "time_0")), "time_1")
    if labels is not None and not style.label_before_mlp:
        time = time + p["label_embedding/embedding"][labels]

    def resblock(x, name, direction=None):
        h = F.silu(p.group_norm(x, f"{name}/norm1", epsilon))
        if direction:
            h, x = (resampled(y, direction, style.resample_filter) for y in (h, x))
        h = p.conv(h, f"{name}/conv1")
        told = p.linear(F.silu(time), f"{name}/time")[:, :, None, None]
        if style.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, p.group_norm(h, f"{name}/norm2", epsilon), scale + 1)
        else:
            h = p.group_norm(h + told, f"{name}/norm2", epsilon)
        h = p.conv(F.silu(h), f"{name}/conv2")
        return both_branches * ((p.conv(x, f"{name}/shortcut", padding=0) if f"{name}/shortcut/kernel" in p else x) + h)

    def attention(x, name):
        batch, width, height, breadth = x.shape
        heads = width // case["head_channels"] if case.get("head_channels") else case["heads"]
        h = p.group_norm(x, f"{name}/norm", epsilon).flatten(2).transpose(1, 2)
        q, k, v = (p.linear(h, f"{name}/{n}").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * breadth, width)
        return both_branches * (x + p.linear(h, f"{name}/proj").transpose(1, 2).reshape(x.shape))

    def stage(x, name):
        x = resblock(x, name)
        return attention(x, f"{name}_attention") if f"{name}_attention/q/kernel" in p else x

    def squeeze(s, name):
        return gate(p, name, s.mean(dim=(1, 2)))[:, None, None]

    x = p.conv(images.permute(0, 3, 1, 2), "stem")
    skips, levels = [x], [0]
    for level in range(len(multipliers)):
        for block in range(blocks):
            x = stage(x, f"down_{level}_{block}")
            skips.append(x)
            levels.append(level)
        if level < len(multipliers) - 1:
            name = f"downsample_{level}"
            if style.residual_resampling:
                x = resblock(x, name, "down")
            elif style.pad_both_sides:
                x = p.conv(x, name, stride=2)
            else:  # "SAME" with stride 2 pads even sizes at the far end only
                x = p.conv(F.pad(x, (0, 1, 0, 1)), name, stride=2, padding=0)
            skips.append(x)
            levels.append(level + 1)
    x = resblock(attention(resblock(x, "mid_block_0"), "mid_attention"), "mid_block_1")
    count = len(skips)
    exponents = levels if case.get("kappa_indexing") == "level" else range(count)
    scales = coefficients(case, count, exponents)
    for level in range(len(multipliers) - 1, -1, -1):
        for block in range(blocks + 1):
            i, s = len(skips) - 1, skips.pop().permute(0, 2, 3, 1)
            both = merged(p, case, i, x.permute(0, 2, 3, 1), s, scales[i], squeeze, f"gate_{s.shape[-1]}")
            x = stage(both.permute(0, 3, 1, 2), f"up_{level}_{block}")
        if level and style.residual_resampling:
            x = resblock(x, f"upsample_{level}", "up")
        elif level:
            x = p.conv(F.interpolate(x, scale_factor=2, mode="nearest"), f"upsample_{level}")
    return p.conv(F.silu(p.group_norm(x, "norm", epsilon)), "final").permute(0, 2, 3, 1)


def numbers(kind: str, name: str) -> dict[str, np.ndarray]:
    """The output of a case, the gradient of <output, cotangent> by the images, and by every parameter.

    Of each parameter's gradient, in the order of their names, two numbers are kept: its norm, and its product with a
    wave of its own name.
    """
    case = {"uvit": UVIT_CASES, "unet": UNET_CASES}[kind][name]
    network = {"uvit": uvit, "unet": unet}[kind]
    params = by_name(filled(shapes_of(kind, name)))
    p = Params({key: torch.tensor(value, requires_grad=True) for key, value in params.items()})
    images, times, labels = case_inputs(case)
    x = torch.tensor(images, requires_grad=True)
    out = network(p, case, x, torch.tensor(times), None if labels is None else torch.tensor(labels))
    (out * torch.tensor(wave("cotangent", tuple(out.shape)))).sum().backward()
    gradients = summary_of({key: value.grad.numpy() for key, value in p.items()})
    return {"output": out.detach().numpy(), "images": x.grad.numpy(), "gradients": gradients}


def trained(name: str) -> dict[str, np.ndarray]:
    """Five steps of `TRAINING[name]` with PyTorch's own AdamW, warm-up, clipping and a moving average: the VP-SDE.

    The losses, and of every parameter and its average the same two numbers as in `numbers`.
    """
    case = TRAINING[name]
    network = {"uvit": uvit, "unet": unet}[case["backbone"]]
    start = by_name(filled(training_shapes(name)))
    p = Params({key: torch.tensor(value, requires_grad=True) for key, value in start.items()})
    average = {key: value.detach().clone() for key, value in p.items()}
    betas = (case["beta1"], case["beta2"])
    optimizer = torch.optim.AdamW(p.values(), case["learning_rate"], betas, 1e-8, weight_decay=case["weight_decay"])
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / case["warmup_steps"], 1))
    losses = []
    for step in range(TRAINING_STEPS):
        clean, labels, times, noise = (torch.tensor(array) for array in training_inputs(step))
        alpha = torch.exp(-0.25 * times**2 * (20 - 0.1) - 0.5 * times * 0.1)[:, None, None, None]
        noisy = alpha * clean + torch.sqrt(1 - alpha**2) * noise
        loss = F.mse_loss(network(p, case, noisy, 999 * times, labels), noise)
        optimizer.zero_grad()
        loss.backward()
        if case["gradient_clip"]:
            torch.nn.utils.clip_grad_norm_(p.values(), case["gradient_clip"])
        optimizer.step()
        warm.step()
        losses.append(loss.item())
        with torch.no_grad():
            for key, value in p.items():
                average[key].mul_(case["ema_decay"]).add_(value, alpha=1 - case["ema_decay"])
    return {
        "losses": np.array(losses),
        "params": summary_of({key: value.detach().numpy() for key, value in p.items()}),
        "ema": summary_of({key: value.numpy() for key, value in average.items()}),
    }


def trajectory(name: str) -> dict[str, np.ndarray]:
    """A trajectory of `TRAJECTORIES[name]`: the papers' algorithm in NumPy around a network in PyTorch."""
    case = TRAJECTORIES[name]
    kind = case.get("network", "uvit")
    start, noise, texts, empty = trajectory_inputs(case["steps"])
    shapes = jax.eval_shape(
        TRAJECTORY_NETWORKS[kind].init,
        jax.random.key(0),
        start.astype(np.float32),
        np.zeros(len(start), np.float32),
        texts if kind == "texts" else None,
    )["params"]
    p = Params({key: torch.tensor(value) for key, value in by_name(filled(shapes)).items()})
    network = unet if kind == "variance" else uvit

    def answer(x, told, context):
        times = torch.full((len(x),), told, dtype=torch.float64)
        return network(p, TRAJECTORY_CASES[kind], torch.tensor(x), times, context).numpy()

    def shown(x, told):
        if kind != "texts":
            return answer(x, told, None)
        nothing = answer(x, told, torch.tensor(empty).expand(len(x), -1, -1))
        return nothing + GUIDANCE * (answer(x, told, torch.tensor(texts)) - nothing)

    return sampler_reference.trajectory(case, shown, start, noise)


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    for kind, cases in (("uvit", UVIT_CASES), ("unet", UNET_CASES)):
        everything = {f"{name}:{key}": value for name in cases for key, value in numbers(kind, name).items()}
        np.savez_compressed(FIXTURES / f"{kind}.npz", **everything)
    courses = {f"{name}:{key}": value for name in TRAINING for key, value in trained(name).items()}
    np.savez_compressed(FIXTURES / "training.npz", **courses)
    ways = {f"{name}:{key}": value for name in TRAJECTORIES for key, value in trajectory(name).items()}
    np.savez_compressed(FIXTURES / "trajectories.npz", **ways)


if __name__ == "__main__":
    main()
