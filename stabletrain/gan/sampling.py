"""A trained GAN as a thing that makes samples and scores: chunks of compiled calls, latents by number, statistics.

Used by the evaluation during training and by `stabletrain sample`. Finished chunks are kept in the caller's scratch
folder, so that an interrupted evaluation does not make them again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stabletrain.gan.state import Critic, Generator
from stabletrain.random_keys import random_key
from stabletrain.training.devices import batch_sharding, replicated
from stabletrain.training.experiment import EvaluationContext

Array = jax.Array
Variables = Mapping[str, Any]
STANDING_SEED = 0xFEED
"""Stream of the latents that standing statistics are taken of."""
TRUNCATION_DRAWS = 64
"""Times that a latent beyond the truncation is drawn again; at a truncation of 0.1 one in 200 is left, and clipped."""
STYLE_LATENTS = 4096
"""Latents at least that the mean style, to which truncation moves styles, is of."""


class Programs:
    """The compiled programs of a GAN's evaluation; one of these serves every set of weights."""

    def __init__(self, generator: Generator, critic: Critic, *, mesh: Mesh, chunk: int) -> None:
        self.generator, self.critic, self.mesh = generator, critic, mesh
        self.chunk = -(-chunk // mesh.size) * mesh.size
        whole, split = replicated(mesh), batch_sharding(mesh)

        def running(variables: Variables, z: Array, labels: Array, key: Array) -> Array:
            return generator(variables, z, labels, key, train=False)[0]

        def batchwise(variables: Variables, z: Array, labels: Array, key: Array) -> Array:
            return generator(variables, z, labels, key, train=True)[0]

        def statistics(variables: Variables, z: Array, labels: Array, key: Array) -> Any:
            return generator(variables, z, labels, key, train=True)[1]["batch_stats"]

        def mean_style(variables: Variables, z: Array, labels: Array, key: Array) -> Array:
            return jnp.mean(generator.styles(variables, z, labels, key, train=False), axis=0)

        def truncated(
            variables: Variables, z: Array, labels: Array, key: Array, mean: Array, truncation: Array
        ) -> Array:
            styles = generator.styles(variables, z, labels, key, train=False)
            moved = mean + truncation * (styles - mean)
            return generator.synthesize(variables, moved, key, train=False).astype(jnp.float32)

        def score(variables: Variables, samples: Array, labels: Array) -> Array:
            return critic(variables, samples, labels, train=False)[0].score

        layout: dict[str, Any] = {"in_shardings": (whole, split, split, whole), "out_shardings": split}
        self.running = jax.jit(running, **layout)
        self.batchwise = jax.jit(batchwise, **layout)
        self.statistics = jax.jit(statistics, in_shardings=(whole, split, split, whole), out_shardings=whole)
        self.mean_style = jax.jit(mean_style, in_shardings=(whole, split, split, whole), out_shardings=whole)
        self.truncated = jax.jit(
            truncated, in_shardings=(whole, split, split, whole, whole, whole), out_shardings=split
        )  # fmt: skip
        self.score = jax.jit(score, in_shardings=(whole, split, split), out_shardings=split)
        self.latents = jax.jit(self._latents, static_argnames=("truncated",))

    def _latents(self, seed: Array, numbers: Array, truncation: Array, *, truncated: bool) -> Array:
        def one(number: Array) -> Array:
            key = jax.random.fold_in(random_key(seed), number)
            z = jax.random.normal(key, (self.generator.z_dim,))
            if not truncated:
                return z
            draws = jax.random.normal(jax.random.fold_in(key, 1), (TRUNCATION_DRAWS, self.generator.z_dim))
            draws = jnp.concatenate([z[None], draws])
            first = jnp.argmax(jnp.abs(draws) <= truncation, axis=0)  # 0 where none is: clipped below
            chosen = jnp.take_along_axis(draws, first[None], axis=0)[0]
            return jnp.clip(chosen, -truncation, truncation)

        return jax.vmap(one)(numbers)


class GanModel:
    """One set of weights, with one way of evaluating batch normalisation. See `stabletrain.gan.domains.Model`."""

    def __init__(
        self,
        programs: Programs,
        generator: Variables,
        critic: Variables,
        *,
        weights: str,
        batch_norm: str | None,
        standing_batches: int,
    ) -> None:
        self._programs, self._critic = programs, critic
        self.num_classes = programs.generator.num_classes
        self.z_dim = programs.generator.z_dim
        self.weights, self.batch_norm = weights, batch_norm
        self._call = programs.batchwise if batch_norm == "batch" else programs.running
        self._generator = generator
        if batch_norm == "standing":
            self._generator = {**generator, "batch_stats": self._standing(generator, standing_batches)}

    def _standing(self, generator: Variables, batches: int) -> Any:
        """Statistics that are the mean over batches of fresh samples, in place of training's running averages.

        One update with momentum m moves a statistic s to m s + (1 - m) b, b being the batch's own. The map is linear
        in s, so two updates, from all zeros and from all ones, give m and b without knowing the layers.
        """
        programs, chunk = self._programs, self._programs.chunk
        zeros, ones = (jax.tree.map(fill, generator["batch_stats"]) for fill in (jnp.zeros_like, jnp.ones_like))
        total = zeros
        for number in range(batches):
            rows = np.arange(number * chunk, (number + 1) * chunk, dtype=np.uint32)
            z = programs.latents(np.uint32(STANDING_SEED), rows, np.float32(0), truncated=False)
            key = jax.random.fold_in(random_key(STANDING_SEED), number)
            labels = (rows % max(self.num_classes, 1)).astype(np.int32)
            low, high = (
                programs.statistics({**generator, "batch_stats": start}, z, labels, key) for start in (zeros, ones)
            )
            own = jax.tree.map(lambda a, b: a / (1.0 - (b - a)), low, high)
            total = jax.tree.map(jnp.add, total, own)
        return jax.tree.map(lambda t: t / batches, total)

    @functools.cached_property
    def _mean_style(self) -> Any:
        """[L, D]: the mean of styles over latents and classes. Source: Karras et al. 2019, Section B."""
        programs, chunk = self._programs, self._programs.chunk
        parts = []
        for start in range(0, STYLE_LATENTS, chunk):
            rows = np.arange(start, start + chunk, dtype=np.uint32)
            z = programs.latents(np.uint32(STANDING_SEED), rows, np.float32(0), truncated=False)
            labels = (rows % max(self.num_classes, 1)).astype(np.int32)
            parts.append(programs.mean_style(self._generator, z, labels, random_key(STANDING_SEED)))
        return sum(parts) / len(parts)

    def samples(
        self,
        labels: np.ndarray | None,
        count: int,
        *,
        seed: int,
        context: EvaluationContext,
        what: str = "evaluation samples",
        truncation: float = 0.0,
    ) -> np.ndarray:
        """float32 [count, *sample_shape] of fresh latents; see `Model.samples`.

        Where there are styles, truncation acts on them, as the length of a latent has no effect there.
        """
        programs, parts = self._programs, []
        asked = np.zeros(count, np.int32) if labels is None else np.asarray(labels, np.int32)
        for start in range(0, count, programs.chunk):
            context.tick(what, start, count)
            stop = min(start + programs.chunk, count)
            kept = context.scratch / _name(what, self.weights, start, stop, asked[start:stop], seed, truncation)
            if kept.is_file():
                parts.append(np.load(kept))
                continue
            # Always whole chunks: another size would be another program to compile.
            numbers = np.arange(start, start + programs.chunk, dtype=np.uint32)
            of_latents = truncation > 0 and not programs.generator.has_styles
            z = programs.latents(np.uint32(seed), numbers, np.float32(truncation), truncated=of_latents)
            labelled = np.resize(asked[start:stop], programs.chunk)
            of_styles = 0.0 if of_latents else truncation
            chunk = self._chunk(z, labelled, seed, start, of_styles)[: stop - start]
            _save(kept, chunk)
            parts.append(chunk)
        context.tick(what, count, count)
        return np.concatenate(parts)

    def from_latents(self, latents: np.ndarray, labels: np.ndarray | None, *, context: EvaluationContext) -> np.ndarray:
        """float32 [N, *sample_shape] of the given latents [N, z_dim]."""
        chunk, parts = self._programs.chunk, []
        asked = np.zeros(len(latents), np.int32) if labels is None else np.asarray(labels, np.int32)
        for start in range(0, len(latents), chunk):
            context.tick("samples of latents", start, len(latents))
            z, y = latents[start : start + chunk], asked[start : start + chunk]
            rows = np.arange(chunk) % len(z)
            parts.append(self._chunk(np.asarray(z, np.float32)[rows], y[rows], 0, start)[: len(z)])
        return np.concatenate(parts)

    def _chunk(self, z: Any, labels: np.ndarray, seed: int, start: int, truncation: float = 0.0) -> np.ndarray:
        key = jax.random.fold_in(random_key(np.uint32(seed)), start)
        if truncation:
            arguments = (z, labels.astype(np.int32), key, self._mean_style, np.float32(truncation))
            return np.asarray(self._programs.truncated(self._generator, *arguments))
        return np.asarray(self._call(self._generator, z, labels.astype(np.int32), key))

    def scores(self, samples: np.ndarray, labels: np.ndarray | None, *, context: EvaluationContext) -> np.ndarray:
        """float32 [N]: the discriminator's adversarial scores, without augmentation."""
        chunk, parts = self._programs.chunk, []
        asked = np.zeros(len(samples), np.int32) if labels is None else np.asarray(labels, np.int32)
        for start in range(0, len(samples), chunk):
            context.tick("scores", start, len(samples))
            x, y = samples[start : start + chunk], asked[start : start + chunk]
            rows = np.arange(chunk) % len(x)
            found = self._programs.score(self._critic, np.asarray(x, np.float32)[rows], y[rows])
            parts.append(np.asarray(found)[: len(x)])
        return np.concatenate(parts)


def _name(what: str, weights: str, start: int, stop: int, labels: np.ndarray, seed: int, truncation: float) -> str:
    digest = hashlib.sha256(f"{seed} {truncation}".encode() + labels.tobytes()).hexdigest()[:8]
    return f"{what.replace(' ', '_')}_{weights}_{start}_{stop}_{digest}.npy"


def _save(path: Path, samples: np.ndarray) -> None:
    """Whole or not at all: a chunk cut off by a kill must not be taken for a finished one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, samples)
    unfinished.replace(path)
