"""Images per second of diffusion training and sampling against PyTorch, on whatever device JAX finds.

The JAX side is what `stabletrain diffusion` runs: the experiment's own step with the stability monitor, AdamW and the
moving average in one compiled program, data on the device, several steps in one dispatch where that is faster, and a
sampling trajectory as one program. PyTorch's side does the same work twice:

- "official": the loop of the released U-ViT code: batches from the host, autocast (float16 with a gradient scaler on a
  GPU), AdamW as it is by default, the average parameter by parameter, Python around each sampling step;
- "tuned": the same with data on the device, bfloat16, fused AdamW and the average in one call; with --torch-compile,
  the network compiled too.

Sides take turns within one process. Reported: images a second, time of a step, compile time of the first call, peak
memory where the device tells, and model-FLOP utilisation (three forward passes a step; by the data sheet's dense bf16
peak where the device is known, and by the rate of one large product measured here). On a GPU,
U-ViT's attention also runs on tokens padded to multiples of 8 and 64 (--pad-tokens); their "jax_is_faster_by" is the
speed of the unpadded program over theirs. On a CPU that others use too, give it one core, or PyTorch's threads wait
for each other. The second command is for an NVIDIA GPU with JAX and PyTorch:

    taskset -c 0 python -m benchmarks.diffusion_throughput
    python -m benchmarks.diffusion_throughput --case uvit-s2 --batch 128 --precision bfloat16
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is in the same process

import numpy as np

from benchmarks.diffusion_step import CASES as STEP_CASES
from benchmarks.diffusion_step import torch_network
from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model, make_mesh

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, dict[str, Any]] = {
    "uvit-small": STEP_CASES["uvit-small"],
    "uvit-s2": STEP_CASES["uvit-s2-cifar"] | {"batch": 128},
    "unet-ddpm": STEP_CASES["unet-cifar"] | {"batch": 128},
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 products a second of the data sheets (SXM), by a part of the device's name."""
LEARNING_RATE, BETAS, DECAY, AVERAGE = 2e-4, (0.99, 0.999), 0.03, 0.9999
IMAGES = 4096

Side = tuple[Callable[[], None], int]
"""A call that finishes some steps, and how many."""


def config_of(case: dict[str, Any], precision: str, data: Path, pad_tokens: int) -> Any:
    """The program's configuration of a case, on a file of noise."""
    from stabletrain.diffusion.config import DiffusionConfig, resolve
    from stabletrain.training.config import make_config

    values = {
        "backbone": case["network"], "width": case["width"], "heads": case["heads"], "batch_size": case["batch"],
        "dataset": "noise", "data": str(data), "precision": precision, "steps": 1_000_000, "skip_scaling": "none",
        "learning_rate": LEARNING_RATE, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": DECAY,
        "ema_decay": AVERAGE, "ema_ramp": False, "gradient_clip": 0.0, "horizontal_flip": False, "eval_samples": 0,
        "warmup_steps": 2500,
    }  # fmt: skip
    if case["network"] == "uvit":
        values |= {"depth": case["depth"], "patch_size": case["patch"], "pad_tokens": pad_tokens}
    else:
        multipliers = case["multipliers"]
        values |= {"depth": case["blocks"], "channel_multipliers": multipliers, "attention": case["attention"]}
        values |= {"dropout": 0.0}
    return resolve(make_config(DiffusionConfig, values))


class Ours:
    """The program's training step and sampling."""

    def __init__(
        self, case: dict[str, Any], precision: str, images: np.ndarray, sampling_steps: int, *, pad_tokens: int = 0
    ) -> None:
        import jax
        import jax.numpy as jnp

        from stabletrain.diffusion.family import build
        from stabletrain.diffusion.samplers import SAMPLERS, sample
        from stabletrain.training.devices import compile_step, replicated

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "noise.npz"
            np.savez(path, train_x=images, test_x=images[:1])
            devices = min(len(jax.devices()), 2) if jax.default_backend() == "cpu" else 1
            mesh = make_mesh(devices, case["batch"])
            experiment: Any = build(config_of(case, precision, path, pad_tokens), mesh=mesh)
        self.parameters = experiment.parameter_count
        state = jax.jit(experiment.init, out_shardings=replicated(mesh))(jax.random.key(0))
        shape = (case["batch"], *experiment.image_shape)
        forward = jax.jit(lambda p, x: experiment.network.apply({"params": p}, x, jnp.zeros(len(x))))
        # As a GPU's program has them: a CPU's convolutions do with fewer products, and would seem to do less.
        traced = forward.trace(state.params, jax.ShapeDtypeStruct(shape, jnp.float32))
        self.flops = float(traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"])
        count = experiment.inner_steps
        run = compile_step(experiment, mesh, count)
        batches = [experiment.batch(position) for position in range(count)]
        held = [state]

        def train() -> None:
            held[0], metrics = run(held[0], batches)
            metrics.block_until_ready()

        plan, process = SAMPLERS["ddim"](experiment.process, sampling_steps), experiment.process

        def trajectory(params: Any, keys: Any) -> Any:
            def network(noisy: Any, times: Any) -> Any:
                return experiment._apply(params, noisy, times, None)

            return sample(process, plan, network, keys, experiment.image_shape)

        compiled, keys = jax.jit(trajectory), jax.random.split(jax.random.key(1), case["batch"])
        self.plan = plan
        self.training: Side = train, count
        self.sampling: Side = (lambda: jax.block_until_ready(compiled(held[0].params, keys)), 1)
        self._device = jax.devices()[0]

    def memory(self) -> float | None:
        """Peak bytes, where the device tells."""
        stats = self._device.memory_stats()
        return None if not stats else float(stats["peak_bytes_in_use"])


class Torch:
    """The same in PyTorch, as the released loop has it or tuned."""

    def __init__(
        self, case: dict[str, Any], precision: str, images: np.ndarray, plan: Any, *, tuned: bool, compiled: bool
    ) -> None:
        import torch
        from torch.nn import functional as F

        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        network = torch_network(case).to(self.device)
        if case["network"] == "unet":
            network = network.to(memory_format=torch.channels_last)
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        params = list(network.parameters())
        average = [parameter.detach().clone() for parameter in params]
        optimizer = torch.optim.AdamW(
            params, LEARNING_RATE, BETAS, weight_decay=DECAY, **({"fused": True} if tuned else {})
        )
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2500, 1))
        half = precision != "float32"
        kind = torch.float16 if cuda and not tuned else torch.bfloat16
        scaler = torch.amp.GradScaler(self.device.type, enabled=half and kind is torch.float16)
        forward = torch.compile(network) if compiled else network
        source = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        source = source.to(self.device) if tuned else source.pin_memory() if cuda else source
        batch, shape = case["batch"], (case["batch"], *source.shape[1:])

        def train() -> None:
            index = torch.randint(len(source), (batch,), device=source.device)
            clean = source[index].to(self.device, non_blocking=True).float() / 127.5 - 1
            t = torch.rand(batch, device=self.device)
            alpha = torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t)[:, None, None, None]
            noise = torch.randn_like(clean)
            noisy = alpha * clean + torch.sqrt(1 - alpha**2) * noise
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, kind, enabled=half):
                loss = F.mse_loss(forward(noisy, 999 * t).float(), noise)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            warm.step()
            with torch.no_grad():
                if tuned:
                    torch._foreach_lerp_(average, params, 1 - AVERAGE)
                else:
                    for kept, parameter in zip(average, params):
                        kept.mul_(AVERAGE).add_(parameter, alpha=1 - AVERAGE)
            self._wait()

        levels = np.exp(-0.25 * plan.times**2 * 19.9 - 0.05 * plan.times)

        @torch.no_grad()
        def sample() -> None:
            x = torch.randn(shape, device=self.device)
            for i in range(plan.steps):
                times = torch.full((batch,), 999 * float(plan.times[i]), device=self.device)
                with torch.autocast(self.device.type, kind, enabled=half):
                    eps = forward(x, times).float()
                alpha = float(levels[i])
                clean = (x - (1 - alpha**2) ** 0.5 * eps) / alpha
                x = float(plan.clean[i]) * clean + float(plan.noise[i]) * eps
            self._wait()

        self.training: Side = train, 1
        self.sampling: Side = sample, 1

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> float | None:
        """Peak bytes on a GPU; of all PyTorch sides so far."""
        import torch

        return float(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else None


def product_rate(precision: str) -> float:
    """Floating-point operations a second of one large product in JAX: the fastest of five."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), precision)
    multiply = jax.jit(lambda a: a @ a)
    jax.block_until_ready(multiply(x))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x))
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken)


def in_turns(sides: dict[str, Side], turns: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a step for each side and turn, and of each side's first call, which compiles."""
    first, repeats = {}, {}
    for name, (call, _) in sides.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            call, count = sides[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - start) / repeats[name] / count)
    return taken, first


def summary(taken: dict[str, list[float]], first: dict[str, float], batch: int) -> dict[str, Any]:
    """Of each side the time of a step, images a second, the first call, and JAX's speed over it within turns."""
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "images_per_second": batch / statistics.median(values),
            "first_call_seconds": first[name],
            **(
                {}
                if name == "jax"
                else {"jax_is_faster_by": statistics.median(b / a for a, b in zip(taken["jax"], values))}
            ),
        }
        for name, values in taken.items()
    }


def padded_attention(
    ours: Ours, padded: dict[str, Ours], turns: int, seconds: float, batch: int
) -> dict[str, dict[str, Any]]:
    """Training steps of the program as it is and with padded tokens, in turns; printed too."""
    taken, first = in_turns(
        {"jax": ours.training, **{name: side.training for name, side in padded.items()}}, turns, seconds
    )
    found = summary(taken, first, batch)
    for name in padded:
        took, faster = found[name]["milliseconds"], found[name]["jax_is_faster_by"]
        print(f"attention {name}: {took:.1f} ms a step; the unpadded program is faster by {faster:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="uvit-small")
    parser.add_argument("--batch", type=int, help="[default: the case's]")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0, help="Of a turn of one side.")
    parser.add_argument(
        "--pad-tokens", type=int, nargs="*", help="Multiples; U-ViT only. [default: 8 64 on a GPU, none on a CPU]"
    )
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--out", type=Path, help="[default: benchmarks/results/diffusion_throughput_CASE.json]")
    given = parser.parse_args()
    case = CASES[given.case] | ({"batch": given.batch} if given.batch else {})

    configure_backend(min(2, cpu_cores()), case["batch"])
    import jax
    import torch

    jax.config.update("jax_enable_compilation_cache", False)  # the first call is to compile
    torch.set_num_threads(cpu_cores())
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, case["size"], case["size"], case["channels"]), np.uint8)
    ours = Ours(case, given.precision, images, given.sampling_steps)
    sides: dict[str, Any] = {"jax": ours}
    for name, tuned in (("torch-official", False), ("torch-tuned", True)):
        compiled = tuned and given.torch_compile
        sides[name] = Torch(case, given.precision, images, ours.plan, tuned=tuned, compiled=compiled)
        if sides[name].parameters != ours.parameters:
            raise SystemExit(f"{name} has {sides[name].parameters} parameters, JAX {ours.parameters}")

    results: dict[str, Any] = {}
    for what in ("training", "sampling"):
        taken, first = in_turns({name: getattr(side, what) for name, side in sides.items()}, given.turns, given.seconds)
        results[what] = summary(taken, first, case["batch"])
        for name, side in sides.items():
            results[what][name]["peak_bytes"] = side.memory()
    device = jax.devices()[0]
    peak = next((value for part, value in PEAKS.items() if part in device.device_kind), None)
    rate = product_rate(given.precision)
    for name, found in results["training"].items():
        done = 3 * ours.flops / (found["milliseconds"] / 1e3)
        found["share_of_one_product_s_rate"] = done / rate
        found["model_flop_utilisation"] = done / peak if peak and given.precision == "bfloat16" else None
        faster = found.get("jax_is_faster_by")
        share = found["model_flop_utilisation"]
        print(
            f"{name}: {found['images_per_second']:.1f} images/s, {found['milliseconds']:.1f} ms a step"
            + (f", utilisation {100 * share:.1f} %" if share else "")
            + f", {100 * found['share_of_one_product_s_rate']:.0f} % of one product's rate"
            + (f"; JAX is faster by {faster:.2f}" if faster else "")
        )
    for name, found in results["sampling"].items():
        faster = found.get("jax_is_faster_by")
        print(
            f"{name}: {found['images_per_second']:.2f} samples/s"
            + (f"; JAX is faster by {faster:.2f}" if faster else "")
        )

    document = {
        "what": "training and sampling against PyTorch; jax_is_faster_by above one: JAX is faster",
        "case": given.case,
        "batch": case["batch"],
        "precision": given.precision,
        "sampling_steps": given.sampling_steps,
        "parameters": ours.parameters,
        "forward_flops": ours.flops,
        "one_product_s_rate": rate,
        **results,
        "machine": {
            "device": device.device_kind if device.platform != "cpu" else cpu_model(),
            "cores": cpu_cores(),
            "system": platform.system(),
        },
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }
    out = given.out or RESULTS / f"diffusion_throughput_{given.case}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n")
    multiples = given.pad_tokens
    if multiples is None:
        multiples = [8, 64] if device.platform != "cpu" and case["network"] == "uvit" else []
    if multiples:  # last, so that the peak of memory above is of one program, and all above stands if time runs out
        padded = {
            f"padded-to-{multiple}": Ours(case, given.precision, images, given.sampling_steps, pad_tokens=multiple)
            for multiple in multiples
        }
        document["padded_attention"] = padded_attention(ours, padded, given.turns, given.seconds, case["batch"])
        out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
