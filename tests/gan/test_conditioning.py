"""Class losses and heads: golden values, what heads give, the twins of TAC and the doubled classes of ADC."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stabletrain.gan.conditioning import (
    CLASS_LOSSES,
    ClassOptions,
    ClassOutput,
    EqualizedDense,
    Head,
    class_probabilities,
    conditional_contrastive,
    cross_entropy,
)
from stabletrain.gan.config import CONDITIONING_NAMES

EMBEDDINGS = np.array([[((7 * i + 3 * j) % 11 - 5) / 5 for j in range(4)] for i in range(6)])
WEIGHTS = np.array([[((5 * k + 2 * j) % 7 - 3) / 3 for j in range(4)] for k in range(3)])
LABELS = np.array([0, 1, 2, 0, 1, 2])
FEATURES = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def head_output(kind: str, auxiliary: str = "none", **values):
    head = Head(kind=kind, num_classes=3, auxiliary=auxiliary, embedding_dim=4, **values)

    @jax.jit
    def run():
        variables = head.init(jax.random.key(0), FEATURES, LABELS, train=False)
        return head.apply(variables, FEATURES, LABELS, train=False), variables["params"]

    return *run(), head


def test_losses_have_the_values_of_the_released_code():
    with jax.enable_x64(True):
        output = ClassOutput(embedding=jnp.asarray(EMBEDDINGS), proxies=jnp.asarray(WEIGHTS))
        # ten decimals are known
        contrastive = CLASS_LOSSES["2c"](output, jnp.asarray(LABELS), ClassOptions(temperature=1.0))
        np.testing.assert_allclose(contrastive, 0.6742161057, atol=1e-9)
        options = ClassOptions(temperature=0.5, positive_margin=0.98)
        np.testing.assert_allclose(CLASS_LOSSES["d2dce"](output, jnp.asarray(LABELS), options), 2.3615133516, atol=1e-9)
        logits = jnp.asarray(EMBEDDINGS @ WEIGHTS.T)
        np.testing.assert_allclose(
            CLASS_LOSSES["ac"](ClassOutput(logits=logits), jnp.asarray(LABELS), options), 1.3697849716, atol=1e-9
        )
        unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (EMBEDDINGS, WEIGHTS)]
        cosine = ClassOutput(logits=jnp.asarray(unit[0] @ unit[1].T))
        normalized = CLASS_LOSSES["ac-normalized"](cosine, jnp.asarray(LABELS), ClassOptions(temperature=0.1))
        np.testing.assert_allclose(normalized, 6.1302452413, atol=1e-9)


def test_contrastive_loss_equals_its_sum_over_pairs_and_survives_small_temperatures():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        embeddings, table, labels = rng.normal(size=(7, 3)), rng.normal(size=(3, 3)), rng.integers(0, 3, 7)
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        proxies = table / np.linalg.norm(table, axis=1, keepdims=True)
        total = 0.0
        for i in range(7):
            proxy = np.exp(unit[i] @ proxies[labels[i]] / 0.3)
            pairs = {j: np.exp(unit[i] @ unit[j] / 0.3) for j in range(7) if j != i}
            near = proxy + sum(value for j, value in pairs.items() if labels[j] == labels[i])
            total -= np.log(near / (proxy + sum(pairs.values()))) / 7
        found = conditional_contrastive(
            jnp.asarray(embeddings), jnp.asarray(table[labels]), jnp.asarray(labels), temperature=0.3
        )
        np.testing.assert_allclose(found, total, rtol=1e-12)  # float64
    narrow = [jnp.asarray(a, jnp.float32) for a in (embeddings, table[labels])]
    small = jax.grad(lambda e: conditional_contrastive(e, narrow[1], jnp.asarray(labels), temperature=1e-3))
    assert jnp.all(jnp.isfinite(jax.jit(small)(narrow[0])))


@pytest.mark.parametrize("kind", CONDITIONING_NAMES)
def test_every_head_scores_each_sample_on_its_own(kind):
    output, params, head = head_output(kind)
    assert output.score.shape == (6,)
    np.testing.assert_array_equal(output.features, FEATURES)
    alone = head.apply({"params": params}, FEATURES[2:3], LABELS[2:3], train=False)
    np.testing.assert_allclose(alone.score[0], output.score[2], rtol=1e-5)  # float32 sums of five terms
    # The class losses are there exactly where the conditioning has one.
    has_output = output.classes.logits is not None or output.classes.embedding is not None
    assert has_output == (kind in CLASS_LOSSES)


@pytest.mark.parametrize("kind", ["projection", "sg2-projection"])
def test_projections_depend_on_the_label(kind):
    output, params, head = head_output(kind)
    other = head.apply({"params": params}, FEATURES, (LABELS + 1) % 3, train=False)
    assert jnp.all(output.score != other.score)


def test_normalized_classifier_is_normalized_on_both_sides():
    """The released code's switch leaves the class weights as they are; here neither length matters."""
    _, params, head = head_output("ac-normalized")
    with jax.enable_x64(True):
        params, features = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, FEATURES))
        scaled = {**params, "classifier": params["classifier"] * jnp.array([[2.0], [30.0], [0.1]])}
        output = head.apply({"params": params}, features, LABELS, train=False)
        longer = head.apply({"params": scaled}, 7 * features, LABELS, train=False)
        np.testing.assert_allclose(longer.classes.logits, output.classes.logits, rtol=1e-9)
        assert jnp.all(jnp.abs(output.classes.logits) <= 1 + 1e-9)


def test_twin_classifier_has_weights_of_its_own_that_train():
    """In the released code of 2022 and later the twin loss reads the main classifier, so that both cancel."""
    for kind in ("ac", "d2dce"):
        _, params, head = head_output(kind, "tac")
        loss = CLASS_LOSSES[kind]

        def difference(params, head=head, loss=loss):
            out = head.apply({"params": params}, FEATURES, LABELS, train=False)
            labels = jnp.asarray(LABELS)
            return loss(out.classes, labels, ClassOptions()) - loss(out.twin, labels, ClassOptions())

        assert difference(params) != 0
        gradient = jax.jit(jax.grad(difference))(params)
        twins = [name for name in gradient if name.startswith("twin_")]
        assert twins
        for name in twins:
            assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient[name])), name


def test_adc_doubles_the_classes():
    assert head_output("ac", "adc")[0].classes.logits.shape == (6, 6)
    assert head_output("d2dce", "adc")[0].classes.proxies.shape == (6, 4)
    assert head_output("multi-hinge")[0].classes.logits.shape == (6, 4)


def test_multi_hinge_score_is_the_best_class_over_fake():
    output = head_output("multi-hinge")[0]
    logits = np.asarray(output.classes.logits)
    np.testing.assert_allclose(output.score, logits[:, :3].max(1) - logits[:, 3], rtol=1e-6)


def test_probabilities_sum_to_one_where_there_is_a_classifier():
    for kind in CONDITIONING_NAMES:
        found = class_probabilities(kind, head_output(kind)[0].classes, ClassOptions(temperature=0.5))
        if kind in CLASS_LOSSES:
            np.testing.assert_allclose(jnp.sum(found, axis=1), 1, rtol=1e-5)  # float32
        else:
            assert found is None


def test_equalized_layers_start_with_unit_gain_and_scale_their_rate():
    layer = EqualizedDense(64, learning_rate=0.01)
    inputs = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    variables = layer.init(jax.random.key(0), inputs)
    assert abs(float(jnp.std(layer.apply(variables, inputs))) - 1) < 0.05  # of 16,384 numbers, from 8,192 weights
    assert abs(float(jnp.std(variables["params"]["kernel"])) / 100 - 1) < 0.05
    equalized = head_output("d2dce", equalized=True)[1]
    assert set(equalized) == {"score", "embedding", "proxies", "proxies_embedding"}


def test_cross_entropy_is_the_log_of_the_probability():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 1])), -np.log([0.5, 0.8]).mean(), rtol=1e-6)
