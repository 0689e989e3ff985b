"""A training step of U-ViT and of the DDPM UNet against the same networks in PyTorch, on the CPU.

Both sides predict noise for the same images, take the squared error, its gradient, and one step of AdamW, in float32,
in one process and in short turns, so that whatever else the machine does falls on all of them. JAX runs on one device,
as `stabletrain diffusion` does by default, and on a virtual one per core (at most two); PyTorch runs eagerly with a
thread per core, its fused AdamW, and the faster of its two memory layouts. A ratio below one means that JAX is faster;
it is the median over turns of the ratio within a turn. Needs PyTorch:

    python benchmarks/diffusion_step.py [--cases NAME ...] [--turns 12] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model, make_mesh, replicated

RESULT = Path(__file__).parent / "results" / "diffusion_step.json"
LEARNING_RATE, BETAS, DECAY = 1e-4, (0.9, 0.99), 0.03

CASES: dict[str, dict[str, Any]] = {
    "uvit-small": {
        "network": "uvit", "batch": 64, "size": 8, "channels": 1,
        "width": 96, "depth": 6, "heads": 4, "patch": 2,
    },
    "unet-small": {
        "network": "unet", "batch": 64, "size": 8, "channels": 1,
        "width": 24, "multipliers": (1, 2), "blocks": 1, "attention": (), "heads": 1,
    },
    "uvit-s2-cifar": {
        "network": "uvit", "batch": 4, "size": 32, "channels": 3,
        "width": 512, "depth": 12, "heads": 8, "patch": 2,
    },
    "unet-cifar": {
        "network": "unet", "batch": 4, "size": 32, "channels": 3,
        "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,), "heads": 1,
    },
}  # fmt: skip
"""What `stabletrain diffusion` trains on small images, and the published networks for CIFAR-10 with few images."""

Step = Callable[[], None]


# --- JAX --------------------------------------------------------------------------------------------------------------


def jax_step(case: dict[str, Any], data: tuple[np.ndarray, ...], devices: int) -> tuple[Step, int]:
    """One call is one finished step; and the number of parameters."""
    import jax
    import jax.numpy as jnp
    import optax

    from stabletrain.diffusion.unet import UNet
    from stabletrain.diffusion.uvit import UViT
    from stabletrain.training.devices import batch_sharding

    network: Any
    if case["network"] == "uvit":
        network = UViT(case["size"], case["channels"], case["patch"], case["width"], case["depth"], case["heads"])
    else:
        network = UNet(
            case["channels"], case["width"], case["multipliers"], case["blocks"], case["attention"], case["heads"]
        )
    mesh = make_mesh(devices, case["batch"])
    images, times, noise = jax.device_put(data, batch_sharding(mesh))
    optimizer = optax.adamw(LEARNING_RATE, *BETAS, weight_decay=DECAY)

    def start(key: jax.Array) -> tuple[Any, Any]:
        params = network.init(key, jnp.zeros_like(images[:1]), jnp.zeros(1))["params"]
        return params, optimizer.init(params)

    def update(state: tuple[Any, Any], images: Any, times: Any, noise: Any) -> tuple[tuple[Any, Any], Any]:
        def loss_of(params: Any) -> Any:
            return jnp.mean((network.apply({"params": params}, images, times) - noise) ** 2)

        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = [jax.jit(start, out_shardings=replicated(mesh))(jax.random.key(0))]
    compiled = jax.jit(update, donate_argnums=0, out_shardings=replicated(mesh))

    def step() -> None:
        state[0], loss = compiled(state[0], images, times, noise)
        jax.block_until_ready((state[0], loss))

    return step, sum(leaf.size for leaf in jax.tree.leaves(state[0][0]))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_network(case: dict[str, Any]) -> Any:
    """The case's network as a module of images [B, C, H, W] and times [B]."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def sinusoid(times: Any, width: int) -> Any:
        half = width // 2
        angles = times[:, None] * torch.exp(torch.arange(half, device=times.device) * (-math.log(1e4) / half))
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def heads_of(x: Any, heads: int) -> Any:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Any) -> Any:
            q, k, v = (heads_of(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class UViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, self.patch, channels = case["width"], case["patch"], case["channels"]
            self.side = case["size"] // self.patch
            self.embed = nn.Conv2d(channels, width, self.patch, stride=self.patch)
            self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.side**2, width))
            count = case["depth"] // 2
            self.down = nn.ModuleList(Block(width, case["heads"]) for _ in range(count))
            self.middle = Block(width, case["heads"])
            self.merge = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(count))
            self.up = nn.ModuleList(Block(width, case["heads"]) for _ in range(count))
            self.norm, self.decode = nn.LayerNorm(width), nn.Linear(width, self.patch**2 * channels)
            self.final = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, images: Any, times: Any) -> Any:
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([sinusoid(times, x.shape[-1])[:, None], x], dim=1) + self.positions
            skips = []
            for block in self.down:
                x = block(x)
                skips.append(x)
            x = self.middle(x)
            for merge, block in zip(self.merge, self.up):
                x = block(merge(torch.cat([x, skips.pop()], dim=-1)))
            x = self.decode(self.norm(x))[:, 1:].unflatten(1, (self.side, self.side))
            x = x.unflatten(-1, (self.patch, self.patch, -1)).permute(0, 5, 1, 3, 2, 4)  # B C h p1 w p2
            return self.final(x.flatten(4, 5).flatten(2, 3))

    def norm(width: int) -> nn.GroupNorm:
        groups = max(g for g in range(1, min(32, width // 4) + 1) if width % g == 0)
        return nn.GroupNorm(groups, width, eps=1e-6)

    class Residual(nn.Module):
        def __init__(self, inside: int, outside: int, time: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
            self.time = nn.Linear(time, outside)
            self.norm2, self.conv2 = norm(outside), nn.Conv2d(outside, outside, 3, padding=1)
            self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

        def forward(self, x: Any, time: Any) -> Any:
            h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
            return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))

    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = norm(width)
            self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x: Any) -> Any:
            h = self.norm(x).flatten(2).transpose(1, 2)
            q, k, v = (heads_of(layer(h), case["heads"]) for layer in (self.q, self.k, self.v))
            h = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

    class Stage(nn.Module):
        def __init__(self, inside: int, outside: int, time: int, attended: bool) -> None:
            super().__init__()
            self.residual = Residual(inside, outside, time)
            self.attention = Attention(outside) if attended else nn.Identity()

        def forward(self, x: Any, time: Any) -> Any:
            return self.attention(self.residual(x, time))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, channels, size = case["width"], case["channels"], case["size"]
            time = 4 * width
            self.width, self.levels = width, len(case["multipliers"])
            self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
            self.stem = nn.Conv2d(channels, width, 3, padding=1)
            self.down, self.up = nn.ModuleList(), nn.ModuleList()
            self.smaller, self.larger = nn.ModuleList(), nn.ModuleList()

            def stage(inside: int, outside: int, level: int) -> Stage:
                return Stage(inside, outside, time, size // 2**level in case["attention"])

            now, widths = width, [width]
            for level, multiplier in enumerate(case["multipliers"]):
                for _ in range(case["blocks"]):
                    self.down.append(stage(now, width * multiplier, level))
                    now = width * multiplier
                    widths.append(now)
                if level + 1 < self.levels:
                    self.smaller.append(nn.Conv2d(now, now, 3, stride=2))
                    widths.append(now)
            self.middle = nn.ModuleList([Residual(now, now, time), Attention(now), Residual(now, now, time)])
            for level in reversed(range(self.levels)):
                outside = width * case["multipliers"][level]
                for _ in range(case["blocks"] + 1):
                    self.up.append(stage(now + widths.pop(), outside, level))
                    now = outside
                if level:
                    self.larger.append(nn.Conv2d(now, now, 3, padding=1))
            self.norm, self.final = norm(now), nn.Conv2d(now, channels, 3, padding=1)

        def forward(self, images: Any, times: Any) -> Any:
            time = self.time(sinusoid(times, self.width))
            x = self.stem(images)
            skips, down, up = [x], iter(self.down), iter(self.up)
            for level in range(self.levels):
                for _ in range(case["blocks"]):
                    x = next(down)(x, time)
                    skips.append(x)
                if level + 1 < self.levels:
                    x = self.smaller[level](F.pad(x, (0, 1, 0, 1)))
                    skips.append(x)
            x = self.middle[2](self.middle[1](self.middle[0](x, time)), time)
            for level in range(self.levels):
                for _ in range(case["blocks"] + 1):
                    x = next(up)(torch.cat([x, skips.pop()], dim=1), time)
                if level + 1 < self.levels:
                    x = self.larger[level](F.interpolate(x, scale_factor=2, mode="nearest"))
            return self.final(F.silu(self.norm(x)))

    torch.manual_seed(0)
    return UViT() if case["network"] == "uvit" else UNet()


def torch_step(case: dict[str, Any], data: tuple[np.ndarray, ...], channels_last: bool) -> tuple[Step, int]:
    """The same in PyTorch."""
    import torch
    from torch.nn import functional as F

    network = torch_network(case)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    images, times, noise = (torch.from_numpy(array) for array in data)
    images, noise = (x.permute(0, 3, 1, 2).contiguous(memory_format=layout) for x in (images, noise))
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, BETAS, weight_decay=DECAY, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(network(images, times), noise).backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in network.parameters())


# --- turns ------------------------------------------------------------------------------------------------------------


def measure(case: dict[str, Any], turns: int, devices: int) -> dict[str, Any]:
    """Milliseconds per step of each side, and the ratios within turns."""
    random = np.random.default_rng(0)
    shape = (case["batch"], case["size"], case["size"], case["channels"])
    images, noise = (random.standard_normal(shape, np.float32) for _ in range(2))
    data = images, random.uniform(0, 999, case["batch"]).astype(np.float32), noise
    sides = {f"jax-{count}": jax_step(case, data, count) for count in sorted({1, devices})}
    sides["torch"] = torch_step(case, data, channels_last=False)
    if case["network"] == "unet":
        sides["torch-channels-last"] = torch_step(case, data, channels_last=True)
    (parameters,) = {count for _, count in sides.values()}  # the same network on every side

    steps = {name: step for name, (step, _) in sides.items()}
    repeats = {}
    for name, step in steps.items():
        step()  # compiles, allocates
        start = time.perf_counter()
        step()
        repeats[name] = max(1, round(0.15 / (time.perf_counter() - start)))  # a turn lasts about 0.15 s at least
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        order = list(steps) if turn % 2 == 0 else list(steps)[::-1]
        for name in order:
            steps[name]()  # brings its data back into the caches
            start = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / repeats[name])

    fastest_torch = [min(pair) for pair in zip(*(times[name] for name in times if name.startswith("torch")))]
    found: dict[str, Any] = {"batch": case["batch"], "parameters": parameters, "milliseconds": {}, "ratio_to_torch": {}}
    for name, values in times.items():
        found["milliseconds"][name] = {"median": statistics.median(values), "fastest": min(values)}
        if name.startswith("jax"):
            ratios = sorted(value / other for value, other in zip(values, fastest_torch))
            lower, median, upper = (float(np.quantile(ratios, q)) for q in (0.25, 0.5, 0.75))
            found["ratio_to_torch"][name] = {"median": median, "quartiles": [lower, upper]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    devices = min(2, cpu_cores())
    configure_backend(devices, 64)
    import flax
    import jax
    import torch

    torch.set_num_threads(cpu_cores())
    load = os.getloadavg()[0]
    results = {}
    for name in arguments.cases:
        results[name] = found = measure(CASES[name], arguments.turns, devices)
        took = ", ".join(f"{side} {values['median']:.1f} ms" for side, values in found["milliseconds"].items())
        ratios = ", ".join(f"{side} {values['median']:.2f}" for side, values in found["ratio_to_torch"].items())
        print(f"{name}: {took}; ratio to torch: {ratios}", flush=True)
    document = {
        "what": "forward, backward and AdamW in float32; ratio_to_torch below one: JAX is faster",
        "turns": arguments.turns,
        "cases": results,
        "machine": {
            "cpu": cpu_model(),
            "cores": cpu_cores(),
            "system": platform.system(),
            "load_before": round(load, 2),
        },
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "torch": torch.__version__},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
