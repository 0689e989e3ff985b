"""3x3 convolutions by Winograd's minimal filtering, F(2x2, 3x3): 16 products for four pixels in place of 36.

XLA has one way to convolve on a CPU, and its gradient by the kernel takes 1.3 to 3.3 times as long as the
convolution (`benchmarks/convolution_forms.py`). Here images are cut into overlapping tiles of 4x4 pixels, tiles and
kernels are transformed along both axes, and what remains are 16 ordinary matrix products:

    Y = A^T ((G k G^T) * (B^T d B)) A,

with sums and differences of pixels in B and A, and halves in G: the rounding error is about that of the sum itself
(1 to 2e-6 of the largest number in float32). The gradients by the images and by the kernel are of the same form.

`convolve_3x3` and its gradient by the kernel are primitives of JAX, each the other's derivative, so that every mode of
differentiation, to any order, stays within them. A CPU computes them as above; another device as XLA convolves.

**Shapes**: images [B, H, W, C], kernel [3, 3, C, D]; stride 1, as many pixels out as in (SAME), H and W even.
Source: Lavin and Gray 2016 (arXiv 1509.09308).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array

FEWEST_CHANNELS, FEWEST_PIXELS = 64, 64
"""Below these the transforms cost about as much as the products that they save. The batch has no say, so that its
size does not change the numbers."""


def pays(images: Array, kernel: Array) -> bool:
    """Whether `convolve_3x3` takes these, by shape and type, and is worth it. bfloat16 would lose what it has left."""
    if images.ndim != 4 or kernel.shape[:2] != (3, 3) or images.dtype not in (jnp.float32, jnp.float64):
        return False
    height, width = images.shape[1:3]
    even = height % 2 == 0 and width % 2 == 0
    return even and height * width >= FEWEST_PIXELS and min(kernel.shape[2:]) >= FEWEST_CHANNELS


def convolve_3x3(images: Array, kernel: Array) -> Array:
    """[B, H, W, C] with [3, 3, C, D] -> [B, H, W, D], stride 1 and SAME.

    Raises: `ValueError` for odd sizes, or shapes or types that do not fit.
    """
    if images.ndim != 4 or kernel.shape[:3] != (3, 3, images.shape[-1]) or images.dtype != kernel.dtype:
        raise ValueError(f"images {_described(images)} do not fit a kernel {_described(kernel)}")
    if images.shape[1] % 2 or images.shape[2] % 2:
        raise ValueError(f"images must have an even height and width: {images.shape}")
    convolved: Array = _convolve_p.bind(images, kernel, transposed=False)
    return convolved


def _described(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


# --- the transforms ---------------------------------------------------------------------------------------------------
# Each takes the parts along one axis to the parts along the transformed one. `mirrored`: of the kernel turned round.


def _of_pixels(d: Sequence[Array], mirrored: bool) -> list[Array]:
    """B^T: four pixels of a tile."""
    ends = d[0] - d[2], d[1] - d[3]
    first, last = ends[::-1] if mirrored else ends
    return [first, d[1] + d[2], d[2] - d[1], last]


def _of_kernel(k: Sequence[Array]) -> list[Array]:
    """G: three taps."""
    return [k[0], 0.5 * (k[0] + k[1] + k[2]), 0.5 * (k[0] - k[1] + k[2]), k[2]]


def _to_pixels(m: Sequence[Array], mirrored: bool) -> list[Array]:
    """A^T: to the two pixels in the middle of a tile."""
    first, last = (m[3], m[0]) if mirrored else (m[0], m[3])
    return [first + m[1] + m[2], m[1] - m[2] - last]


def _from_pixels(g: Sequence[Array]) -> list[Array]:
    """A: the transpose of `_to_pixels`."""
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]


def _to_kernel(u: Sequence[Array]) -> list[Array]:
    """G^T: the transpose of `_of_kernel`."""
    half = 0.5 * (u[1] + u[2])
    return [u[0] + half, 0.5 * (u[1] - u[2]), half + u[3]]


# Along both axes. What lies between is stacked into one array: XLA then compiles two small loops in place of sixteen.


def _tiles(images: Array, *, mirrored: bool = False) -> list[Array]:
    """B^T d B of all tiles, by column: four arrays [4, tiles, C], the first axis by row."""
    b, h, w, c = images.shape
    x = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, h // 2 + 1, 2, w + 2, c)
    rows = jnp.stack(_of_pixels([x[:, :-1, 0], x[:, :-1, 1], x[:, 1:, 0], x[:, 1:, 1]], mirrored))
    x = rows.reshape(4, b, h // 2, w // 2 + 1, 2, c)
    columns = _of_pixels([x[..., :-1, 0, :], x[..., :-1, 1, :], x[..., 1:, 0, :], x[..., 1:, 1, :]], mirrored)
    return [column.reshape(4, -1, c) for column in columns]


def _untiled(products: Sequence[Array], shape: tuple[int, ...], *, mirrored: bool = False) -> Array:
    """A^T m A: four arrays [4, tiles, D] -> images [B, H, W, D]."""
    b, h, w, d = shape
    tiles = [m.reshape(4, b, h // 2, w // 2, d) for m in products]
    rows = jnp.stack(_to_pixels(tiles, mirrored), axis=4).reshape(4, b, h // 2, w, d)
    return jnp.stack(_to_pixels(list(rows), mirrored), axis=2).reshape(shape)


def _kernels(kernel: Array) -> list[Array]:
    """G k G^T, by column: four arrays [4, C, D], the first axis by row."""
    rows = jnp.stack(_of_kernel(list(kernel)))
    return _of_kernel([rows[:, 0], rows[:, 1], rows[:, 2]])


def _cotangent_tiles(cotangent: Array) -> list[Array]:
    """A g A^T of all tiles, by column: four arrays [4, tiles, D]."""
    b, h, w, d = cotangent.shape
    x = cotangent.reshape(b, h // 2, 2, w // 2, 2, d)
    rows = jnp.stack(_from_pixels([x[:, :, 0], x[:, :, 1]]))
    return [column.reshape(4, -1, d) for column in _from_pixels([rows[..., 0, :], rows[..., 1, :]])]


def _multiply(left: Sequence[Array], right: Sequence[Array], axes: tuple[int, int]) -> list[Array]:
    """Matrix by matrix, summed over the axis `axes[0]` of the left and `axes[1]` of the right ones."""
    dimensions = (((axes[0],), (axes[1],)), ((0,), (0,)))
    return [lax.dot_general(a, b, dimensions) for a, b in zip(left, right, strict=True)]


def _by_tiles(images: Array, kernel: Array, *, transposed: bool) -> Array:
    """Turning the kernel round exchanges the ends of its transform: the tiles' and the products' are exchanged."""
    products = _multiply(_tiles(images, mirrored=transposed), _kernels(kernel), (2, 2) if transposed else (2, 1))
    width = kernel.shape[2 if transposed else 3]
    return _untiled(products, (*images.shape[:3], width), mirrored=transposed)


def _kernel_gradient_by_tiles(images: Array, cotangent: Array) -> Array:
    columns = _to_kernel(_multiply(_tiles(images), _cotangent_tiles(cotangent), (1, 1)))
    return jnp.stack(_to_kernel(list(jnp.stack(columns, axis=1))))


# --- the same by XLA's convolution ------------------------------------------------------------------------------------


def _direct(images: Array, kernel: Array, *, transposed: bool) -> Array:
    def convolve(images: Array) -> Array:
        return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    if not transposed:
        return convolve(images)
    shape = jax.ShapeDtypeStruct((*images.shape[:3], kernel.shape[2]), images.dtype)
    found: Array = jax.linear_transpose(convolve, shape)(images)[0]
    return found


def _direct_kernel_gradient(images: Array, cotangent: Array) -> Array:
    shape = jax.ShapeDtypeStruct((3, 3, images.shape[-1], cotangent.shape[-1]), images.dtype)
    found: Array = jax.linear_transpose(lambda kernel: _direct(images, kernel, transposed=False), shape)(cotangent)[0]
    return found


# --- the primitives ---------------------------------------------------------------------------------------------------


def _primitive(name: str, shape_of: Callable[..., tuple[int, ...]], direct: Any, by_tiles: Any) -> Primitive:
    """A function linear in both arguments: `by_tiles` on a CPU, `direct` elsewhere."""
    primitive = Primitive(name)

    def abstract(first: Any, second: Any, **parameters: Any) -> Any:
        return jax.core.ShapedArray(shape_of(first.shape, second.shape, **parameters), first.dtype)

    def batched(arguments: Sequence[Array], axes: Sequence[Any], **parameters: Any) -> tuple[Array, int]:
        # Further images are no more than a larger batch. Otherwise it is mapped in the form that the device takes.
        first, second = arguments
        if primitive is _convolve_p and axes[1] is batching.not_mapped:
            images = jnp.moveaxis(first, axes[0], 0)
            joined = primitive.bind(images.reshape(-1, *images.shape[2:]), second, **parameters)
            return joined.reshape(*images.shape[:2], *joined.shape[1:]), 0
        in_axes = [None if axis is batching.not_mapped else axis for axis in axes]
        forms = [jax.vmap(functools.partial(form, **parameters), in_axes) for form in (by_tiles, direct)]
        return lax.platform_dependent(first, second, cpu=forms[0], default=forms[1]), 0

    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("transposed",)))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(direct, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(by_tiles, multiple_results=False), platform="cpu")
    batching.primitive_batchers[primitive] = batched
    return primitive


def _convolved_shape(images: tuple[int, ...], kernel: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    return (*images[:3], kernel[2 if transposed else 3])


def _kernel_shape(images: tuple[int, ...], cotangent: tuple[int, ...]) -> tuple[int, ...]:
    return 3, 3, images[3], cotangent[3]


_convolve_p = _primitive("convolve_3x3", _convolved_shape, _direct, _by_tiles)
_kernel_gradient_p = _primitive(
    "convolve_3x3_kernel_gradient", _kernel_shape, _direct_kernel_gradient, _kernel_gradient_by_tiles
)

# <g, x * k> is linear in each of three arrays, and these are its derivatives.
ad.defbilinear(
    _convolve_p,
    lambda g, images, kernel, *, transposed: _convolve_p.bind(g, kernel, transposed=not transposed),
    lambda g, images, kernel, *, transposed: _kernel_gradient_p.bind(*((g, images) if transposed else (images, g))),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda g, images, cotangent: _convolve_p.bind(cotangent, g, transposed=True),
    lambda g, images, cotangent: _convolve_p.bind(images, g, transposed=False),
)
