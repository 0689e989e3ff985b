"""The Boltzmann estimator against what is known exactly: discrete systems, oscillators, automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.methods.stable import (
    boltzmann_coefficients,
    boltzmann_gradient,
    effective_sample_size,
    energies_of,
    flatten_histogram,
    local_boltzmann_gradient,
    may_reuse,
    observable_loss,
    reweighted_gradient,
    reweighting,
    squared_error_cotangent,
    weighted_energy_gradient,
)

KT = 0.0430867  # 500 K in eV
EXACT = 1e-12  # float64 sums of about 100 terms of order 1/kT


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def energy(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A potential that is not linear in its parameters."""
    return jnp.sum(jnp.tanh(x @ params["w"]) * params["a"]) * 0.1


@pytest.fixture
def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(3, 4))), "a": jnp.asarray(rng.normal(size=4))}


@pytest.fixture
def samples() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(23, 3))), jnp.asarray(rng.normal(size=(23, 5)))


def flat(tree: dict[str, jax.Array]) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def equation_4(params: dict[str, jax.Array], x: jax.Array, g: jax.Array, kT: float = KT) -> np.ndarray:
    """BE [D, P] by the letter, with gradients by sample."""
    gradients = jax.vmap(jax.grad(energy), (None, 0))(params, x)
    by_sample = np.concatenate([np.reshape(leaf, (len(x), -1)) for leaf in jax.tree.leaves(gradients)], axis=1)
    n = len(x)
    outer = np.einsum("nd,np->dp", g, by_sample) / n
    return n / (kT * (n - 1)) * (np.outer(g.mean(0), by_sample.mean(0)) - outer)


# --- exact systems ----------------------------------------------------------------------------------------------------


def test_gradient_of_a_discrete_system_is_the_derivative_of_its_exact_mean(params: dict[str, jax.Array]) -> None:
    """50 states with their Boltzmann probabilities: Cov under them is d<g>/dth, by differentiating the softmax."""
    rng = np.random.default_rng(2)
    states, g = jnp.asarray(rng.normal(size=(50, 3))), jnp.asarray(rng.normal(size=(50, 5)))
    v = jnp.asarray(rng.normal(size=5))

    def mean(params: dict[str, jax.Array]) -> jax.Array:
        return jax.nn.softmax(-jax.vmap(energy, (None, 0))(params, states) / KT) @ g

    exact = jax.grad(lambda params: mean(params) @ v)(params)
    energies = energies_of(energy, params, states)
    # With a flat reference potential every state counts once, and the reweighted sample is the exact ensemble.
    ours = reweighted_gradient(energy, params, states, g, v, kT=KT, reference_energies=jnp.zeros(50))
    np.testing.assert_allclose(flat(ours), flat(exact), atol=EXACT * np.abs(flat(exact)).max())

    # The same through Eq. 4: a sample in which state i stands n_i ~ p_i N times; N / (N - 1) is the only difference.
    counts = np.round(np.asarray(jax.nn.softmax(-energies / KT)) * 2000).astype(int)
    index = np.repeat(np.arange(50), counts)
    frequency = jnp.asarray(counts / counts.sum())
    covariance = equation_4(params, states[index], np.asarray(g)[index])
    estimate = boltzmann_gradient(energy, params, states[index], g[index], v, kT=KT)
    np.testing.assert_allclose(flat(estimate), np.asarray(v) @ covariance, atol=1e-11)
    rounding = float(jnp.abs(frequency - jax.nn.softmax(-energies / KT)).sum())
    # The frequencies differ from the probabilities by `rounding`; the covariance by about as much of its size.
    np.testing.assert_allclose(flat(estimate), flat(exact), atol=20 * rounding * np.abs(flat(exact)).max())


def test_harmonic_oscillator() -> None:
    """U = k x^2 / 2: <x^2> = kT / k, so d<x^2>/dk = -kT / k^2."""
    k, n = 3.0, 100_000
    x = jnp.asarray(np.random.default_rng(3).normal(size=n) * np.sqrt(KT / k))
    estimate = boltzmann_gradient(
        lambda k, x: k * x**2 / 2, jnp.asarray(k), x, x[:, None] ** 2, jnp.ones(1), kT=KT, chunk_size=n
    )
    # Var(x^2 x^2) of a Gaussian: relative standard deviation sqrt(10 / N) = 1 %; five of them.
    assert float(estimate) == pytest.approx(-KT / k**2, rel=0.05)


def test_released_residual_is_biased_and_the_others_are_not() -> None:
    """On the oscillator with <x^2> 10 % off: at minibatches of 4 the released form overshoots several times."""
    k, n = 1.0, 120_000
    x = jnp.asarray(np.random.default_rng(4).normal(size=n))
    target = jnp.asarray([1.1])  # kT = 1, so <x^2> = 1
    exact = 2 * (1 - 1.1) * -1 / k**2

    def estimate(residual: str, **options: int) -> float:
        c = boltzmann_coefficients(
            x[:, None] ** 2, squared_error_cotangent(target), kT=1.0, residual=residual, **options
        )
        return float(weighted_energy_gradient(lambda k, x: k * x**2 / 2, jnp.asarray(k), x, c, chunk_size=n))

    # <x^2> of n samples is 4 % of the residual 0.1 off, the covariance 1 %: three of the sum.
    assert estimate("full-sample") == pytest.approx(exact, rel=0.15)
    assert estimate("cross-fitted") == pytest.approx(exact, rel=0.15)
    # The bias 2 Cov(mean, Cov) within a minibatch of 4 is many times the product itself.
    assert abs(estimate("released", minibatch=4)) > 3 * abs(exact)


def test_a_spring_is_recovered_from_the_distances_of_two_particles() -> None:
    """p(r) ~ r^2 exp(-b (r - r0)^2 / 2 kT): both parameters from h(r) alone, each step on 2,000 exact samples."""
    grid, width = jnp.linspace(0.5, 1.5, 4001), 0.02
    middles = jnp.linspace(0.6, 1.4, 81)

    def spring(theta: jax.Array, r: jax.Array) -> jax.Array:
        return theta[1] * (r - theta[0]) ** 2 / 2

    def density(theta: jax.Array) -> jax.Array:
        return jax.nn.softmax(2 * jnp.log(grid) - spring(theta, grid) / KT)

    def curve(r: jax.Array) -> jax.Array:
        return jnp.exp(-0.5 * ((r[..., None] - middles) / width) ** 2)

    truth = jnp.asarray([1.0, 5.0])
    target = density(truth) @ curve(grid)

    @jax.jit
    def step(theta: jax.Array, key: jax.Array) -> jax.Array:
        places = jnp.searchsorted(jnp.cumsum(density(theta)), jax.random.uniform(key, (2000,)))
        r = grid[jnp.minimum(places, 4000)]
        slope = boltzmann_gradient(spring, theta, r, curve(r), squared_error_cotangent(target), kT=KT, chunk_size=2000)
        return theta - jnp.asarray([3e-4, 1.0]) * slope  # the stiffness moves h(r) less, by its own scale

    theta = jnp.asarray([0.95, 3.0])
    for number in range(300):
        theta = step(theta, jax.random.key(number))
    # 2,000 samples a step know the mean to 0.2 % and the width to 2 %.
    np.testing.assert_array_less(jnp.abs(theta / truth - 1), jnp.asarray([0.01, 0.1]), err_msg=f"{theta}")


# --- algebra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 23, 64])
def test_one_reverse_pass_is_equation_4_times_v(params, samples, chunk_size: int) -> None:
    x, g = samples
    v = jnp.linspace(-1, 2, 5)
    ours = boltzmann_gradient(energy, params, x, g, v, kT=KT, chunk_size=chunk_size)
    np.testing.assert_allclose(flat(ours), np.asarray(v) @ equation_4(params, x, np.asarray(g)), atol=EXACT)


def test_residual_of_the_full_sample_is_the_gradient_of_the_loss(params, samples) -> None:
    """With v from the mean, one gets 2 (<g> - g_ref)^T BE, as `observable_loss` demands."""
    x, g = samples
    target = jnp.arange(5.0)
    v = jax.grad(observable_loss)(g.mean(0), target)
    by_function = boltzmann_gradient(energy, params, x, g, squared_error_cotangent(target), kT=KT)
    np.testing.assert_allclose(flat(by_function), flat(boltzmann_gradient(energy, params, x, g, v, kT=KT)), atol=EXACT)


def test_cross_fitted_is_the_mean_of_two_halves(params, samples) -> None:
    x, g = samples[0][:22], samples[1][:22]
    cotangent = squared_error_cotangent(jnp.arange(5.0))
    expected = 0.0
    for own, other in ((slice(0, 11), slice(11, 22)), (slice(11, 22), slice(0, 11))):
        v = np.asarray(cotangent(g[other].mean(0)))
        expected = expected + v @ equation_4(params, x[own], np.asarray(g[own])) / 2
    ours = boltzmann_gradient(energy, params, x, g, cotangent, kT=KT, residual="cross-fitted")
    np.testing.assert_allclose(flat(ours), expected, atol=EXACT)


def test_released_form_by_the_letter(params, samples) -> None:
    """Mean over minibatches of 2 (mean - ref)^T (mean g mean dU - mean g dU), no 1/kT; one batch: kT (N-1)/N BE."""
    x, g = samples[0][:20], samples[1][:20]
    target = jnp.arange(5.0)
    expected = 0.0
    for start in range(0, 20, 5):
        part = slice(start, start + 5)
        jacobian = KT * 4 / 5 * equation_4(params, x[part], np.asarray(g[part]))
        expected = expected + 2 * np.asarray(g[part].mean(0) - target) @ jacobian / 4
    ours = boltzmann_gradient(
        energy, params, x, g, squared_error_cotangent(target), kT=KT, residual="released", minibatch=5
    )
    np.testing.assert_allclose(flat(ours), expected, atol=EXACT)

    v = jnp.linspace(-1, 2, 5)
    whole = boltzmann_gradient(energy, params, x, g, v, kT=KT, residual="released", minibatch=20)
    full = boltzmann_gradient(energy, params, x, g, v, kT=KT)
    np.testing.assert_allclose(flat(whole), KT * 19 / 20 * flat(full), atol=EXACT)


FORMS = [{}, {"residual": "cross-fitted"}, {"residual": "released", "minibatch": 3}]


@pytest.mark.parametrize("options", FORMS)
def test_an_order_is_that_of_the_samples(params, samples, options) -> None:
    """The form in a given order is that of the samples put into it."""
    x, g = samples
    order = jnp.asarray(np.random.default_rng(5).permutation(23))
    valid = jnp.arange(23) % 5 != 2
    cotangent = squared_error_cotangent(jnp.arange(5.0))
    expected = boltzmann_gradient(
        energy, params, x[order], g[order], cotangent, kT=KT, valid=valid[order], **options
    )  # fmt: skip
    ours = boltzmann_gradient(energy, params, x, g, cotangent, kT=KT, valid=valid, order=order, **options)
    np.testing.assert_allclose(flat(ours), flat(expected), atol=EXACT)
    if options:
        in_place = boltzmann_gradient(energy, params, x, g, cotangent, kT=KT, valid=valid, **options)
        assert np.abs(flat(in_place) - flat(ours)).max() > 1e-3 * np.abs(flat(ours)).max()
    with pytest.raises(ValueError, match="order must have the shape"):
        boltzmann_gradient(energy, params, x, g, cotangent, kT=KT, order=order[:5], **options)


@pytest.mark.parametrize("options", FORMS)
def test_samples_that_do_not_count_may_hold_anything(params, samples, options) -> None:
    """A masked sample is an absent one, even where it is NaN; without any valid sample the gradient is zero."""
    x, g = samples
    valid = np.ones(23, bool)
    valid[[0, 5, 22]] = False
    cotangent = squared_error_cotangent(jnp.arange(5.0))
    absent = boltzmann_gradient(energy, params, x[valid], g[valid], cotangent, kT=KT, **options)
    bad_x, bad_g = x.at[~valid].set(jnp.nan), g.at[~valid].set(jnp.inf)
    masked = boltzmann_gradient(
        energy, params, bad_x, bad_g, cotangent, kT=KT, valid=jnp.asarray(valid), chunk_size=4, **options
    )
    np.testing.assert_allclose(flat(masked), flat(absent), atol=EXACT)
    nothing = jnp.zeros(23, bool)
    none = boltzmann_gradient(energy, params, x * jnp.nan, g, cotangent, kT=KT, valid=nothing, **options)
    np.testing.assert_array_equal(flat(none), 0)


def test_works_under_jit_vmap_and_in_float32(params, samples) -> None:
    x, g = samples
    both = jnp.stack([x, x[::-1]]), jnp.stack([g, g[::-1]])

    @jax.jit
    @jax.vmap
    def gradients(x: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
        return boltzmann_gradient(energy, params, x, g, jnp.ones(5), kT=KT, chunk_size=10)

    batched = gradients(*both)
    one = boltzmann_gradient(energy, params, x, g, jnp.ones(5), kT=KT)
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[0], batched)), flat(one), atol=EXACT)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x, g))
    narrow = boltzmann_gradient(energy, single[0], single[1], single[2], jnp.ones(5, jnp.float32), kT=KT)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(flat(narrow), flat(one), atol=1e-5 * np.abs(flat(one)).max())


def test_memory_does_not_grow_with_the_number_of_samples(params) -> None:
    """What XLA reserves for intermediate values of 40 times as many samples is no more than the samples themselves."""

    def reserved(count: int) -> int:
        def gradient(x: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
            def wide(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
                return energy(params, x) + jnp.sum(jnp.sin(jnp.outer(x, jnp.arange(4000.0)))) * params["a"][0]

            return boltzmann_gradient(wide, params, x, g, jnp.ones(1), kT=KT, chunk_size=8)

        lowered = jax.jit(gradient).lower(jnp.zeros((count, 3)), jnp.zeros((count, 1)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = reserved(64), reserved(64 * 40)
    one_sample = 3 * 4000 * 8
    assert few > one_sample  # the measure sees the intermediate values
    assert many - few < 64 * 40 * one_sample / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "paper"}, "unknown residual 'paper'"),
        ({"residual": "released"}, "a minibatch belongs to"),
        ({"minibatch": 4}, "a minibatch belongs to"),
        ({"residual": "released", "minibatch": 0}, "at least one sample"),
        ({"chunk_size": 0}, "at least one sample"),
        ({"valid": jnp.ones(3, bool)}, "valid must have the shape"),
        ({"group": jnp.zeros(3, int)}, "group must have the shape"),
        ({"residual": "released", "minibatch": 4, "group": jnp.zeros(23, int)}, "no groups"),
    ],
)
def test_bad_options_are_refused(params, samples, options, message: str) -> None:
    x, g = samples
    with pytest.raises(ValueError, match=message):
        boltzmann_gradient(energy, params, x, g, jnp.ones(5), kT=KT, **options)


def test_shapes_that_do_not_fit_are_refused(params, samples) -> None:
    x, g = samples
    with pytest.raises(ValueError, match="23 coefficients, but 20 samples"):
        boltzmann_gradient(energy, params, x[:20], g, jnp.ones(5), kT=KT)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        boltzmann_gradient(energy, params, x, g[:, 0], jnp.ones(5), kT=KT)


# --- within groups ----------------------------------------------------------------------------------------------------

GROUP = jnp.asarray([5, 0, 9] * 7 + [0, 5])  # three groups of 7 and 8 samples, in no order


def test_covariance_within_groups_is_equation_4_of_each_pooled(params, samples) -> None:
    x, g = samples
    v = jnp.linspace(-1, 2, 5)
    expected = 0.0
    for one in (0, 5, 9):
        part = np.flatnonzero(np.asarray(GROUP) == one)
        expected = expected + (len(part) - 1) / (23 - 3) * (
            np.asarray(v) @ equation_4(params, x[part], np.asarray(g)[part])
        )
    ours = boltzmann_gradient(energy, params, x, g, v, kT=KT, group=GROUP)
    np.testing.assert_allclose(flat(ours), expected, atol=EXACT)
    assert np.abs(flat(ours) - flat(boltzmann_gradient(energy, params, x, g, v, kT=KT))).max() > 1e-2

    weights = jax.nn.softmax(jnp.linspace(-1, 1, 23))
    reference = energies_of(energy, params, x) + KT * jnp.log(weights)  # so that these are the weights
    reweighted = reweighted_gradient(energy, params, x, g, v, kT=KT, reference_energies=reference, group=GROUP)
    gradients = jax.vmap(jax.grad(energy), (None, 0))(params, x)
    by_sample = np.concatenate([np.reshape(leaf, (23, -1)) for leaf in jax.tree.leaves(gradients)], axis=1)
    total = 0.0
    for one in (0, 5, 9):
        part = np.flatnonzero(np.asarray(GROUP) == one)
        w = np.asarray(weights)[part]
        along = np.asarray(g)[part] @ np.asarray(v)
        centred = by_sample[part] - w @ by_sample[part] / w.sum()
        total = total - (w * (along - w @ along / w.sum())) @ centred / KT
    np.testing.assert_allclose(flat(reweighted), total, atol=EXACT)


@pytest.mark.parametrize("residual", ["full-sample", "cross-fitted"])
def test_one_group_is_the_whole_and_groups_go_with_order_and_valid(params, samples, residual) -> None:
    x, g = samples
    cotangent = squared_error_cotangent(jnp.arange(5.0))
    options = {"kT": KT, "residual": residual}
    whole = boltzmann_gradient(energy, params, x, g, cotangent, **options)
    one = boltzmann_gradient(energy, params, x, g, cotangent, group=jnp.full(23, 3), **options)
    np.testing.assert_allclose(flat(one), flat(whole), atol=EXACT)

    valid = (jnp.arange(23) % 5 != 2) & (GROUP != 9)  # a whole group counts for nothing
    order = jnp.asarray(np.random.default_rng(5).permutation(23))
    expected = boltzmann_gradient(
        energy, params, x[order], g[order], cotangent, valid=valid[order], group=GROUP[order], **options
    )
    broken = jnp.where(valid[:, None], x, jnp.nan)
    ours = boltzmann_gradient(
        energy, params, broken, g, cotangent, valid=valid, order=order, group=GROUP, **options
    )  # fmt: skip
    np.testing.assert_allclose(flat(ours), flat(expected), atol=EXACT)


def test_within_groups_leaves_out_the_noise_of_what_differs_between_them() -> None:
    """An oscillator x in 16 replicas of 50 samples, each at its own value y of a slow mode that g and dU/dk see too."""
    replicas, each, k = 16, 50, 2.0
    group = jnp.arange(replicas * each) // each

    def oscillator(k: jax.Array, sample: jax.Array) -> jax.Array:
        return 0.5 * k * (sample[0] ** 2 + sample[1])

    def estimates(key: jax.Array) -> jax.Array:
        fast, slow = jax.random.split(key)
        x = jnp.sqrt(KT / k) * jax.random.normal(fast, (replicas * each,))
        y = 0.3 * jnp.repeat(jax.random.normal(slow, (replicas,)), each)
        sample, g = jnp.stack([x, y], axis=1), (x**2 + y)[:, None]
        both = None, group
        return jnp.stack([boltzmann_gradient(oscillator, k, sample, g, jnp.ones(1), kT=KT, group=one) for one in both])

    found = np.asarray(jax.vmap(estimates)(jax.random.split(jax.random.key(0), 200)))
    fast, slow = KT / k**2, 0.3**2 / (2 * KT)  # -d<x^2>/dk, and the variance of y that the total has besides
    error = found.std(axis=0) / np.sqrt(200)
    expected = np.array([-fast - slow * 750 / 799, -fast])
    assert (np.abs(found.mean(axis=0) - expected) < 4 * error).all()
    assert found[:, 1].std() < 0.05 * found[:, 0].std()


# --- local observables ------------------------------------------------------------------------------------------------


def atomic_energies(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Of each of the atoms [n, 3], and each depends on all: as message passing has it."""
    return jnp.tanh(x @ params["w"]) @ params["a"] * (1 + jnp.mean(x**2))


def test_local_form_is_equation_4_over_neighbourhoods(params) -> None:
    rng = np.random.default_rng(5)
    x, g = jnp.asarray(rng.normal(size=(6, 7, 3))), jnp.asarray(rng.normal(size=(6, 3, 2)))
    neighbourhoods = jnp.asarray([[0, 1, 2], [2, 3, -1], [4, 5, 6]])  # one atom in two, one place empty
    v = jnp.asarray([1.0, -0.5])

    def local_energies(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        atoms = atomic_energies(params, x)
        return jnp.stack([atoms[:3].sum(), atoms[2:4].sum(), atoms[4:].sum()])

    gradients = jax.vmap(jax.jacobian(local_energies), (None, 0))(params, x)
    by_sample = np.concatenate([np.reshape(leaf, (18, -1)) for leaf in jax.tree.leaves(gradients)], axis=1)
    deviations = np.asarray((g.reshape(18, 2) - g.reshape(18, 2).mean(0)) @ v)
    expected = -deviations @ by_sample / (KT * 17)
    for places in (neighbourhoods, jnp.broadcast_to(neighbourhoods, (6, 3, 3))):
        ours = local_boltzmann_gradient(atomic_energies, params, x, places, g, v, kT=KT, chunk_size=4)
        np.testing.assert_allclose(flat(ours), expected, atol=EXACT * np.abs(expected).max() * 10)


def test_one_neighbourhood_of_all_atoms_is_the_global_form(params) -> None:
    rng = np.random.default_rng(6)
    x, g = jnp.asarray(rng.normal(size=(9, 4, 3))), jnp.asarray(rng.normal(size=(9, 2)))
    local = local_boltzmann_gradient(atomic_energies, params, x, jnp.arange(4)[None], g[:, None], jnp.ones(2), kT=KT)
    whole = boltzmann_gradient(lambda p, x: atomic_energies(p, x).sum(), params, x, g, jnp.ones(2), kT=KT)
    np.testing.assert_allclose(flat(local), flat(whole), atol=1e-11)


def test_local_form_leaves_out_neighbourhoods_and_broken_configurations(params) -> None:
    rng = np.random.default_rng(7)
    x, g = jnp.asarray(rng.normal(size=(5, 4, 3))), jnp.asarray(rng.normal(size=(5, 2, 2)))
    places = jnp.asarray([[0, 1], [2, 3]])
    valid = jnp.ones((5, 2), bool).at[3].set(False)
    masked = local_boltzmann_gradient(
        atomic_energies, params, x.at[3].set(jnp.nan), places, g.at[3].set(jnp.nan), jnp.ones(2), kT=KT, valid=valid
    )
    rest = jnp.asarray([0, 1, 2, 4])
    absent = local_boltzmann_gradient(atomic_energies, params, x[rest], places, g[rest], jnp.ones(2), kT=KT)
    np.testing.assert_allclose(flat(masked), flat(absent), atol=1e-11)
    with pytest.raises(ValueError, match="do not fit"):
        local_boltzmann_gradient(atomic_energies, params, x, places[:1], g, jnp.ones(2), kT=KT)


def test_flattened_histogram_keeps_all_rare_values_and_a_few_of_the_common_ones() -> None:
    values = jnp.asarray(np.concatenate([np.linspace(0, 0.099, 50), np.linspace(0.91, 1.0, 3), [jnp.nan]]))
    valid = jnp.isfinite(values)
    kept = np.asarray(flatten_histogram(jax.random.key(0), values, bins=10, per_bin=4, valid=valid))
    assert kept[:50].sum() == 4
    assert kept[50:53].all()
    assert not kept[53]
    other = np.asarray(flatten_histogram(jax.random.key(1), values, bins=10, per_bin=4, valid=valid))
    assert (kept != other).any()  # drawn at random, not the first ones


# --- reuse ------------------------------------------------------------------------------------------------------------


def test_reweighted_gradient_at_the_same_potential_is_the_estimator_but_for_bessels_correction(params, samples) -> None:
    x, g = samples
    reference = energies_of(energy, params, x, chunk_size=4)
    v = jnp.linspace(-1, 2, 5)
    ours = reweighted_gradient(energy, params, x, g, v, kT=KT, reference_energies=reference)
    np.testing.assert_allclose(
        flat(ours) * 23 / 22, flat(boltzmann_gradient(energy, params, x, g, v, kT=KT)), atol=EXACT
    )


def test_reweighted_gradient_is_the_derivative_of_the_reweighted_mean(params, samples) -> None:
    x, g = samples
    reference = energies_of(energy, params, x)
    moved = jax.tree.map(lambda leaf: leaf * 1.05, params)
    target = jnp.arange(5.0)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        weights = reweighting(jax.vmap(energy, (None, 0))(params, x), reference, kT=KT)
        return observable_loss(weights @ g, target)

    ours = reweighted_gradient(
        energy, moved, x, g, squared_error_cotangent(target), kT=KT, reference_energies=reference, chunk_size=5
    )
    np.testing.assert_allclose(flat(ours), flat(jax.grad(loss)(moved)), atol=1e-10)
    known = reweighted_gradient(
        energy,
        moved,
        x,
        g,
        squared_error_cotangent(target),
        kT=KT,
        reference_energies=reference,
        energies=energies_of(energy, moved, x),
    )
    np.testing.assert_allclose(flat(known), flat(ours), atol=1e-10)


def test_effective_sample_size_and_the_guard() -> None:
    assert float(effective_sample_size(jnp.full(8, 1 / 8))) == pytest.approx(8)
    assert float(effective_sample_size(jnp.eye(8)[0])) == pytest.approx(1)
    energies = jnp.linspace(0, 1, 10)
    shifted = reweighting(energies + 3.0, energies, kT=KT)
    assert float(effective_sample_size(shifted)) == pytest.approx(10)  # a constant shift is no change
    assert bool(may_reuse(shifted))
    assert not bool(may_reuse(reweighting(energies * 2, energies, kT=KT)))
    assert not bool(may_reuse(jnp.full(4, jnp.nan)))
