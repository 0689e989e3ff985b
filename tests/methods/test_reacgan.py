"""ReACGAN's losses: golden values of the released code in float64, edge cases, invariants, AC-GAN's gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stabletrain.methods import reacgan
from stabletrain.methods.reacgan import (
    VARIANTS,
    cosine_cross_entropy,
    cosines,
    d2d_ce_bound,
    normalize,
    softmax_gradients,
)
from stabletrain.training.devices import make_mesh

d2d_ce = jax.jit(reacgan.d2d_ce, static_argnames="variant")  # one compilation instead of thirty small ones

EMBEDDINGS = np.array([[((7 * i + 3 * j) % 11 - 5) / 5 for j in range(4)] for i in range(6)])
WEIGHTS = np.array([[((5 * k + 2 * j) % 7 - 3) / 3 for j in range(4)] for k in range(3)])
LABELS = np.array([0, 1, 2, 0, 1, 2])

GOLDEN = [
    # temperature, margin, released (value, gradient norm), as written (value, gradient norm)
    (0.5, 0.98, 2.3615133516, 0.5224676608, 3.4665832324, 0.5665654955),
    (0.25, 0.90, 3.2187567900, 1.0958206869, 5.2085212974, 1.1550409623),
    (0.75, 1.00, 2.0983782381, 0.3396532299, 2.8369066247, 0.3688277660),
]
"""Of PyTorch-StudioGAN's function and of the printed formula, on these inputs, in float64."""


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def random_batch(seed: int, batch: int = 9, size: int = 5, classes: int = 3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, batch)
    weights = rng.normal(size=(classes, size))
    return rng.normal(size=(batch, size)), weights[labels], labels


# --- golden values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "margin", "released", "released_norm", "written", "written_norm"), GOLDEN)
def test_golden_values_and_gradient_norms(temperature, margin, released, released_norm, written, written_norm):
    expected = {"released": (released, released_norm), "as_written": (written, written_norm)}
    for variant, (value, norm) in expected.items():

        def loss(embeddings, variant=variant):
            return d2d_ce(
                embeddings, WEIGHTS[LABELS], LABELS, temperature=temperature, positive_margin=margin, variant=variant
            )

        found, gradient = jax.jit(jax.value_and_grad(loss))(EMBEDDINGS)
        # The golden values have ten decimals.
        assert abs(float(found) - value) < 1e-9
        assert abs(float(jnp.linalg.norm(gradient)) - norm) < 1e-9


def test_float32_keeps_six_digits():
    temperature, margin, released, *_ = GOLDEN[0]
    value = d2d_ce(
        EMBEDDINGS.astype(np.float32), WEIGHTS[LABELS].astype(np.float32), LABELS,
        temperature=temperature, positive_margin=margin,
    )  # fmt: skip
    assert value.dtype == jnp.float32
    assert abs(float(value) - released) < 5e-6  # of magnitude 2, after a dozen roundings of 6e-8


def test_cross_entropies():
    assert abs(float(softmax_gradients(EMBEDDINGS, WEIGHTS, LABELS).loss) - 1.3697849716) < 1e-9
    assert abs(float(cosine_cross_entropy(EMBEDDINGS, WEIGHTS, LABELS, temperature=0.1)) - 6.1302452413) < 1e-9


# --- the formula ------------------------------------------------------------------------------------------------------


def written_out(embeddings, proxies, labels, temperature, margin, released):
    """Eq. 6 sample by sample, as an independent check of the vectorised form."""
    losses = []
    for i in range(len(labels)):
        cosine = [
            e @ embeddings[i] / np.linalg.norm(e) / np.linalg.norm(embeddings[i]) for e in (*embeddings, proxies[i])
        ]
        positive = min(cosine[-1] - margin, 0) / temperature
        logits = [(c - (1 - margin)) / temperature for c in cosine[:-1]]
        shift = max(logits[j] for j in range(len(labels)) if j != i) if released else 0
        negatives = sum(np.exp(max(logits[j], 0) - shift) for j in range(len(labels)) if labels[j] != labels[i])
        losses.append(-np.log(np.exp(positive) / (np.exp(positive) + negatives)))
    return np.mean(losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_sum_over_pairs(variant):
    for seed in range(3):
        batch = random_batch(seed)
        expected = written_out(*batch, 0.4, 0.9, variant == "released")
        found = d2d_ce(*batch, temperature=0.4, positive_margin=0.9, variant=variant)
        np.testing.assert_allclose(found, expected, rtol=1e-12)  # float64, a dozen terms


@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_do_not_matter_and_gradients_are_tangent(variant):
    embeddings, proxies, labels = random_batch(4)

    def loss(e, v):
        return d2d_ce(e, v, labels, temperature=0.5, positive_margin=0.98, variant=variant)

    scale = np.linspace(0.1, 100, len(labels))[:, None]
    np.testing.assert_allclose(loss(scale * embeddings, 3 * proxies), loss(embeddings, proxies), rtol=1e-12)
    by_embeddings, by_proxies = jax.grad(loss, argnums=(0, 1))(embeddings, proxies)
    # A loss of directions pushes at right angles to them; absolute, float64 rounding of terms below 1.
    np.testing.assert_allclose(jnp.sum(by_embeddings * embeddings, axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(jnp.sum(by_proxies * proxies, axis=1), 0, atol=1e-14)


def test_order_of_the_batch_does_not_matter():
    embeddings, proxies, labels = random_batch(5)
    order = np.random.default_rng(0).permutation(len(labels))
    first = d2d_ce(embeddings, proxies, labels, temperature=0.5, positive_margin=0.98)
    second = d2d_ce(embeddings[order], proxies[order], labels[order], temperature=0.5, positive_margin=0.98)
    np.testing.assert_allclose(first, second, rtol=1e-13)


def test_easy_positives_and_negatives_feel_no_force():
    """c(f, v) >= m_p: no gradient to the proxy. c(f_i, f_j) <= m_n: none between the two."""
    margin = 0.9
    embeddings = np.array([[1.0, 0.0], [0.0, 1.0]])  # cosine 0 < m_n = 0.1
    proxies = np.array([[1.0, 0.1], [0.1, 1.0]])  # cosine 0.995 > m_p

    def loss(e, v):
        return d2d_ce(e, v, np.array([0, 1]), temperature=0.5, positive_margin=margin, variant="as_written")

    for gradient in jax.grad(loss, argnums=(0, 1))(embeddings, proxies):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bound_holds_and_is_reached(variant):
    options = {"temperature": 0.5, "positive_margin": 0.98, "variant": variant}
    for seed in range(20):
        embeddings, proxies, labels = random_batch(seed, batch=6, classes=2)
        labels[:] = [0, 0, 0, 1, 1, 1]
        assert d2d_ce(embeddings, proxies, labels, **options) >= d2d_ce_bound(3, **options)
    # Two tight clusters at right angles, each on its proxy: the published logs go below log(1 + N) this way.
    clusters = np.repeat(np.eye(2), 3, axis=0)
    reached = d2d_ce(clusters, clusters, np.array([0, 0, 0, 1, 1, 1]), **options)
    np.testing.assert_allclose(reached, d2d_ce_bound(3, **options), rtol=1e-12)
    assert float(d2d_ce_bound(3, **{**options, "variant": "as_written"})) == pytest.approx(np.log(4))


def test_the_shift_is_a_constant_for_the_gradient():
    """Released: a closer neighbour of the same class changes the value by the shift, but feels no gradient by it."""
    labels = np.array([0, 0, 1])

    @jax.jit
    def loss(neighbour):
        embeddings = jnp.stack([jnp.array([1.0, 0.0]), neighbour, jnp.array([0.0, 1.0])])
        return d2d_ce(embeddings, embeddings, labels, temperature=0.5, positive_margin=0.5)

    start, tangent, step = jnp.array([0.9, 0.3]), jnp.array([-0.3, 0.9]), 1e-6
    numeric = (loss(start + step * tangent) - loss(start)) / step
    assert abs(float(jax.grad(loss)(start) @ tangent) - float(numeric)) > 1e-3


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("labels", [[0], [2, 2, 2, 2]], ids=["one sample", "one class"])
def test_without_negatives_loss_and_gradient_are_zero(variant, labels):
    embeddings, proxies, _ = random_batch(0, batch=len(labels))

    def loss(e, v):
        return d2d_ce(e, v, np.array(labels), temperature=0.5, positive_margin=0.98, variant=variant)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(embeddings, proxies)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_absent_class_leaves_its_proxy_alone():
    table = np.random.default_rng(0).normal(size=(5, 4))
    labels = np.array([0, 3, 3, 1, 0, 1])
    gradient = jax.grad(
        lambda t: d2d_ce(EMBEDDINGS, t[labels], labels, temperature=0.5, positive_margin=0.98)
    )(table)  # fmt: skip
    np.testing.assert_array_equal(gradient[jnp.array([2, 4])], 0)
    assert jnp.all(jnp.linalg.norm(gradient[jnp.array([0, 1, 3])], axis=1) > 0)


def test_only_equality_of_labels_matters():
    """Doubled labels, as for ADC's real samples, or any other renaming give the same loss."""
    batch = random_batch(7)
    first = d2d_ce(*batch, temperature=0.5, positive_margin=0.98)
    for renamed in (2 * batch[2], 100 - batch[2]):
        assert d2d_ce(batch[0], batch[1], renamed, temperature=0.5, positive_margin=0.98) == first


def test_real_and_fake_of_a_class_are_negatives_under_doubled_labels():
    embeddings, proxies, _ = random_batch(8, batch=4)
    same = d2d_ce(embeddings, proxies, np.array([2, 2, 2, 2]), temperature=0.5, positive_margin=0.98)
    apart = d2d_ce(embeddings, proxies, np.array([4, 4, 5, 5]), temperature=0.5, positive_margin=0.98)
    assert same == 0 < apart


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_vectors_and_small_temperatures_stay_finite(variant):
    embeddings, proxies, labels = random_batch(1)
    embeddings = embeddings.astype(np.float32)
    embeddings[0] = 0
    embeddings[1] = embeddings[2]
    for temperature in (1.0, 1e-3):  # exponents up to 2,000

        def loss(e, v, temperature=temperature):
            return d2d_ce(e, v, labels, temperature=temperature, positive_margin=0.98, variant=variant)

        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(embeddings, proxies.astype(np.float32))
        assert jnp.isfinite(value)
        assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'printed'"):
        d2d_ce(EMBEDDINGS, WEIGHTS[LABELS], LABELS, temperature=0.5, positive_margin=0.98, variant="printed")
    with pytest.raises(ValueError, match=r"a proxy for each of them \[B, D\]"):
        d2d_ce(EMBEDDINGS, WEIGHTS, LABELS, temperature=0.5, positive_margin=0.98)
    with pytest.raises(ValueError, match="whole numbers"):
        d2d_ce(EMBEDDINGS, WEIGHTS[LABELS], LABELS / 2, temperature=0.5, positive_margin=0.98)
    with pytest.raises(ValueError, match="unknown variant"):
        d2d_ce_bound(3, temperature=0.5, positive_margin=0.98, variant="printed")


# --- devices, transformations -----------------------------------------------------------------------------------------


def test_value_and_gradient_do_not_depend_on_the_number_of_devices():
    """The released distributed code divides the gradient by the number of processes; this one must not."""
    embeddings, proxies, labels = random_batch(2, batch=8)

    def loss(e, v, y):
        return d2d_ce(e, v, y, temperature=0.5, positive_margin=0.98)

    results = []
    for devices in (1, 4):
        mesh = make_mesh(devices, 8)
        split = NamedSharding(mesh, PartitionSpec("data"))
        whole = NamedSharding(mesh, PartitionSpec())
        program = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=(split, split, split), out_shardings=whole
        )
        results.append(program(embeddings, proxies, labels))
    for one, four in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1])):
        np.testing.assert_allclose(one, four, rtol=1e-12, atol=1e-15)  # another order of the same float64 sums


def test_vmap_is_a_loop():
    batches = [random_batch(seed) for seed in range(3)]
    stacked = [np.stack(part) for part in zip(*batches)]
    many = jax.vmap(lambda e, v, y: d2d_ce(e, v, y, temperature=0.5, positive_margin=0.98))(*stacked)
    single = [d2d_ce(*batch, temperature=0.5, positive_margin=0.98) for batch in batches]
    np.testing.assert_allclose(many, jnp.stack(single), rtol=1e-12)


def test_half_precision_is_computed_in_single():
    embeddings, proxies, labels = random_batch(3)
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (embeddings, proxies)]
    found = d2d_ce(*narrow, labels, temperature=0.5, positive_margin=0.98)
    wide = d2d_ce(*(a.astype(jnp.float32) for a in narrow), labels, temperature=0.5, positive_margin=0.98)
    assert found.dtype == jnp.float32
    assert found == wide


# --- the sphere -------------------------------------------------------------------------------------------------------


def test_normalize_and_cosines():
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [1e-200, 0.0]])
    # The square of 1e-200 is 0: such a vector counts as zero rather than dividing 0 by 0.
    np.testing.assert_allclose(normalize(vectors), [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-15)
    assert jnp.all(jnp.isfinite(jax.grad(lambda v: jnp.sum(normalize(v)))(vectors)))
    np.testing.assert_allclose(cosines(vectors[:1], np.eye(2)), [[0.6, 0.8]], rtol=1e-15)


# --- AC-GAN -----------------------------------------------------------------------------------------------------------


def test_softmax_gradients_are_the_derivatives():
    features, weights = np.random.default_rng(0).normal(size=(7, 5)), np.random.default_rng(1).normal(size=(4, 5))
    labels = np.array([0, 3, 1, 1, 2, 0, 3])

    def loss(f, w):
        return -jnp.mean(jax.nn.log_softmax(f @ w.T)[jnp.arange(7), labels])

    by_features, by_weights = jax.grad(loss, argnums=(0, 1))(features, weights)
    found = jax.jit(softmax_gradients)(features, weights, labels)
    np.testing.assert_allclose(found.by_features, by_features, rtol=1e-10, atol=1e-14)  # float64
    np.testing.assert_allclose(found.by_weights, by_weights, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(
        found.probability, np.exp(np.log(jax.nn.softmax(features @ weights.T)))[range(7), labels]
    )
    assert jnp.all(jnp.linalg.norm(found.by_weights, axis=1) <= found.bound * (1 + 1e-12))


def test_gradient_explodes_with_the_features_and_the_cosine_one_does_not():
    """The paper's diagnosis and the first half of its cure, on features ten and a hundred times as long."""
    rng = np.random.default_rng(0)
    features, weights = np.maximum(rng.normal(size=(128, 64)), 0), rng.normal(size=(20, 64)) / 8
    labels = rng.integers(0, 20, 128)
    plain = [jnp.linalg.norm(softmax_gradients(scale * features, weights, labels).by_weights) for scale in (1, 10, 100)]
    assert plain[1] > 10 * plain[0]
    assert plain[2] > 9 * plain[1]
    cosine = [
        jnp.linalg.norm(
            jax.grad(lambda w, s=s: cosine_cross_entropy(s * features, w, labels, temperature=1.0))(weights)
        )
        for s in (1, 10, 100)
    ]
    np.testing.assert_allclose(cosine, cosine[0], rtol=1e-10)
