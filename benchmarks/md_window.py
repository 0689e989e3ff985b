"""Replica-steps per second of a window of dynamics with SchNet, against the same network in PyTorch; and the gradient.

Both sides hold the same SchNet (64 features, 6 interactions, 25 Gaussians: 117,953 parameters) with the same weights
and step the same replicas by the same Nose-Hoover formulas in float32; energies and forces are compared first. JAX
compiles a window of steps whole, over replicas by vmap, on one device; PyTorch runs eagerly, on CPU with a thread per
core, forces by autograd, replicas as one batch. In one process and in turns, so that whatever else the machine does
falls on both. A ratio above one means that JAX is faster; it is the median over turns.

Then JAX alone: the window over the number of atoms (a lattice of 3 A; up to 50 atoms all pairs, beyond a padded list),
and the StABlE gradient of h(r) from 320 and 2,560 structures: time, the memory that the compiled program reserves, and
by how much the process (the GPU's allocator) grew at its peak.

    python benchmarks/md_window.py [--data rmd17_aspirin.npz] [--replicas 1 16 64] [--turns 3] [--out FILE.json]

Where other work runs on the machine, `--one-core` gives both sides one core and counts the seconds of its time that the
process got, which that work does not change much.

On a machine with an NVIDIA GPU, JAX and PyTorch both on it, in less than ten minutes:

    python benchmarks/md_window.py --device gpu --data rmd17_aspirin.npz --work 16384 --out md_window_gpu.json
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

from stabletrain.training.devices import configure_backend, cpu_cores, cpu_model

RESULT = Path(__file__).parent / "results" / "md_window.json"
TIMESTEP, TEMPERATURE, RELAXATION = 0.5, 500.0, 10.0
CUTOFF, GAUSSIANS = 5.0, 25
STRUCTURES = 2560
ATOM_REPLICAS = 2
PARTS = ("windows", "atoms", "gradient")
CLOCK = [time.perf_counter]


class TorchWindow:
    """The same network, batched over replicas, and the same integrator, in PyTorch."""

    def __init__(
        self, params: Any, species: np.ndarray, masses: np.ndarray, scale: float, freedom: int, device: str
    ) -> None:
        import torch

        self.torch, self.device = torch, device
        self.weights = {"/".join(path): self.array(np.array(leaf)) for path, leaf in _flat(params)}
        self.species = self.array(species.astype(np.int64))
        first, second = np.triu_indices(len(species), 1)
        self.first, self.second = self.array(first), self.array(second)
        self.masses = self.array(masses.astype(np.float32))[:, None]
        self.centres = torch.linspace(0, CUTOFF, GAUSSIANS, device=device)
        self.scale, self.freedom = scale, freedom

    def array(self, values: Any) -> Any:
        """A tensor on the device."""
        return self.torch.from_numpy(np.array(values)).to(self.device)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device != "cpu":
            self.torch.cuda.synchronize()

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
        radial = torch.exp(-0.5 * ((distance - self.centres) / (CUTOFF / (GAUSSIANS - 1))) ** 2)
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

        zeta = self.torch.zeros(len(x), device=self.device)
        a = self.forces(x) * ACCELERATION / self.masses
        for _ in range(steps):
            drag = a - zeta[:, None, None] * v
            x = x + v * dt + 0.5 * dt**2 * drag
            half = v + 0.5 * dt * drag
            zeta = zeta + dt / (2 * q) * (kinetic(v) - wanted) + dt / (2 * q) * (kinetic(half) - wanted)
            a = self.forces(x) * ACCELERATION / self.masses
            v = (half + 0.5 * dt * a) / (1 + 0.5 * dt * zeta)[:, None, None]
        self.wait()
        return x


def _flat(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not hasattr(tree, "items"):
        return [(path, tree)]
    return [entry for name, branch in tree.items() for entry in _flat(branch, (*path, name))]


def peak_growth(device: str, run: Callable[[], Any]) -> float | None:
    """MiB by which the process, or the GPU's allocator, grew at its peak while `run` ran; None where nothing tells."""
    import jax

    if device != "cpu":
        before = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
        run()
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return None if before is None or peak is None else (peak - before) / 2**20

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1])

    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
        before_kib = status("VmRSS:")
        run()
        return (status("VmHWM:") - before_kib) / 2**10
    except (OSError, StopIteration):
        return None


def timed(turns: int, run: Callable[[], Any]) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(turns):
        begun = CLOCK[0]()
        run()
        seconds.append(CLOCK[0]() - begun)
    return statistics.median(seconds)


def against_torch(options: argparse.Namespace, potential: Any, params: Any, frames: Any) -> tuple[list[Any], float]:
    """Windows of both sides by number of replicas; the largest difference of a force component."""
    import jax
    import jax.numpy as jnp

    from stabletrain.nnip.benchmark import Conditions, Simulator

    system = potential.system
    device = "cpu" if options.device == "cpu" else "cuda"
    theirs = TorchWindow(
        jax.device_get(params), system.species, system.masses, 0.3, Conditions().freedom(system), device
    )
    x0 = jnp.asarray(frames.positions[:4], jnp.float32)
    ours = np.asarray(jax.jit(jax.vmap(potential.energy_and_forces, (None, 0)))(params, x0)[1])
    difference = float(np.abs(ours - theirs.forces(theirs.array(x0)).cpu().numpy()).max())
    print(f"largest difference of a force component: {difference:.1e} eV/A", flush=True)

    rows = []
    for replicas in options.replicas:
        steps = max(2, options.work // replicas)
        conditions = Conditions(TEMPERATURE, TIMESTEP, window=steps, frame_every=steps)
        simulator = Simulator(system, conditions, potential=potential)
        starts = frames.positions[np.arange(replicas) % len(frames)]
        swarm = simulator.start(params, starts, jax.random.key(1))
        x, v = (theirs.array(leaf) for leaf in (swarm.replicas.position, swarm.replicas.velocity))
        begun = CLOCK[0]()
        jax.block_until_ready(simulator.window(params, swarm, jax.random.key(2)))
        compiling = CLOCK[0]() - begun
        theirs.run(x, v, 2)
        turns = []
        for _ in range(options.turns):
            begun = CLOCK[0]()
            jax.block_until_ready(simulator.window(params, swarm, jax.random.key(2)))
            middle = CLOCK[0]()
            theirs.run(x, v, steps)
            turns.append((middle - begun, CLOCK[0]() - middle))
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
    return rows, difference


def by_atoms(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Windows of JAX over the number of atoms: hydrogens and oxygens on a cubic lattice, 3 A apart, a few replicas."""
    import jax

    from stabletrain.nnip.benchmark import Conditions, Simulator
    from stabletrain.nnip.potential import EnergyScale, Potential
    from stabletrain.nnip.schnet import SchNet
    from stabletrain.nnip.systems import make_system

    rows = []
    for edge in options.lattice:
        atoms = edge**3
        lattice = 3.0 * np.indices((edge,) * 3).reshape(3, -1).T
        system = make_system(np.where(np.arange(atoms) % 3, 1, 8), lattice)
        potential = Potential("schnet", SchNet(), system, CUTOFF, EnergyScale(0.01, {}))
        params = potential.init(jax.random.key(0))
        steps = max(2, options.work // (ATOM_REPLICAS * atoms))
        conditions = Conditions(50.0, TIMESTEP, window=steps, frame_every=steps)
        simulator = Simulator(system, conditions, potential=potential)
        swarm = simulator.start(params, np.repeat(lattice[None], ATOM_REPLICAS, axis=0), jax.random.key(1))
        jax.block_until_ready(simulator.window(params, swarm, jax.random.key(2)))
        seconds = timed(
            options.turns,
            lambda: jax.block_until_ready(simulator.window(params, swarm, jax.random.key(2))),  # noqa: B023
        )
        assert simulator.potential is not None
        rows.append({
            "atoms": atoms,
            "pairs": simulator.potential.capacity or atoms * (atoms - 1) // 2,
            "list": simulator.potential.capacity is not None,
            "replicas": ATOM_REPLICAS,
            "steps": steps,
            "jax_per_second": round(ATOM_REPLICAS * steps / seconds, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def of_gradient(options: argparse.Namespace, potential: Any, params: Any, frames: Any) -> list[dict[str, Any]]:
    """The StABlE gradient of h(r): seconds and memory."""
    import jax
    import jax.numpy as jnp

    from stabletrain.nnip.stable_learning import (
        Estimator,
        distances_gradient,
        distances_observable,
        distances_of,
        distances_target,
    )
    from stabletrain.nnip.units import thermal_energy

    observable = distances_observable(potential.system, 10.0)
    target = distances_target(observable, frames.positions[:200])
    measure = distances_of(observable)
    learn = distances_gradient(target, Estimator(thermal_energy(TEMPERATURE)))
    many = jnp.asarray(frames.positions[np.arange(STRUCTURES) % len(frames)], jnp.float32)
    rows = []
    for count in (STRUCTURES // 8, STRUCTURES):
        program = jax.jit(
            lambda p, x: learn(potential, p, x, measure(x), jnp.ones(len(x), bool), jax.random.key(0)).gradient
        ).lower(params, many[:count]).compile()  # fmt: skip

        def run() -> None:
            jax.block_until_ready(program(params, many[:count]))  # noqa: B023

        grown = peak_growth(options.device, run)
        memory = program.memory_analysis()
        assert memory is not None
        reserved = memory.temp_size_in_bytes
        rows.append({
            "structures": count,
            "seconds": round(timed(options.turns, run), 2),
            "reserved_mib": round(reserved / 2**20, 1),
            "peak_growth_mib": None if grown is None else round(grown, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="frames of a molecule, as of `stabletrain nnip`; without, the bundled ones")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--lattice", type=int, nargs="*", default=[2, 3, 4, 5, 6], help="atoms along an edge")
    parser.add_argument("--work", type=int, default=512, help="replica-steps in a turn of one side, about")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measure these; the file keeps others")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one-core", action="store_true", help="both sides on one core, in seconds of its time")
    options = parser.parse_args()
    if options.one_core:
        if options.device == "gpu":
            raise SystemExit("--one-core is for --device cpu")
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        CLOCK[0] = time.process_time
    if options.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    configure_backend(1, 1)

    import jax
    import torch

    from stabletrain.nnip.frames import read_frames
    from stabletrain.nnip.potential import EnergyScale, Potential
    from stabletrain.nnip.schnet import SchNet

    if options.device == "gpu" and (jax.default_backend() != "gpu" or not torch.cuda.is_available()):
        raise SystemExit(
            f"--device gpu: JAX is on {jax.default_backend()}, CUDA of PyTorch: {torch.cuda.is_available()}"
        )
    torch.set_num_threads(cpu_cores())
    frames = read_frames("aspirin-xtb", options.data)
    system = frames.system
    potential = Potential("schnet", SchNet(), system, CUTOFF, EnergyScale(0.3, {}))
    params = potential.init(jax.random.key(0))
    circumstances = {
        "command": "python benchmarks/md_window.py"
        + (f" --data {Path(options.data).name}" if options.data else "")
        + (" --device gpu" if options.device == "gpu" else "")
        + (" --one-core" if options.one_core else "")
        + f" --work {options.work} --turns {options.turns}",
        "device": str(jax.devices()[0].device_kind),
        "processor": cpu_model(),
        "cores": cpu_cores(),
        "seconds": "of the core's time" if options.one_core else "of the clock",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "data": frames.spec.name,
        "atoms": system.count,
    }
    result: dict[str, Any] = {"what": __doc__.split("\n\n")[0], "parameters": 117_953}
    if options.out.is_file() and set(options.parts) != set(PARTS):
        result |= json.loads(options.out.read_text(encoding="utf-8"))
    for part in options.parts:
        if part == "windows":
            rows, difference = against_torch(options, potential, params, frames)
            found: dict[str, Any] = {"force_difference": difference, "rows": rows}
        elif part == "atoms":
            found = {"rows": by_atoms(options)}
        else:
            found = {"rows": of_gradient(options, potential, params, frames)}
        load = [round(x, 1) for x in os.getloadavg()]
        result[part] = {**circumstances, "load_average": load, **found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
