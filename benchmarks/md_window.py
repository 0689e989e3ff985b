"""Replica-steps per second of a window of dynamics with SchNet, against the same network in PyTorch; and the gradient.

Both sides hold the same SchNet (64 features, 6 interactions, 25 Gaussians: 117,953 parameters) with the same weights
and step the same aspirin replicas by the same Nose-Hoover formulas in float32; energies and forces are compared first.
JAX compiles a window of steps whole, over replicas by vmap, on one device; PyTorch runs eagerly with a thread per core,
forces by autograd, replicas as one batch. In one process and in turns, so that whatever else the machine does falls on
both. A ratio above one means that JAX is faster; it is the median over turns. Then the StABlE gradient of h(r) from
2,560 structures: time, and the intermediate memory that the compiled program reserves. Needs PyTorch and frames:

    python benchmarks/md_window.py --data rmd17_aspirin.npz [--replicas 1 16 64] [--turns 3] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "md_window.json"
TIMESTEP, TEMPERATURE, RELAXATION = 0.5, 500.0, 10.0
CUTOFF, GAUSSIANS = 5.0, 25
STRUCTURES = 2560


class TorchWindow:
    """The same network, batched over replicas, and the same integrator, in PyTorch."""

    def __init__(self, params: Any, species: np.ndarray, masses: np.ndarray, scale: float, freedom: int) -> None:
        import torch

        self.torch = torch
        self.weights = {"/".join(path): torch.from_numpy(np.array(leaf)) for path, leaf in _flat(params)}
        self.species = torch.from_numpy(species.astype(np.int64))
        first, second = np.triu_indices(len(species), 1)
        self.first, self.second = torch.from_numpy(first), torch.from_numpy(second)
        self.masses = torch.from_numpy(masses.astype(np.float32))[:, None]
        self.scale, self.freedom = scale, freedom

    def _dense(self, name: str, x: Any) -> Any:
        out = x @ self.weights[f"{name}/kernel"]
        bias = self.weights.get(f"{name}/bias")
        return out if bias is None else out + bias

    def energy(self, x: Any) -> Any:
        """[R, n, 3] -> [R] eV."""
        torch = self.torch

        def softplus(y: Any) -> Any:
            return torch.nn.functional.softplus(y) - math.log(2)

        distance = (x[:, self.second] - x[:, self.first]).norm(dim=-1, keepdim=True)  # (R, P, 1)
        centres = torch.linspace(0, CUTOFF, GAUSSIANS)
        radial = torch.exp(-0.5 * ((distance - centres) / (CUTOFF / (GAUSSIANS - 1))) ** 2)
        envelope = torch.where(distance < CUTOFF, 0.5 * (torch.cos(math.pi * distance / CUTOFF) + 1), 0.0)
        h = self.weights["elements/embedding"][self.species].expand(len(x), -1, -1)
        for number in range(6):
            name = f"interaction_{number}"
            w = self._dense(f"{name}/filter_out", softplus(self._dense(f"{name}/filter_in", radial))) * envelope
            v = self._dense(f"{name}/values", h)
            m = torch.zeros_like(h).index_add(1, self.first, w * v[:, self.second])
            m = m.index_add(1, self.second, w * v[:, self.first])
            h = h + self._dense(f"{name}/update_out", softplus(self._dense(f"{name}/update_in", m)))
        return self.scale * self._dense("energy", softplus(self._dense("hidden", h)))[..., 0].sum(-1)

    def forces(self, x: Any) -> Any:
        """[R, n, 3] -> [R, n, 3] eV / A."""
        x = x.detach().requires_grad_(True)
        return -self.torch.autograd.grad(self.energy(x).sum(), x)[0]

    def run(self, x: Any, v: Any, steps: int) -> Any:
        """Steps of Nose-Hoover, as `stabletrain.nnip.integrators.NoseHoover`."""
        from stabletrain.nnip.units import ACCELERATION, BOLTZMANN

        kT, dt = BOLTZMANN * TEMPERATURE, TIMESTEP
        q, wanted = self.freedom * kT * RELAXATION**2, 0.5 * self.freedom * kT

        def kinetic(v: Any) -> Any:
            return 0.5 * (self.masses * v**2).sum((1, 2)) / ACCELERATION

        zeta = self.torch.zeros(len(x))
        a = self.forces(x) * ACCELERATION / self.masses
        for _ in range(steps):
            drag = a - zeta[:, None, None] * v
            x = x + v * dt + 0.5 * dt**2 * drag
            half = v + 0.5 * dt * drag
            zeta = zeta + dt / (2 * q) * (kinetic(v) - wanted) + dt / (2 * q) * (kinetic(half) - wanted)
            a = self.forces(x) * ACCELERATION / self.masses
            v = (half + 0.5 * dt * a) / (1 + 0.5 * dt * zeta)[:, None, None]
        return x


def _flat(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not hasattr(tree, "items"):
        return [(path, tree)]
    return [entry for name, branch in tree.items() for entry in _flat(branch, (*path, name))]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--work", type=int, default=512, help="replica-steps in a turn of one side, about")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    configure_backend(1, 1)

    import jax
    import jax.numpy as jnp
    import torch

    from stabletrain.nnip.benchmark import Conditions, Simulator
    from stabletrain.nnip.frames import read_frames
    from stabletrain.nnip.potential import EnergyScale, Potential
    from stabletrain.nnip.schnet import SchNet
    from stabletrain.nnip.stable_learning import Estimator, distances_gradient, distances_observable, distances_target
    from stabletrain.nnip.units import thermal_energy

    torch.set_num_threads(cpu_cores())
    frames = read_frames("", options.data)
    system = frames.system
    potential = Potential("schnet", SchNet(), system, CUTOFF, EnergyScale(0.3, {}))
    params = potential.init(jax.random.key(0))
    freedom = Conditions().freedom(system)
    theirs = TorchWindow(jax.device_get(params), system.species, system.masses, 0.3, freedom)
    x0 = jnp.asarray(frames.positions[:4], jnp.float32)
    ours = np.asarray(jax.vmap(potential.energy_and_forces, (None, 0))(params, x0)[1])
    difference = float(np.abs(ours - theirs.forces(torch.from_numpy(np.array(x0))).numpy()).max())
    print(f"largest difference of a force component: {difference:.1e} eV/A", flush=True)

    rows = []
    for replicas in options.replicas:
        steps = max(2, options.work // replicas)
        conditions = Conditions(TEMPERATURE, TIMESTEP, window=steps, frame_every=steps)
        simulator = Simulator(system, conditions, potential=potential)
        starts = frames.positions[np.arange(replicas) % len(frames)]
        swarm = simulator.start(params, starts, jax.random.key(1))
        x, v = (torch.from_numpy(np.array(leaf)) for leaf in (swarm.replicas.position, swarm.replicas.velocity))
        begun = time.perf_counter()
        jax.block_until_ready(simulator.window(params, swarm, jax.random.key(2)))
        compiling = time.perf_counter() - begun
        theirs.run(x, v, 2)
        turns = []
        for _ in range(options.turns):
            begun = time.perf_counter()
            jax.block_until_ready(simulator.window(params, swarm, jax.random.key(2)))
            middle = time.perf_counter()
            theirs.run(x, v, steps)
            turns.append((middle - begun, time.perf_counter() - middle))
        work = replicas * steps
        row = {
            "replicas": replicas,
            "steps": steps,
            "jax_per_second": round(work / statistics.median(t[0] for t in turns), 1),
            "torch_per_second": round(work / statistics.median(t[1] for t in turns), 1),
            "ratio": round(statistics.median(t[1] / t[0] for t in turns), 3),
            "first_call_seconds": round(compiling, 2),
        }
        rows.append(row)
        print(row, flush=True)

    observable = distances_observable(system)
    target = distances_target(observable, frames.positions[:200])
    learn = distances_gradient(observable, target, Estimator(thermal_energy(TEMPERATURE)))
    many = jnp.asarray(frames.positions[np.arange(STRUCTURES) % len(frames)], jnp.float32)
    estimates = []
    for count in (STRUCTURES // 8, STRUCTURES):
        program = jax.jit(
            lambda p, x: learn(potential, p, x, jnp.ones(len(x), bool), jax.random.key(0)).gradient
        ).lower(params, many[:count]).compile()  # fmt: skip
        jax.block_until_ready(program(params, many[:count]))
        seconds = []
        for _ in range(options.turns):
            begun = time.perf_counter()
            jax.block_until_ready(program(params, many[:count]))
            seconds.append(time.perf_counter() - begun)
        memory = program.memory_analysis()
        estimates.append(
            {
                "structures": count,
                "seconds": round(statistics.median(seconds), 2),
                "reserved_mib": round(memory.temp_size_in_bytes / 2**20, 1),
            }
        )
        print(estimates[-1], flush=True)

    result = {
        "what": "replica-steps per second of a Nose-Hoover window; StABlE gradient of h(r)",
        "command": f"python benchmarks/md_window.py --data {Path(options.data).name}",
        "processor": cpu_model(),
        "cores": cpu_cores(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "atoms": system.count,
        "parameters": 117_953,
        "force_difference": difference,
        "windows": rows,
        "gradient": estimates,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
