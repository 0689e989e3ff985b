"""Winograd's 3x3 convolution is XLA's, in every mode of differentiation, and is used where it pays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from stabletrain.nn.convolution import convolve
from stabletrain.nn.winograd import convolve_3x3, pays
from stabletrain.training.devices import batch_sharding, make_mesh, replicated


def direct(images: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.fixture(params=[(2, 6, 8, 3, 5), (1, 2, 2, 1, 1), (3, 4, 10, 7, 2)], ids=str)
def arrays(request):
    batch, height, width, inside, outside = request.param
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield (
            jnp.asarray(random.standard_normal((batch, height, width, inside))),
            jnp.asarray(random.standard_normal((3, 3, inside, outside))),
        )


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)


def squares_of_gradient(convolution, argument):
    def penalty(images, kernel):
        slope = jax.grad(lambda *a: jnp.sum(jnp.sin(convolution(*a))), argument)(images, kernel)
        return jnp.sum(slope**2)

    return penalty


def gradient_of_a_jvp(convolution):
    def penalty(images, kernel):
        tangents = jnp.cos(images), jnp.sin(kernel)
        return jnp.sum(jax.jvp(lambda *a: jnp.tanh(convolution(*a)), (images, kernel), tangents)[1] ** 2)

    return penalty


@pytest.mark.parametrize(
    "function",
    [
        lambda convolution: convolution,
        lambda convolution: lambda x, k: jax.vjp(convolution, x, k)[1](jnp.cos(convolution(x, k))),
        lambda convolution: lambda x, k: jax.jvp(convolution, (x, k), (jnp.sin(x), jnp.cos(k))),
        lambda convolution: jax.grad(squares_of_gradient(convolution, 0), (0, 1)),
        lambda convolution: jax.grad(squares_of_gradient(convolution, 1), (0, 1)),
        lambda convolution: jax.grad(gradient_of_a_jvp(convolution), (0, 1)),
        lambda convolution: jax.grad(jax.checkpoint(lambda x, k: jnp.sum(jnp.sin(convolution(x, k)))), (0, 1)),
    ],
    ids=["value", "reverse", "forward", "double backward", "by the kernel", "gradient of a JVP", "rematerialised"],
)
def test_it_is_the_direct_convolution_however_it_is_differentiated(function, arrays):
    assert_same(jax.jit(function(convolve_3x3))(*arrays), jax.jit(function(direct))(*arrays))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, None), (0, -1)], ids=str)
def test_mapped_over_images_kernels_or_both(axes):
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        several = [
            np.moveaxis(random.standard_normal((3, *shape)), 0, axis or 0)
            for shape, axis in zip([(2, 4, 6, 3), (3, 3, 3, 5)], axes, strict=True)
        ]
        images, kernel = (
            jnp.asarray(array if axis is not None else array[0]) for array, axis in zip(several, axes, strict=True)
        )
        for wrap in (lambda f: f, lambda f: jax.grad(squares_of_gradient(f, 0), (0, 1))):
            found, expected = (jax.jit(jax.vmap(wrap(f), axes))(images, kernel) for f in (convolve_3x3, direct))
            assert_same(found, expected)


def test_in_float32_it_rounds_like_the_sum():
    random = np.random.default_rng(0)
    images = random.standard_normal((2, 8, 8, 128), np.float32)
    kernel = random.standard_normal((3, 3, 128, 64), np.float32)
    found, plain = (np.asarray(jax.jit(f)(images, kernel)) for f in (convolve_3x3, direct))
    with jax.enable_x64(True):
        exact = np.asarray(direct(jnp.asarray(images, float), jnp.asarray(kernel, float)))
    error, plain_error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found, plain))
    assert error < 3 * max(plain_error, np.finfo(np.float32).eps * np.sqrt(np.mean(exact**2)))


def test_split_over_devices_it_is_the_same():
    """With the batch on two devices of the host, as training has it."""
    mesh = make_mesh(2, 4)
    random = np.random.default_rng(0)
    images = random.standard_normal((4, 8, 8, 8), np.float32)
    kernel = random.standard_normal((3, 3, 8, 8), np.float32)
    placed = jax.device_put(images, batch_sharding(mesh)), jax.device_put(kernel, replicated(mesh))
    gradient = jax.jit(jax.grad(squares_of_gradient(convolve_3x3, 0), (0, 1)))
    for a, b in zip(gradient(*placed), gradient(images, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mapped", [False, True])
def test_another_device_convolves_as_xla_does(mapped):
    gradient = jax.grad(lambda *a: jnp.sum(convolve_3x3(*a) ** 2), (0, 1))
    shapes = [(2, 8, 8, 4), (3, 3, 4, 4)]
    if mapped:
        gradient, shapes = jax.vmap(gradient), [(5, *shape) for shape in shapes]
    traced = jax.jit(gradient).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    counts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
        for platform in ("cuda", "cpu")
    }
    assert counts == {"cuda": 3, "cpu": 0}


@pytest.mark.parametrize(
    ("images", "kernel", "dtype", "expected"),
    [
        ((1, 8, 8, 64), (3, 3, 64, 64), jnp.float32, True),
        ((1, 32, 32, 128), (3, 3, 128, 64), jnp.float64, True),
        ((64, 8, 8, 64), (3, 3, 64, 32), jnp.float32, False),  # too narrow
        ((64, 4, 4, 64), (3, 3, 64, 64), jnp.float32, False),  # too small
        ((1, 9, 8, 64), (3, 3, 64, 64), jnp.float32, False),  # odd
        ((1, 8, 8, 64), (5, 5, 64, 64), jnp.float32, False),
        ((1, 8, 8, 64), (3, 3, 64, 64), jnp.bfloat16, False),
    ],
    ids=str,
)
def test_where_it_pays_and_only_there_convolve_takes_it(images, kernel, dtype, expected):
    with jax.enable_x64(True):
        shapes = jax.ShapeDtypeStruct(images, dtype), jax.ShapeDtypeStruct(kernel, dtype)
        assert pays(*shapes) is expected
        taken = {
            str(arguments): "convolve_3x3" in str(jax.make_jaxpr(lambda *a, k=arguments: convolve(*a, **k))(*shapes))
            for arguments in ({}, {"padding": ((1, 1), (1, 1))}, {"padding": "VALID"}, {"stride": 2})
        }
    assert list(taken.values()) == [expected, expected, False, False]


@pytest.mark.parametrize(
    ("images", "kernel"),
    [
        ((1, 5, 4, 2), (3, 3, 2, 2)),
        ((1, 4, 4, 2), (3, 3, 3, 2)),
        ((1, 4, 4, 2), (5, 5, 2, 2)),
        ((4, 4, 2), (3, 3, 2, 2)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(images, kernel):
    with pytest.raises(ValueError, match=r"do not fit|must have an even height"):
        convolve_3x3(jnp.zeros(images), jnp.zeros(kernel))
