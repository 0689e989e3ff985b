"""StABlE Training: learning an observable from unstable simulations (Raja et al., TMLR 2025, arXiv 2402.13984).

A potential U_th is simulated in the canonical ensemble P_th(x) ~ exp(-U_th(x) / kT). The mean of an observable g that
does not depend on th has the exact gradient

    d<g>/dth = -(1/kT) Cov(g, dU/dth),                                                              (Eq. 3)

and N samples estimate it without bias, and without differentiating through the dynamics, by

    BE = N / (kT (N - 1)) * (mean(g) mean(dU/dth)^T - mean(g dU/dth^T)).                             (Eq. 4)

What learning needs is v^T BE with v = dL/d<g>. That is the gradient of one weighted sum of energies,

    v^T BE = d/dth sum_i c_i U_th(x_i),    c_i = -((g_i - mean(g)) . v) / (kT (N - 1)),

one reverse pass, in which neither a Jacobian [D, P] nor gradients by sample [N, P] ever exist. The forms below (full
sample, cross-fitted, released, local, reweighted, within groups) differ in nothing but the coefficients c.

**Within groups** (ours, not in the paper). By the law of total covariance Cov(g, dU/dth) is the mean of the covariance
within each group of samples plus the covariance of the groups' means. Where a group is the short trajectory of one
replica, the second term has as many samples as there are replicas, and is the ensemble's only if these are in
equilibrium with each other, which those that failed are not. With `group` it is left out, and with it what slow modes
contribute.

**Units**: energies and kT in eV, whatever the unit of g. **Shapes**: a sample is a pytree of arrays; N of them have a
leading axis N. Everything is a pure function under jit, grad and vmap, in float32 and float64.
Observables that depend on th themselves (a pressure) have the further term E[dg/dth], which is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Params = Any
Samples = Any  # a pytree of arrays [N, ...]: usually the positions [N, n, 3]
EnergyFn = Callable[[Params, Any], jax.Array]
Cotangent = jax.Array | Callable[[jax.Array], jax.Array]
Residual = Literal["full-sample", "cross-fitted", "released"]

RESIDUALS: tuple[Residual, ...] = ("full-sample", "cross-fitted", "released")
CHUNK = 64

# --- losses -----------------------------------------------------------------------------------------------------------


def observable_loss(mean: jax.Array, target: jax.Array) -> jax.Array:
    """||<g> - g_ref||^2, summed over the components. Shapes: [D], [D] -> scalar. Source: Raja et al. 2025, Eq. 2."""
    return jnp.sum((mean - target) ** 2)


def squared_error_cotangent(target: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The function <g> -> dL/d<g> = 2 (<g> - g_ref) of `observable_loss`, for the estimators below."""
    return lambda mean: 2 * (mean - target)


# --- the estimator ----------------------------------------------------------------------------------------------------


def boltzmann_gradient(
    energy_fn: EnergyFn,
    params: Params,
    positions: Samples,
    observables: jax.Array,
    cotangent: Cotangent,
    *,
    kT: float | jax.Array,
    residual: Residual = "full-sample",
    minibatch: int | None = None,
    valid: jax.Array | None = None,
    order: jax.Array | None = None,
    group: jax.Array | None = None,
    chunk_size: int = CHUNK,
) -> Params:
    """v^T BE, the gradient of v . <g> with respect to the parameters, by one reverse pass through N energies.

    `energy_fn(params, sample)` is the energy of one sample, a scalar in eV. `cotangent` is v, or the function of the
    mean observable that gives it (`squared_error_cotangent`): which mean it is given is what `residual` says. Memory
    is that of `chunk_size` samples.

    - "full-sample": v of the mean over all samples. The bias of v^T BE for a squared loss is O(1/N).
    - "cross-fitted": covariance of the first half with v of the second, and the other way round: unbiased for
      independent samples, with about twice the variance of the covariance's part. Order the samples by replica, or
      shuffle them (`order`), so that the halves are independent.
    - "released": v and covariance of each minibatch of `minibatch` valid samples in order, averaged: the released
      code, which shuffles them first. The product is biased by 2 Cov(mean(g), Cov(g, dU)) within a minibatch. It has
      neither 1/kT nor N / (N - 1), so that for a constant v and one minibatch it is kT (N - 1) / N times BE.

    With `group` the covariance is that within groups of samples, pooled; the mean observable that v is of stays that
    of all samples.

    Shapes: positions [N, ...], observables [N, D], v [D], `valid` bool [N] (samples outside count for nothing, and may
    hold anything, NaN too), `order` int [N], a permutation: which sample comes first; `group` int [N], from 0 to N - 1.
    Returns: a pytree like `params`; zero where fewer than two samples (of one group) are valid.
    Raises: `ValueError` for shapes that do not fit, an unknown `residual`, a `minibatch` or `group` where it means
    nothing.
    Source: Raja et al. 2025, Eqs. 2 to 4.
    """
    coefficients = boltzmann_coefficients(
        observables, cotangent, kT=kT, residual=residual, minibatch=minibatch, valid=valid, order=order, group=group
    )
    if valid is None:
        return weighted_energy_gradient(energy_fn, params, positions, coefficients, chunk_size=chunk_size)
    positions = _without_invalid(positions, valid)
    gradient = weighted_energy_gradient(energy_fn, params, positions, coefficients, chunk_size=chunk_size)
    # Where nothing is valid the stand-in is not either, and the gradient zero times NaN.
    return jax.tree.map(lambda x: jnp.where(jnp.any(valid), x, 0), gradient)


def boltzmann_coefficients(
    observables: jax.Array,
    cotangent: Cotangent,
    *,
    kT: float | jax.Array,
    residual: Residual = "full-sample",
    minibatch: int | None = None,
    valid: jax.Array | None = None,
    order: jax.Array | None = None,
    group: jax.Array | None = None,
) -> jax.Array:
    """The c_i with d/dth sum_i c_i U_th(x_i) = v^T BE, in the forms of `boltzmann_gradient`, which says the rest.

    Shapes: observables [N, D] -> [N], in the unit of v . g over eV ("released": of v . g).
    """
    if observables.ndim != 2:
        raise ValueError(f"observables must have the shape [N, D], not {observables.shape}")
    if (minibatch is not None) != (residual == "released"):
        raise ValueError(f"a minibatch belongs to residual='released' and to no other: {residual=}, {minibatch=}")
    count = len(observables)
    kept = jnp.ones(count, bool) if valid is None else valid
    if kept.shape != (count,):
        raise ValueError(f"valid must have the shape {(count,)}, not {kept.shape}")
    if group is not None and residual == "released":
        raise ValueError("the released estimator's covariance is that of minibatches: it has no groups")
    if group is not None and group.shape != (count,):
        raise ValueError(f"group must have the shape {(count,)}, not {group.shape}")
    observables = jnp.where(kept[:, None], observables, 0)
    if order is None:
        return _in_order(observables, kept, cotangent, group, kT=kT, residual=residual, minibatch=minibatch)
    if order.shape != (count,):
        raise ValueError(f"order must have the shape {(count,)}, not {order.shape}")
    group = None if group is None else group[order]
    ordered = _in_order(
        observables[order], kept[order], cotangent, group, kT=kT, residual=residual, minibatch=minibatch
    )
    return jnp.zeros_like(ordered).at[order].set(ordered)


def _in_order(
    observables: jax.Array,
    kept: jax.Array,
    cotangent: Cotangent,
    group: jax.Array | None,
    *,
    kT: float | jax.Array,
    residual: Residual,
    minibatch: int | None,
) -> jax.Array:
    cotangent_of = cotangent if callable(cotangent) else lambda mean: cotangent

    if residual == "full-sample":
        return _covariance_coefficients(observables, kept, cotangent_of(_mean(observables, kept)), group) / kT
    if residual == "cross-fitted":
        # Halves of the valid samples: a replica that failed must not leave one half empty.
        first = kept & (jnp.cumsum(kept) <= jnp.sum(kept) // 2)
        second = kept & ~first
        by_half = [
            _covariance_coefficients(observables, own, cotangent_of(_mean(observables, other)), group)
            for own, other in ((first, second), (second, first))
        ]
        return (by_half[0] + by_half[1]) / (2 * kT)
    if residual == "released":
        assert minibatch is not None
        return _released_coefficients(observables, kept, cotangent_of, minibatch)
    raise ValueError(f"unknown residual {residual!r}: one of {', '.join(RESIDUALS)}")


def _mean(values: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean over the samples that are kept: [N, D], [N] -> [D]."""
    return jnp.sum(jnp.where(kept[:, None], values, 0), axis=0) / jnp.maximum(jnp.sum(kept), 1)


def _covariance_coefficients(
    observables: jax.Array, kept: jax.Array, v: jax.Array, group: jax.Array | None
) -> jax.Array:
    """-((g_i - mean(g)) . v) / (N - 1): the c_i without 1/kT. Zero for samples that are not kept.

    Within groups the mean is that of the sample's own, and N - 1 is N less the number of groups with a sample.
    """
    if group is None:
        deviations = (observables - _mean(observables, kept)) @ v
        return jnp.where(kept, -deviations, 0) / jnp.maximum(jnp.sum(kept) - 1, 1)
    along = observables @ v
    mean, total = _group_means(along, kept.astype(along.dtype), group)
    deviations = jnp.where(kept, mean - along, 0)
    return deviations / jnp.maximum(jnp.sum(kept) - jnp.sum(total > 0), 1)


def _group_means(values: jax.Array, weights: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each sample the weighted mean over its group, and the weight of each group: [N], [N], int [N] -> [N], [N]."""

    def total(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x, group, num_segments=len(group))

    weight = total(weights)
    return (total(weights * values) / jnp.where(weight > 0, weight, 1))[group], weight


def _released_coefficients(
    observables: jax.Array, kept: jax.Array, cotangent_of: Callable[[jax.Array], jax.Array], minibatch: int
) -> jax.Array:
    """Mean over minibatches of kept samples of mean(g) . v mean(dU) - mean(g . v dU); the last may be smaller.

    Shapes: observables [N, D] -> [N].
    """
    if minibatch < 1:
        raise ValueError(f"a minibatch holds at least one sample, not {minibatch}")
    count, width = observables.shape
    batches = -(-count // minibatch)
    fill = batches * minibatch - count
    first = jnp.argsort(~kept, stable=True)  # those that are kept, in their order: they alone fill the minibatches
    values = jnp.pad(observables[first], ((0, fill), (0, 0))).reshape(batches, minibatch, width)
    mask = jnp.pad(kept[first], (0, fill)).reshape(batches, minibatch)

    def of_batch(values: jax.Array, mask: jax.Array) -> jax.Array:
        mean = _mean(values, mask)
        deviations = (values - mean) @ cotangent_of(mean)
        return jnp.where(mask, -deviations, 0) / jnp.maximum(jnp.sum(mask), 1)

    used = jnp.maximum(jnp.sum(jnp.any(mask, axis=1)), 1)
    coefficients = (jax.vmap(of_batch)(values, mask) / used).reshape(-1)[:count]
    return jnp.zeros_like(coefficients).at[first].set(coefficients)


# --- one reverse pass -------------------------------------------------------------------------------------------------


def weighted_energy_gradient(
    energy_fn: EnergyFn, params: Params, positions: Samples, coefficients: jax.Array, *, chunk_size: int = CHUNK
) -> Params:
    """d/dth sum_i c_i . U_th(x_i) with constant c, in chunks of samples: memory does not grow with N.

    Shapes: positions [N, ...]; coefficients [N, ...] of the shape of `energy_fn`'s value: [N] for energies, [N, n] for
    energies of atoms. Returns: a pytree like `params`.
    """
    if chunk_size < 1:
        raise ValueError(f"a chunk holds at least one sample, not {chunk_size}")
    count = len(coefficients)
    for leaf in jax.tree.leaves(positions):
        if len(leaf) != count:
            raise ValueError(f"{count} coefficients, but {len(leaf)} samples")
    chunk_size = min(chunk_size, count)
    chunks = -(-count // chunk_size)
    fill = chunks * chunk_size - count
    # Filled up with the last sample: an energy that is finite, times zero.
    filled = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], fill, axis=0)]), positions)
    weights = jnp.pad(jax.lax.stop_gradient(coefficients), [(0, fill)] + [(0, 0)] * (coefficients.ndim - 1))

    def in_chunks(x: jax.Array) -> jax.Array:
        return x.reshape(chunks, chunk_size, *x.shape[1:])

    def surrogate(params: Params, positions: Samples, weights: jax.Array) -> jax.Array:
        energies = jax.vmap(energy_fn, in_axes=(None, 0))(params, positions)
        if energies.shape != weights.shape:
            raise ValueError(f"energies of the shape {energies.shape}, but coefficients of {weights.shape}")
        return jnp.sum(weights * energies)

    gradient = jax.grad(surrogate)
    chunked = jax.tree.map(in_chunks, filled), in_chunks(weights)
    if chunks == 1:
        return gradient(params, *jax.tree.map(lambda x: x[0], chunked))

    def add(total: Params, chunk: tuple[Samples, jax.Array]) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *chunk)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunked)[0]


def energies_of(energy_fn: EnergyFn, params: Params, positions: Samples, *, chunk_size: int = CHUNK) -> jax.Array:
    """The energies of N samples, `chunk_size` at a time: [N, ...] -> [N] in eV."""
    return jax.lax.map(lambda sample: energy_fn(params, sample), positions, batch_size=chunk_size)


def _without_invalid(positions: Samples, valid: jax.Array) -> Samples:
    """Samples that do not count become copies of the first one that does: zero times NaN would be NaN."""
    stand_in = jnp.argmax(valid)

    def replaced(x: jax.Array) -> jax.Array:
        return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, x[stand_in])

    return jax.tree.map(replaced, positions)


# --- local observables ------------------------------------------------------------------------------------------------


def local_boltzmann_gradient(
    atomic_energies_fn: EnergyFn,
    params: Params,
    positions: Samples,
    neighbourhoods: jax.Array,
    observables: jax.Array,
    cotangent: Cotangent,
    *,
    kT: float | jax.Array,
    residual: Residual = "full-sample",
    minibatch: int | None = None,
    valid: jax.Array | None = None,
    order: jax.Array | None = None,
    chunk_size: int = CHUNK,
) -> Params:
    """v^T BE where a sample is one neighbourhood of one configuration: M N samples from N configurations.

    The observable g is that of a neighbourhood (the bond lengths of one molecule), and U_th of a neighbourhood is the
    sum of the energies of its atoms, each of which depends on the whole configuration. `atomic_energies_fn(params,
    sample)` gives the energies of all atoms [n] in eV. An event in one molecule of many, which a mean over the
    configuration hardly sees, is one sample of its own here. One reverse pass: c of an atom in a configuration is the
    sum of those of the neighbourhoods that it belongs to.

    Shapes: positions [N, ...]; neighbourhoods int [M, k], or [N, M, k], the atoms of each, negative numbers for
    places that are empty; observables [N, M, D]; `valid` bool [N, M]: the neighbourhoods that count, see
    `flatten_histogram`; `order` int [N M], of all neighbourhoods, as in `boltzmann_gradient`. A configuration must be
    finite where one of its neighbourhoods counts.

    Raises: `ValueError` as `boltzmann_gradient` does. Source: Raja et al. 2025, Eq. 5 (Definition 2).
    """
    if observables.ndim != 3:
        raise ValueError(f"observables must have the shape [N, M, D], not {observables.shape}")
    count, places, width = observables.shape
    if neighbourhoods.shape[:-1] not in ((places,), (count, places)):
        raise ValueError(f"neighbourhoods {neighbourhoods.shape} do not fit observables {observables.shape}")
    coefficients = boltzmann_coefficients(
        observables.reshape(-1, width),
        cotangent,
        kT=kT,
        residual=residual,
        minibatch=minibatch,
        valid=None if valid is None else valid.reshape(-1),
        order=order,
    ).reshape(count, places)

    one = jax.tree.map(lambda x: x[0], positions)
    atoms = jax.eval_shape(atomic_energies_fn, params, one).shape[0]
    members = jnp.broadcast_to(neighbourhoods, (count, *neighbourhoods.shape[-2:]))
    members = jnp.where(members < 0, atoms, members)  # past the end, where "drop" drops it

    def by_atom(members: jax.Array, coefficients: jax.Array) -> jax.Array:
        spread = jnp.broadcast_to(coefficients[:, None], members.shape)
        return jnp.zeros(atoms, coefficients.dtype).at[members].add(spread, mode="drop")

    weights = jax.vmap(by_atom)(members, coefficients)
    some = jnp.ones(count, bool) if valid is None else jnp.any(valid, axis=1)
    gradient = weighted_energy_gradient(
        atomic_energies_fn, params, _without_invalid(positions, some), weights, chunk_size=chunk_size
    )
    return jax.tree.map(lambda x: jnp.where(jnp.any(some), x, 0), gradient)


def flatten_histogram(key: jax.Array, values: jax.Array, *, bins: int, per_bin: int, valid: jax.Array) -> jax.Array:
    """Which samples to keep so that rare values weigh more: at most `per_bin` of each of `bins` equal intervals.

    The intervals span the valid values; those kept of a full one are drawn at random. This is an importance sample
    without its weights, on purpose: it leans the local estimator towards the rare neighbourhoods that start failures.

    Shapes: values [N], valid bool [N] -> bool [N]. Source: the released code for water (100 bins, 5 per replica).
    """
    finite = jnp.where(valid, values, jnp.nan)
    low, high = jnp.nanmin(finite), jnp.nanmax(finite)
    place = jnp.floor((values - low) / jnp.where(high > low, high - low, 1) * bins)
    place = jnp.where(valid, jnp.clip(place, 0, bins - 1), bins).astype(jnp.int32)
    # In random order within each interval; the rank there is the distance from where the interval starts.
    order = jnp.lexsort((jax.random.uniform(key, values.shape), place))
    in_order = place[order]
    rank = jnp.arange(len(values)) - jnp.searchsorted(in_order, in_order)
    kept = (rank < per_bin) & (in_order < bins)
    return jnp.zeros(len(values), bool).at[order].set(kept)


# --- reuse of a trajectory --------------------------------------------------------------------------------------------


def reweighting(energies: jax.Array, reference_energies: jax.Array, *, kT: float | jax.Array) -> jax.Array:
    """Weights of samples of U_ref under U: softmax of -(U - U_ref) / kT. Shapes: [N], [N] in eV -> [N], sum 1.

    Source: Thaler & Zavadlav 2021 (DiffTRe, arXiv 2107.00471), Eq. 5.
    """
    return jax.nn.softmax(-(energies - reference_energies) / kT)


def effective_sample_size(weights: jax.Array) -> jax.Array:
    """exp(-sum_i w_i ln w_i), between 1 and N. Shapes: [N] of sum 1 -> scalar. Source: Thaler & Zavadlav 2021."""
    return jnp.exp(jnp.sum(jax.scipy.special.entr(weights)))


def may_reuse(weights: jax.Array, *, ratio: float = 0.9) -> jax.Array:
    """Whether samples still stand for the potential: the effective sample size is at least `ratio` of N.

    Shapes: [N] -> bool scalar; False for weights that are not finite.
    """
    return effective_sample_size(weights) >= ratio * len(weights)


def reweighted_gradient(
    energy_fn: EnergyFn,
    params: Params,
    positions: Samples,
    observables: jax.Array,
    cotangent: Cotangent,
    *,
    kT: float | jax.Array,
    reference_energies: jax.Array,
    energies: jax.Array | None = None,
    group: jax.Array | None = None,
    chunk_size: int = CHUNK,
) -> Params:
    """v^T d<g>_w/dth of the reweighted mean <g>_w = sum_i w_i g_i (DiffTRe), for samples of another potential.

    `reference_energies` are U_ref(x_i) of the potential that was simulated, in eV. At U = U_ref it is (N - 1) / N
    times `boltzmann_gradient`, with G groups (N - G) / N times; further off, check `may_reuse(reweighting(...))` first:
    few samples carry the weight.
    One forward pass in chunks for the weights, unless `energies` already gives U(x_i), and one reverse pass in chunks
    for the gradient. With `group` the weighted covariance is that within groups, as in `boltzmann_gradient`.

    Shapes: positions [N, ...], observables [N, D], both energies [N], v [D] or the function of <g>_w that gives it,
    `group` int [N], from 0 to N - 1. Returns: a pytree like `params`. Source: Thaler & Zavadlav 2021, Eqs. 4 and 5.
    """
    if energies is None:
        energies = energies_of(energy_fn, params, positions, chunk_size=chunk_size)
    weights = reweighting(energies, reference_energies, kT=kT)
    mean = weights @ observables
    v = cotangent(mean) if callable(cotangent) else cotangent
    along = (observables - mean) @ v
    if group is not None:
        along = along - _group_means(along, weights, group)[0]
    coefficients = -weights * along / kT
    return weighted_energy_gradient(energy_fn, params, positions, coefficients, chunk_size=chunk_size)
