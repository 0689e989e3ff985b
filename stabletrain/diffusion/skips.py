"""How a network merges a long skip connection with its decoder: every choice of `--skip-scaling` in one place.

Index 0 is the outermost skip everywhere. A merge takes the decoder feature h and the skip feature s and returns both,
scaled; the network then concatenates (U-ViT, UNet) or adds (the network of the theorems) them.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stabletrain.methods.scalelong import SQRT_HALF, LearnedScale

SKIP_SCALINGS = {
    "none": "coefficient 1, the standard network",
    "sqrt2": "every coefficient 1/sqrt(2)",
    "cs": "ScaleLong CS: kappa^i, the outermost skip (i = 0) unscaled",
    "ls": "ScaleLong LS: one learned gate shared by all skips of a width",
    "ls-per-skip": "ScaleLong LS with a gate of its own for each skip",
    "const": "every coefficient kappa",
    "mp-cat": "magnitude-preserving concatenation (Karras et al. 2024)",
    "layernorm": "LayerNorm over both features before they are merged",
    "learned-scalar": "one learned coefficient per skip, zero at the start",
}
"""Name -> what it does."""

GATED = ("ls", "ls-per-skip")


def skip_scales(scaling: str, exponents: Sequence[int], kappa: float) -> tuple[float, ...]:
    """Constant coefficients [N] of the skips, index 0 the outermost; ones where the scaling is not constant.

    `exponents`: 0 .. N-1 when kappa is counted per skip, the level of each skip when it is counted per level; the
    coefficients of CS are `constant_scales` at those places, as static numbers that the compiler folds.
    Raises: `ValueError` for an unknown scaling.
    """
    if scaling not in SKIP_SCALINGS:
        raise ValueError(f"unknown skip scaling {scaling!r}: {', '.join(SKIP_SCALINGS)}")
    if scaling == "sqrt2":
        return (SQRT_HALF,) * len(exponents)
    if scaling == "const":
        return (kappa,) * len(exponents)
    if scaling == "cs":
        return tuple(kappa**exponent for exponent in exponents)
    return (1.0,) * len(exponents)


class SkipMerge(nn.Module):
    """Scales h and s at one skip. `gate` is the shared `LearnedScale` where the scaling is `ls`.

    Shapes: h [B, ..., C_h], s [B, ..., C_s], multiplier scalar or None -> (h, s) of the same shapes. `multiplier` is
    the run-time coefficient of inference-time scaling (Skip-Tuning, Ma et al. 2024) and multiplies s after everything
    else. Collection "features", when mutable: the mean gate of each sample, `gate_mean` [B].
    """

    scaling: str
    scale: float = 1.0
    """The constant coefficient of this skip, from `skip_scales`."""
    gate_form: str = "channel"
    additive: bool = False
    """The network adds h and s: the magnitude-preserving form is then that of a sum."""

    @nn.compact
    def __call__(
        self, h: jax.Array, s: jax.Array, multiplier: jax.Array | None = None, gate: LearnedScale | None = None
    ) -> tuple[jax.Array, jax.Array]:
        if self.scaling in ("sqrt2", "cs", "const"):
            s = s * jnp.asarray(self.scale, s.dtype)
        elif self.scaling in GATED:
            gate = gate if gate is not None else LearnedScale(self.gate_form, name="gate")
            coefficient = gate(s)
            if watched(self):
                keep(self, "gate_mean", coefficient.mean(axis=tuple(range(1, coefficient.ndim))))
            s = s * coefficient.astype(s.dtype)
        elif self.scaling == "mp-cat":
            h, s = self._magnitude_preserving(h, s)
        elif self.scaling == "learned-scalar":
            s = s * self.param("coefficient", nn.initializers.zeros, ()).astype(s.dtype)
        elif self.scaling == "layernorm":
            h, s = self._normalized(h, s)
        if multiplier is not None:
            s = s * multiplier.astype(s.dtype)
        return h, s

    def _magnitude_preserving(self, h: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Karras et al. 2024 (EDM2), Eqs. 88 (sum) and 103 (concatenation), with t = 1/2."""
        if self.additive:
            return h * SQRT_HALF, s * SQRT_HALF
        wide_h, wide_s = h.shape[-1], s.shape[-1]
        total = (2.0 * (wide_h + wide_s)) ** 0.5
        return h * (total * 0.5 / wide_h**0.5), s * (total * 0.5 / wide_s**0.5)

    def _normalized(self, h: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """LayerNorm over the channels of both, without building their concatenation."""
        dtype = jnp.promote_types(h.dtype, jnp.float32)
        wide_h, wide_s = h.astype(dtype), s.astype(dtype)
        count = h.shape[-1] + s.shape[-1]
        mean = (wide_h.sum(-1, keepdims=True) + wide_s.sum(-1, keepdims=True)) / count
        squares = ((wide_h - mean) ** 2).sum(-1, keepdims=True) + ((wide_s - mean) ** 2).sum(-1, keepdims=True)
        factor = jax.lax.rsqrt(squares / count + 1e-5)
        scale = self.param("scale", nn.initializers.ones, (count,))
        bias = self.param("bias", nn.initializers.zeros, (count,))
        cut = h.shape[-1]
        new_h = (wide_h - mean) * factor * scale[:cut] + bias[:cut]
        new_s = (wide_s - mean) * factor * scale[cut:] + bias[cut:]
        return new_h.astype(h.dtype), new_s.astype(s.dtype)


def multiplier_of(skip_multipliers: ArrayLike | None, index: int, num_skips: int) -> jax.Array | None:
    """The run-time coefficient of one skip, or None. Raises: `ValueError` unless there is one for each skip."""
    if skip_multipliers is None:
        return None
    multipliers = jnp.asarray(skip_multipliers)
    if multipliers.shape != (num_skips,):
        raise ValueError(f"skip_multipliers has shape {multipliers.shape}, but the network has {num_skips} skips")
    return multipliers[index]


# --- what the networks let one watch ----------------------------------------------------------------------------------


def watched(module: nn.Module) -> bool:
    """Whether the caller asked for features; initialisation makes every collection mutable, but asks for none."""
    return module.is_mutable_collection("features") and not module.is_initializing()


def keep(module: nn.Module, name: str, value: jax.Array) -> None:
    """Sow one value of the collection "features" under its name, without the tuple that `sow` makes by default."""
    module.sow("features", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def watch(module: nn.Module, name: str, features: jax.Array) -> None:
    """Sow the norm of each sample's feature; costs nothing where nobody asked."""
    if watched(module):
        keep(module, name, feature_norm(features))


def feature_norm(features: jax.Array) -> jax.Array:
    """The L2 norm of each sample's whole feature, [B, ...] -> [B], in at least float32."""
    wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(wide**2, axis=tuple(range(1, features.ndim))))
