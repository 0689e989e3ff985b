"""A training step of BigGAN-32 with each conditioning against the same networks in PyTorch, on a CPU or a GPU.

A step is `--d-steps` updates of the discriminator and one of the generator on random images, with hinge loss, Adam and
the generator's average, in float32 (on a GPU both sides in TF32). Both sides run in one process and in short turns, so
that whatever else the machine does falls on both. JAX takes the step of `stabletrain gan` with its stability monitor;
PyTorch runs eagerly, with spectral normalisation by its own hook, fused Adam and the faster of its two memory layouts.
A ratio below one means that JAX is faster: the median over turns of the ratio within a turn, of time and of the
processor's time in all threads, which tells more on a machine that others use. Needs PyTorch.

    python benchmarks/gan_step.py                                          # on a CPU: batch 4, one update of each
    python benchmarks/gan_step.py --batch 128 --d-steps 5 --turns 20 --out gpu.json    # on a GPU: as published
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "gan_step.json"
METHODS = {"d2dce": "reacgan", "projection": "biggan", "2c": "contragan", "ac": "acgan"}
CLASSES, SIZE, EMBEDDING, Z, SHARED = 10, 32, 512, 80, 128
RATE, BETAS, EPSILON, AVERAGE = 2e-4, (0.5, 0.999), 1e-6, 0.9999
TEMPERATURE, MARGIN = 0.5, 0.98
Step = Callable[[], None]


# --- JAX --------------------------------------------------------------------------------------------------------------


def jax_step(conditioning: str, batch: int, d_steps: int, width: int, data: Path) -> tuple[Step, int]:
    """One call is one finished step of the program's own experiment; and the number of parameters."""
    import jax

    from stabletrain.gan.config import GanConfig
    from stabletrain.gan.experiment import GanExperiment
    from stabletrain.gan.resolution import resolve
    from stabletrain.training.config import make_config
    from stabletrain.training.devices import compile_step, make_mesh
    from stabletrain.training.state import fresh_state

    values = {
        "method": METHODS[conditioning], "data": str(data), "image_size": SIZE, "network": "biggan", "devices": 1,
        "batch_size": batch, "d_steps": d_steps, "generator_width": width, "discriminator_width": width,
        "generator_spectral": True, "discriminator_spectral": True, "generator_lr": RATE, "discriminator_lr": RATE,
        "ema_decay": AVERAGE, "ema_start": 0, "horizontal_flip": False,
    }  # fmt: skip
    experiment = GanExperiment(resolve(make_config(GanConfig, values)), mesh=make_mesh(1, batch))
    program = compile_step(experiment, experiment.mesh)
    state, position = [fresh_state(experiment)], [0]

    def step() -> None:
        state[0], _ = program(state[0], [experiment.batch(position[0])])
        jax.block_until_ready(state[0])
        position[0] += 1

    return step, experiment.parameter_count


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_step(conditioning: str, batch: int, d_steps: int, width: int, channels_last: bool) -> tuple[Step, int]:
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def spectral(layer: Any) -> Any:
        return torch.nn.utils.spectral_norm(layer, eps=1e-6)

    def conv(inside: int, outside: int, size: int, bias: bool = True) -> Any:
        return spectral(nn.Conv2d(inside, outside, size, padding=size // 2, bias=bias))

    class ConditionalNorm(nn.Module):
        def __init__(self, channels: int, condition: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
            self.gain = spectral(nn.Linear(condition, channels, bias=False))
            self.bias = spectral(nn.Linear(condition, channels, bias=False))

        def forward(self, x: Any, c: Any) -> Any:
            return self.norm(x) * (1 + self.gain(c))[..., None, None] + self.bias(c)[..., None, None]

    class Attention(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.theta, self.phi = (conv(channels, channels // 8, 1, bias=False) for _ in range(2))
            self.g, self.out = (
                conv(channels, channels // 2, 1, bias=False),
                conv(channels // 2, channels, 1, bias=False),
            )
            self.sigma = nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> Any:
            theta = self.theta(x).flatten(2)
            phi, g = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
            seen = g @ torch.softmax(theta.transpose(1, 2) @ phi, dim=-1).transpose(1, 2)
            return x + self.sigma * self.out(seen.unflatten(2, x.shape[2:]))

    class GeneratorBlock(nn.Module):
        def __init__(self, channels: int, condition: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = ConditionalNorm(channels, condition), ConditionalNorm(channels, condition)
            self.conv1, self.conv2 = conv(channels, channels, 3), conv(channels, channels, 3)
            self.shortcut = conv(channels, channels, 1)

        def forward(self, x: Any, c: Any) -> Any:
            h = self.conv1(F.interpolate(F.relu(self.norm1(x, c)), scale_factor=2))
            return self.conv2(F.relu(self.norm2(h, c))) + F.interpolate(self.shortcut(x), scale_factor=2)

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels, part = 4 * width, Z // 4
            self.shared = nn.Embedding(CLASSES, SHARED)
            self.start = spectral(nn.Linear(part, 16 * channels))
            self.blocks = nn.ModuleList(GeneratorBlock(channels, SHARED + part) for _ in range(3))
            self.attention = Attention(channels)
            self.norm, self.out = nn.BatchNorm2d(channels, eps=1e-4), conv(channels, 3, 3)

        def forward(self, z: Any, y: Any) -> Any:
            first, *parts = z.chunk(4, dim=1)
            x = self.start(first).unflatten(1, (-1, 4, 4))
            for number, (block, part) in enumerate(zip(self.blocks, parts)):
                x = block(x, torch.cat([self.shared(y), part], dim=1))
                if number == 1:
                    x = self.attention(x)
            return torch.tanh(self.out(F.relu(self.norm(x))))

    class FirstBlock(nn.Module):
        def __init__(self, outside: int) -> None:
            super().__init__()
            self.conv1, self.conv2, self.shortcut = conv(3, outside, 3), conv(outside, outside, 3), conv(3, outside, 1)

        def forward(self, x: Any) -> Any:
            h = F.avg_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
            return h + self.shortcut(F.avg_pool2d(x, 2))

    class Block(nn.Module):
        def __init__(self, channels: int, halve: bool) -> None:
            super().__init__()
            self.conv1, self.conv2, self.halve = conv(channels, channels, 3), conv(channels, channels, 3), halve
            self.shortcut = conv(channels, channels, 1) if halve else nn.Identity()

        def forward(self, x: Any) -> Any:
            h = self.conv2(F.relu(self.conv1(F.relu(x))))
            return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2)) if self.halve else h + x

    class Discriminator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = 2 * width
            self.first, self.attention = FirstBlock(channels), Attention(channels)
            self.blocks = nn.ModuleList(Block(channels, halve) for halve in (True, False, False))
            self.score = spectral(nn.Linear(channels, 1))
            if conditioning == "projection":
                self.table = spectral(nn.Embedding(CLASSES, channels))
            elif conditioning == "ac":
                self.classifier = spectral(nn.Linear(channels, CLASSES, bias=False))
            else:
                self.embed, self.table = (
                    spectral(nn.Linear(channels, EMBEDDING)),
                    spectral(nn.Embedding(CLASSES, EMBEDDING)),
                )

        def forward(self, x: Any, y: Any) -> tuple[Any, Any]:
            """Scores and the class loss."""
            x = self.attention(self.first(x))
            for block in self.blocks:
                x = block(x)
            h = F.relu(x).sum(dim=(2, 3))
            score = self.score(h)[:, 0]
            if conditioning == "projection":
                return score + (self.table(y) * h).sum(dim=1), 0.0
            if conditioning == "ac":
                return score, F.cross_entropy(self.classifier(h), y)
            f, v = F.normalize(self.embed(h), dim=1), F.normalize(self.table(y), dim=1)
            return score, class_loss(f, v, y)

    def class_loss(f: Any, v: Any, y: Any) -> Any:
        mine, same = torch.eye(len(y), dtype=torch.bool, device=device), y[:, None] == y[None, :]
        if conditioning == "2c":
            positive, pairs = torch.exp((f * v).sum(1)), torch.exp(f @ f.T).masked_fill(mine, 0.0)
            return -torch.log((positive + (pairs * same).sum(1)) / (positive + pairs.sum(1))).mean()
        attraction = F.relu((MARGIN - (f * v).sum(1)) / TEMPERATURE)
        similarity = (f @ f.T + MARGIN - 1) / TEMPERATURE
        shift = similarity.masked_fill(mine, float("-inf")).amax(1, keepdim=True).detach()
        negatives = (torch.exp(F.relu(similarity) - shift) * ~same).sum(1)
        return (attraction + torch.log(torch.exp(-attraction) + negatives)).mean()

    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator, discriminator = (
        network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        for network in (Generator(), Discriminator())
    )
    parameters = sum(p.numel() for network in (generator, discriminator) for p in network.parameters())
    average = [tensor.detach().clone() for tensor in floats(generator)]
    optimizers = [
        torch.optim.Adam(network.parameters(), RATE, BETAS, EPSILON, fused=True)
        for network in (generator, discriminator)
    ]
    images = torch.rand(d_steps, batch, 3, SIZE, SIZE, device=device) * 2 - 1
    weight = 0.5 if conditioning == "d2dce" else 1.0

    def drawn() -> tuple[Any, Any]:
        return torch.randn(batch, Z, device=device), torch.randint(CLASSES, (batch,), device=device)

    def step() -> None:
        for number in range(d_steps):
            z, y = drawn()
            with torch.no_grad():
                fake = generator(z, y)
            real = images[number].contiguous(memory_format=layout)
            of_real, term = discriminator(real, torch.arange(batch, device=device) % CLASSES)
            of_fake, _ = discriminator(fake, y)
            loss = F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean() + weight * term
            optimizers[1].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[1].step()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(False)
        z, y = drawn()
        score, term = discriminator(generator(z, y), y)
        optimizers[0].zero_grad(set_to_none=True)
        (weight * term - score.mean()).backward()
        optimizers[0].step()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_(average, floats(generator), 1 - AVERAGE)
        if device == "cuda":
            torch.cuda.synchronize()

    return step, parameters


def floats(network: Any) -> list[Any]:
    """Parameters and the buffers that are averaged."""
    return [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]


# --- turns ------------------------------------------------------------------------------------------------------------


def measure(conditioning: str, arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Milliseconds per step of each side, and the ratios within turns."""
    shape = (arguments.batch, arguments.d_steps, arguments.width)
    sides = {
        "jax": jax_step(conditioning, *shape, data),
        "torch": torch_step(conditioning, *shape, channels_last=False),
        "torch-channels-last": torch_step(conditioning, *shape, channels_last=True),
    }
    (parameters,) = {count for _, count in sides.values()}  # the same networks on every side
    first: dict[str, float] = {}
    for name, (step, _) in sides.items():
        start = time.perf_counter()
        step()  # compiles, allocates
        first[name] = round(time.perf_counter() - start, 1)
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    work: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.turns):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            start, worked = time.perf_counter(), time.process_time()
            sides[name][0]()
            times[name].append(1e3 * (time.perf_counter() - start))
            work[name].append(1e3 * (time.process_time() - worked))
    return {
        "parameters": parameters,
        "first_call_seconds": first,
        "milliseconds": {
            name: {"median": round(statistics.median(values), 2), "fastest": round(min(values), 2)}
            for name, values in times.items()
        },
        "steps_per_second": {name: round(1e3 / statistics.median(values), 3) for name, values in times.items()},
        "processor_milliseconds": {name: round(statistics.median(values), 2) for name, values in work.items()},
        "ratio_to_torch": ratio(times),
        "processor_ratio_to_torch": ratio(work),
    }


def ratio(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median and quartiles over turns of JAX's time over that of PyTorch's faster layout."""
    fastest = [min(pair) for pair in zip(times["torch"], times["torch-channels-last"])]
    values = [ours / theirs for ours, theirs in zip(times["jax"], fastest)]
    lower, median, upper = (float(np.quantile(values, q)) for q in (0.25, 0.5, 0.75))
    return {"median": round(median, 3), "quartiles": [round(lower, 3), round(upper, 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditionings", nargs="+", choices=METHODS, default=["d2dce"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--d-steps", type=int, default=1)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()

    configure_backend(1, arguments.batch)
    import jax
    import torch

    torch.set_num_threads(cpu_cores())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if torch.cuda.is_available() != (jax.default_backend() == "gpu"):
        raise SystemExit("JAX and PyTorch see different devices: install both for the GPU, or hide it from both")
    load = os.getloadavg()[0]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "noise.npz"
        images = np.random.default_rng(0).integers(0, 256, (100 * CLASSES, SIZE, SIZE, 3), np.uint8)
        np.savez(data, train_x=images, train_y=np.arange(len(images), dtype=np.int32) % CLASSES)
        for name in arguments.conditionings:
            results[name] = found = measure(name, arguments, data)
            took = ", ".join(f"{side} {values['median']} ms" for side, values in found["milliseconds"].items())
            of_time, of_work = (found[key]["median"] for key in ("ratio_to_torch", "processor_ratio_to_torch"))
            print(f"{name}: {took}; ratio to torch {of_time}, of the processor's time {of_work}", flush=True)
    cuda = torch.cuda.is_available()
    document = {
        "what": "a step of BigGAN-32; ratio_to_torch below one: JAX is faster",
        "batch": arguments.batch,
        "d_steps": arguments.d_steps,
        "width": arguments.width,
        "turns": arguments.turns,
        "conditionings": results,
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cpu": cpu_model(),
            "cores": cpu_cores(),
            "system": platform.system(),
            "load_before": round(load, 2),
        },
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
