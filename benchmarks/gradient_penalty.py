"""What the gradient penalty costs: a critic step with it against one without, both forms, and against PyTorch.

A step is a critic step of Algorithm 1 of WGAN-GP: fakes from the generator, the critic's whole loss on them and on a
real batch that is given, its gradient, and Adam, in float32. The
variants run in one process in short turns, so that whatever else the machine does falls on all of them; a ratio is the
median over turns of the ratio within a turn. `jax` without a penalty is the base: with it a step shall cost at most
1.7 times as much. On a CPU the same ratios are also of processor time (`ratios_of_cpu_time`), which a busy machine
changes less than the clock's and by which the limit is judged there. The compiler's count of operations, over that of
the base, is beside them (`operations`). PyTorch runs eagerly, double backward
by `create_graph`, with as many threads (one, or one per core) as are faster here. JAX runs on one virtual device.
Needs PyTorch, unless --no-torch:

    python benchmarks/gradient_penalty.py [--cases NAME ...] [--turns 15] [--out FILE.json]

On an NVIDIA GPU (PyTorch is left out where it has none), in a few minutes:

    python benchmarks/gradient_penalty.py --platform cuda --turns 31 --out gradient_penalty_gpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "gradient_penalty.json"
LAMBDA, RATE, BETA1, BETA2 = 10.0, 1e-4, 0.5, 0.9
LIMIT = 1.7

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"shape": (2,), "batch": 256, "units": 512, "layers": 3},
    "convolution": {"shape": (32, 32, 3), "batch": 64, "width": 32},
    "convolution-layer-norm": {"shape": (32, 32, 3), "batch": 64, "width": 32, "norm": "layer"},
    "text": {"shape": (32, 64), "batch": 64, "width": 64, "blocks": 2},
}
"""The released toy networks; DCGAN's without and with layer normalisation; the language model's in small."""
LATENT = 128

Step = Callable[[], None]


def jax_steps(case: dict[str, Any], real: np.ndarray) -> tuple[dict[str, Step], dict[str, float]]:
    """One call of each is one finished step; and the operations of each, as the compiler counts them."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from stabletrain.gan.networks.lsun import DcganCritic, DcganGenerator
    from stabletrain.gan.networks.text_resnet import TextCritic, TextGenerator
    from stabletrain.methods.wgan_gp import critic_loss, gradient_penalty, gradient_penalty_plain, tf1_adam

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, points: jax.Array, *, train: bool) -> jax.Array:
            for _ in range(case["layers"]):
                points = nn.relu(nn.Dense(case["units"])(points))
            return points

    class MlpGenerator(nn.Module):
        @nn.compact
        def __call__(self, latent: jax.Array, *, train: bool) -> jax.Array:
            return nn.Dense(2)(Mlp()(latent, train=train))

    if "units" in case:
        trunk: Any = Mlp()
        generator: Any = MlpGenerator()
    elif "blocks" in case:
        trunk = TextCritic(width=case["width"], blocks=case["blocks"])
        generator = TextGenerator(case["shape"][0], case["shape"][1], case["width"], case["blocks"])
    else:
        trunk = DcganCritic(width=case["width"], norm=case.get("norm", "none"))
        generator = DcganGenerator(case["shape"][0], 3, width=case["width"], norm="none")

    class Critic(nn.Module):
        @nn.compact
        def __call__(self, samples: jax.Array) -> jax.Array:
            return nn.Dense(1)(trunk.copy(name="trunk")(samples, train=True))[:, 0]

    critic = Critic()
    optimizer = tf1_adam(RATE, beta1=BETA1, beta2=BETA2)
    batch = jnp.asarray(real)
    made = generator.init(jax.random.key(1), jnp.zeros((1, LATENT)), train=True)

    def update(penalty: Any, state: Any, made: Any, key: Any) -> Any:
        fake = generator.apply(made, jax.random.normal(key, (len(batch), LATENT)), train=True)

        def loss_of(params: Any) -> Any:
            score: Any = partial(critic.apply, {"params": params})
            scores = score(jnp.concatenate([batch, fake]))
            loss = critic_loss(scores[: len(batch)], scores[len(batch) :])
            if penalty is None:
                return loss
            return loss + LAMBDA * penalty(score, batch, fake, jax.random.uniform(key, (len(batch),)))

        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    steps: dict[str, Step] = {}
    operations: dict[str, float] = {}
    forms = {"jax": None, "jax-penalty": gradient_penalty, "jax-penalty-plain": gradient_penalty_plain}
    for name, penalty in forms.items():
        params = critic.init(jax.random.key(0), batch)["params"]
        state = [(params, optimizer.init(params)), 0]
        program = jax.jit(partial(update, penalty), donate_argnums=0)
        compiled = program.lower(state[0], made, jax.random.key(0)).compile()
        counted: Any = compiled.cost_analysis()
        operations[name] = float(counted["flops"])

        def step(state: Any = state, compiled: Any = compiled) -> None:
            state[0], loss = compiled(state[0], made, jax.random.key(state[1]))
            state[1] += 1
            jax.block_until_ready((state[0], loss))

        steps[name] = step
    return steps, operations


def torch_steps(case: dict[str, Any], real: np.ndarray, device: str) -> dict[str, Step]:
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Conv(nn.Module):
        """5x5 with stride 2 and the padding of TensorFlow's SAME."""

        def __init__(self, inputs: int, outputs: int, norm: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 5, 2)
            self.norm = nn.GroupNorm(1, outputs) if norm else nn.Identity()

        def forward(self, x: Any) -> Any:
            return F.leaky_relu(self.norm(self.conv(F.pad(x, (1, 2, 1, 2)))), 0.2)

    class Deconv(nn.Module):
        """5x5 with stride 2, TensorFlow's SAME."""

        def __init__(self, inputs: int, outputs: int, activate: Any) -> None:
            super().__init__()
            self.conv, self.activate = nn.ConvTranspose2d(inputs, outputs, 5, 2), activate

        def forward(self, x: Any) -> Any:
            size = 2 * x.shape[-1]
            return self.activate(self.conv(x)[:, :, 1 : 1 + size, 1 : 1 + size])

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv1d(width, width, 5, padding=2) for _ in range(2))

        def forward(self, x: Any) -> Any:
            return x + 0.3 * self.second(F.relu(self.first(F.relu(x))))

    def mlp(inputs: int, outputs: int) -> Any:
        sizes = [inputs, *[case["units"]] * case["layers"]]
        layers: list[Any] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))

    def build_generator() -> Any:
        if "units" in case:
            return mlp(LATENT, 2)
        width = case["width"]
        if "blocks" in case:
            length, symbols = case["shape"]
            blocks = [Block(width) for _ in range(case["blocks"])]
            start = [nn.Linear(LATENT, width * length), nn.Unflatten(1, (width, length))]
            return nn.Sequential(*start, *blocks, nn.Conv1d(width, symbols, 1), nn.Softmax(dim=1))
        start = [nn.Linear(LATENT, 16 * 4 * width), nn.ReLU(), nn.Unflatten(1, (4 * width, 4, 4))]
        deconvs = [Deconv(4 * width, 2 * width, F.relu), Deconv(2 * width, width, F.relu), Deconv(width, 3, torch.tanh)]
        return nn.Sequential(*start, *deconvs)

    def build() -> Any:
        if "units" in case:
            return mlp(case["shape"][0], 1)
        width = case["width"]
        if "blocks" in case:
            length, symbols = case["shape"]
            blocks = [Block(width) for _ in range(case["blocks"])]
            return nn.Sequential(nn.Conv1d(symbols, width, 1), *blocks, nn.Flatten(), nn.Linear(width * length, 1))
        norm = case.get("norm") == "layer"
        convs = [Conv(3, width, False), Conv(width, 2 * width, norm), Conv(2 * width, 4 * width, norm)]
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * 4 * 4 * width, 1))

    layout = (0, 3, 1, 2) if real.ndim == 4 else (0, 2, 1) if real.ndim == 3 else (0, 1)
    x = torch.tensor(real.transpose(layout)).contiguous().to(device)
    generator = build_generator().to(device)

    def run(critic: Any, optimizer: Any, penalised: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            y = generator(torch.randn(len(x), LATENT, device=device))
        scores = critic(torch.cat([x, y]))
        loss = scores[len(x) :].mean() - scores[: len(x)].mean()
        if penalised:
            mix = torch.rand(len(x), *[1] * (x.ndim - 1), device=device)
            between = (mix * x + (1 - mix) * y).requires_grad_()
            (slopes,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            loss = loss + LAMBDA * ((slopes.flatten(1).norm(dim=1) - 1) ** 2).mean()
        loss.backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    steps: dict[str, Step] = {}
    for name, penalised in {"torch": False, "torch-penalty": True}.items():
        critic = build().to(device)
        fused = torch.optim.Adam(critic.parameters(), RATE, (BETA1, BETA2), fused=True)
        steps[name] = partial(run, critic, fused, penalised)
    return steps


def faster_threads(step: Step) -> int:
    """PyTorch's threads that serve this step better: on a busy machine many wait for each other."""
    import torch

    fastest = {}
    for threads in {1, cpu_cores()}:
        torch.set_num_threads(threads)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        fastest[threads] = statistics.median(times)
    chosen = min(fastest, key=fastest.__getitem__)
    torch.set_num_threads(chosen)
    return chosen


def measure(
    steps: dict[str, Step], turns: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of a step of each variant in each turn, by the clock and of processor time of this process.

    A turn gives each variant about `seconds`.
    """
    counts = {}
    for name, step in steps.items():
        step()
        begun = time.perf_counter()
        step()
        counts[name] = max(1, round(seconds / (time.perf_counter() - begun)))
    found: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        order = list(steps) if turn % 2 == 0 else list(steps)[::-1]
        for name in order:
            begun, used = time.perf_counter(), time.process_time()
            for _ in range(counts[name]):
                steps[name]()
            processor[name].append(1000 * (time.process_time() - used) / counts[name])
            found[name].append(1000 * (time.perf_counter() - begun) / counts[name])
    return found, processor


def ratio(found: dict[str, list[float]], over: str, base: str) -> dict[str, Any]:
    """The median and the quartiles over turns of the ratio within a turn."""
    ratios = [first / second for first, second in zip(found[over], found[base], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]}


def ratios_of(found: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What is compared, with or without PyTorch."""
    pairs = {"penalty": ("jax-penalty", "jax"), "plain_penalty": ("jax-penalty-plain", "jax")}
    if "torch" in found:
        pairs |= {
            "torch_penalty": ("torch-penalty", "torch"),
            "jax_to_torch": ("jax", "torch"),
            "jax_to_torch_with_penalty": ("jax-penalty", "torch-penalty"),
        }
    return {name: ratio(found, over, base) for name, (over, base) in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each variant in a turn")
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.turns < 2:
        parser.error("--turns must be at least 2: a ratio needs quartiles")
    os.environ["JAX_PLATFORMS"] = options.platform
    configure_backend(1, 1)
    import jax

    cases = {}
    for name in options.cases:
        case = CASES[name]
        rng = np.random.default_rng(0)
        real = rng.standard_normal((case["batch"], *case["shape"])).astype(np.float32)
        steps, operations = jax_steps(case, real)
        threads = 0
        if not options.no_torch:
            import torch

            device = "cuda" if options.platform == "cuda" and torch.cuda.is_available() else "cpu"
            if device == options.platform:
                steps |= torch_steps(case, real, device)
                threads = faster_threads(steps["torch-penalty"])
        found, processor = measure(steps, options.turns, options.seconds)
        ratios = ratios_of(found)
        cases[name] = {
            "case": {key: list(value) if isinstance(value, tuple) else value for key, value in case.items()},
            "steps_per_second": {key: 1000 / statistics.median(values) for key, values in found.items()},
            "ratios": ratios,
            "operations": {key: value / operations["jax"] for key, value in operations.items()},
            "torch_threads": threads,
        }
        judged = ratios
        if options.platform == "cpu":
            judged = cases[name]["ratios_of_cpu_time"] = ratios_of(processor)
        cases[name]["within_limit"] = judged["penalty"]["median"] <= LIMIT
        line = ", ".join(f"{key} {value['median']:.2f}" for key, value in ratios.items())
        print(f"{name}: {line}; steps/s {cases[name]['steps_per_second']}", flush=True)
    document = {
        "what": "a critic step; `penalty` is with over without, `jax_to_torch` below one means that JAX is faster",
        "limit": LIMIT,
        "turns": options.turns,
        "cases": cases,
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cpu": cpu_model(),
            "cores": cpu_cores(),
            "load": os.getloadavg()[0],
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
