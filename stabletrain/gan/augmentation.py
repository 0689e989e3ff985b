"""Augmentations inside the compiled step, differentiable by the images: DiffAugment, ADA, and CR's flips and shifts.

Images are [B, H, W, C] in [-1, 1]; every image has its own random numbers. A discriminator that sees nothing but
augmented images, real and fake, leaves the generator unaugmented as long as the augmentation can be undone in
distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.ndimage import map_coordinates

Array = jax.Array
Operation = Callable[[Array, Array], Array]

# --- shifts by whole pixels -------------------------------------------------------------------------------------------


def _selected(images: Array, rows: Array, columns: Array) -> Array:
    """images[b, rows[b, i], columns[b, j]], black where an index is outside.

    As products with 0-1 matrices: their derivative is a product too, where that of indexing is a slow scatter.
    """
    _, height, width, _ = images.shape
    pick_rows = (rows[:, :, None] == jnp.arange(height)).astype(images.dtype)  # (B, H, H)
    pick_columns = (columns[:, :, None] == jnp.arange(width)).astype(images.dtype)
    exact = lax.Precision.HIGHEST  # a product with 1 must not round the image
    moved = jnp.einsum("bih,bhwc->biwc", pick_rows, images, precision=exact)
    return jnp.einsum("bjw,biwc->bijc", pick_columns, moved, precision=exact)


def translated(images: Array, down: Array, right: Array, *, border: str) -> Array:
    """Images shifted by whole pixels, `down` [B] and `right` [B]; beyond the border `zero` or `reflect`ed pixels."""
    rows = jnp.arange(images.shape[1]) - down[:, None]
    columns = jnp.arange(images.shape[2]) - right[:, None]
    if border == "reflect":
        rows, columns = _reflected(rows, images.shape[1]), _reflected(columns, images.shape[2])
    return _selected(images, rows, columns)


def _reflected(index: Array, size: int) -> Array:
    """Indices folded back at both ends without repeating the border pixel."""
    last = max(size - 1, 1)
    return last - jnp.abs(index % (2 * last) - last)


def _shifts(key: Array, count: int, size: int, share: float) -> Array:
    largest = int(size * share + 0.5)
    return jax.random.randint(key, (count,), -largest, largest + 1)


def flip_and_shift(images: Array, key: Array) -> Array:
    """Mirrored at random and shifted by up to an eighth, borders reflected: CR's augmentation (Zhang et al. 2020)."""
    keys = jax.random.split(key, 3)
    count, height, width, _ = images.shape
    mirrored = jax.random.bernoulli(keys[0], 0.5, (count, 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    down, right = _shifts(keys[1], count, height, 0.125), _shifts(keys[2], count, width, 0.125)
    return translated(images, down, right, border="reflect")


# --- DiffAugment ------------------------------------------------------------------------------------------------------


def _brightness(images: Array, key: Array) -> Array:
    return images + jax.random.uniform(key, (len(images), 1, 1, 1), minval=-0.5, maxval=0.5)


def _saturation(images: Array, key: Array) -> Array:
    grey = jnp.mean(images, axis=3, keepdims=True)
    return (images - grey) * jax.random.uniform(key, (len(images), 1, 1, 1), maxval=2.0) + grey


def _contrast(images: Array, key: Array) -> Array:
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - mean) * jax.random.uniform(key, (len(images), 1, 1, 1), minval=0.5, maxval=1.5) + mean


def _colour(images: Array, key: Array) -> Array:
    keys = jax.random.split(key, 3)
    return _contrast(_saturation(_brightness(images, keys[0]), keys[1]), keys[2])


def _translation(images: Array, key: Array) -> Array:
    keys = jax.random.split(key)
    count, height, width, _ = images.shape
    down, right = _shifts(keys[0], count, height, 0.125), _shifts(keys[1], count, width, 0.125)
    return translated(images, down, right, border="zero")


def _cutout(images: Array, key: Array) -> Array:
    """A square of half the side, around a random centre, made grey (0)."""
    count, height, width, _ = images.shape
    inside = []
    for axis_key, size in zip(jax.random.split(key), (height, width)):
        side = int(size * 0.5 + 0.5)
        centre = jax.random.randint(axis_key, (count, 1), 0, size + (1 - side % 2))
        start = centre - side // 2
        position = jnp.arange(size)
        inside.append((position >= start) & (position < start + side))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return jnp.where(hole[..., None], 0.0, images)


DIFFAUGMENT: Mapping[str, Operation] = {"color": _colour, "translation": _translation, "cutout": _cutout}
"""The operations of DiffAugment by the names of its policies, in the order in which they are applied."""


def diffaugment(images: Array, key: Array, policy: tuple[str, ...] = tuple(DIFFAUGMENT)) -> Array:
    """Every operation of the policy on every image. Source: Zhao et al. 2020 and its released code."""
    for number, (name, operation) in enumerate(DIFFAUGMENT.items()):
        if name in policy:
            images = operation(images, jax.random.fold_in(key, number))
    return images


# --- ADA --------------------------------------------------------------------------------------------------------------


def ada(images: Array, key: Array, probability: Array) -> Array:
    """ADA's pixel blits, geometric and colour transformations, each applied to an image with `probability`.

    Source: Karras et al. 2020a, Appendix B, with its strengths. Differs: all geometric ones are one affine map, sampled
    once bilinearly from the reflected image, where the original enlarges and filters by wavelets before and after; a
    rotation and mirror image are exact all the same. Hue and saturation leave grey images alone.
    """
    geometry_key, colour_key = jax.random.split(key)
    images = _sampled(images, _affine(geometry_key, images.shape, probability))
    return _recoloured(images, colour_key, probability)


def _drawn(key: Array, count: int, probability: Array, values: Array, neutral: float) -> Array:
    """`values` [B] for the share `probability` of the images, `neutral` for the others."""
    return jnp.where(jax.random.uniform(key, (count,)) < probability, values, neutral)


def _matrix(entries: list[list[Array | float]], count: int) -> Array:
    """[B, 3, 3] of rows of numbers or [B]."""
    return jnp.stack(
        [jnp.stack([jnp.broadcast_to(jnp.asarray(e, jnp.float32), (count,)) for e in row], -1) for row in entries], -2
    )


def _scaling(across: Array, down: Array) -> Array:
    return _matrix([[across, 0.0, 0.0], [0.0, down, 0.0], [0.0, 0.0, 1.0]], len(across))


def _rotation(angle: Array) -> Array:
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    return _matrix([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]], len(angle))


def _quarter_turns(turns: Array) -> Array:
    """Rotations by multiples of 90 degrees with whole entries, so that they move pixels onto pixels."""
    cosine = jnp.array([1.0, 0.0, -1.0, 0.0])[turns]
    sine = jnp.array([0.0, 1.0, 0.0, -1.0])[turns]
    return _matrix([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]], len(turns))


def _translation_matrix(right: Array, down: Array) -> Array:
    return _matrix([[1.0, 0.0, right], [0.0, 1.0, down], [0.0, 0.0, 1.0]], len(right))


def _affine(key: Array, shape: tuple[int, ...], probability: Array) -> Array:
    """[B, 3, 3]: from a pixel's place in the augmented image (from the centre) to where it comes from."""
    count, height, width, _ = shape
    keys = iter(jax.random.split(key, 24))

    def coin(values: Array, neutral: float, chance: Array = probability) -> Array:
        return _drawn(next(keys), count, chance, values, neutral)

    def lognormal(deviation: float) -> Array:
        return jnp.exp2(jax.random.normal(next(keys), (count,)) * deviation)

    mirror = coin(jnp.where(jax.random.bernoulli(next(keys), 0.5, (count,)), -1.0, 1.0), 1.0)
    maps = _scaling(mirror, jnp.ones((count,)))
    turns = coin(jax.random.randint(next(keys), (count,), 0, 4).astype(jnp.float32), 0.0).astype(jnp.int32)
    maps = _quarter_turns(turns) @ maps
    moved = jax.random.uniform(next(keys), (2, count), minval=-0.125, maxval=0.125)
    move = jax.random.uniform(next(keys), (count,)) < probability
    right, down = jnp.where(move, jnp.round(moved * jnp.array([[width], [height]])), 0.0)
    maps = _translation_matrix(right, down) @ maps

    scale = coin(lognormal(0.2), 1.0)
    maps = _scaling(1.0 / scale, 1.0 / scale) @ maps
    # Before and after the squeeze: together the two turns happen with the asked probability.
    either = 1.0 - jnp.sqrt(jnp.clip(1.0 - probability, 0.0, 1.0))
    angle = jax.random.uniform(next(keys), (2, count), minval=-jnp.pi, maxval=jnp.pi)
    maps = _rotation(coin(angle[0], 0.0, either)) @ maps
    squeeze = coin(lognormal(0.2), 1.0)
    maps = _scaling(1.0 / squeeze, squeeze) @ maps
    maps = _rotation(coin(angle[1], 0.0, either)) @ maps
    shift = 0.125 * jax.random.normal(next(keys), (2, count))
    move = jax.random.uniform(next(keys), (count,)) < probability
    right, down = jnp.where(move, shift * jnp.array([[width], [height]]), 0.0)
    return _translation_matrix(right, down) @ maps


def _sampled(images: Array, maps: Array) -> Array:
    """Each image at the places that its affine map [3, 3] says, bilinearly, beyond the border reflected."""
    _, height, width, _ = images.shape
    middle = jnp.array([(width - 1) / 2, (height - 1) / 2])
    down, right = jnp.meshgrid(jnp.arange(height) - middle[1], jnp.arange(width) - middle[0], indexing="ij")
    places = jnp.stack([right, down, jnp.ones_like(right)], -1)  # (H, W, 3)
    exact = lax.Precision.HIGHEST
    sources = jnp.einsum("bkl,hwl->bhwk", maps[:, :2], places, precision=exact) + middle  # (B, H, W, 2)

    def one(image: Array, source: Array) -> Array:
        def channel(plane: Array) -> Array:
            return map_coordinates(plane, [source[..., 1], source[..., 0]], order=1, mode="mirror")

        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images, sources)


def _recoloured(images: Array, key: Array, probability: Array) -> Array:
    """Brightness, contrast, inverted lightness, hue and saturation as one map of colours [B, C, C] and an offset."""
    count, channels = len(images), images.shape[-1]
    keys = iter(jax.random.split(key, 12))

    def coin(values: Array, neutral: float) -> Array:
        return _drawn(next(keys), count, probability, values, neutral)[:, None, None, None]

    images = images + coin(0.2 * jax.random.normal(next(keys), (count,)), 0.0)
    images = images * coin(jnp.exp2(0.5 * jax.random.normal(next(keys), (count,))), 1.0)
    flip = coin(jax.random.bernoulli(next(keys), 0.5, (count,)).astype(jnp.float32), 0.0)
    grey = jnp.mean(images, axis=-1, keepdims=True)
    images = images - 2.0 * flip * grey
    if channels != 3:
        return images
    angle = coin(jax.random.uniform(next(keys), (count,), minval=-jnp.pi, maxval=jnp.pi), 0.0)
    images = _hue_rotated(images, angle)
    saturation = coin(jnp.exp2(jax.random.normal(next(keys), (count,))), 1.0)
    grey = jnp.mean(images, axis=-1, keepdims=True)
    return grey + (images - grey) * saturation


def _hue_rotated(images: Array, angle: Array) -> Array:
    """Colours turned about the grey axis (1, 1, 1) by `angle` [B, 1, 1, 1] (Rodrigues' formula)."""
    axis = jnp.full((3,), 1.0 / jnp.sqrt(3.0))
    along = jnp.sum(images * axis, axis=-1, keepdims=True) * axis
    across = jnp.cross(jnp.broadcast_to(axis, images.shape), images)
    return images * jnp.cos(angle) + across * jnp.sin(angle) + along * (1.0 - jnp.cos(angle))


def adapted_probability(probability: Array, sign_mean: Array, *, target: float, images: int, thousands: float) -> Array:
    """The probability after `images` more images: one step up if r_t = E[sign D(x)] is above the target, else down.

    A step is images / (1000 thousands), so that the probability goes from 0 to 1 in `thousands` thousand images.
    Source: Karras et al. 2020a, Section 3.2 (500 thousand images).
    """
    step = jnp.sign(sign_mean - target) * images / (1000.0 * thousands)
    return jnp.clip(probability + step, 0.0, 1.0)


def mixed_with_fakes(real: Array, fake: Array, key: Array, probability: Array) -> Array:
    """APA: with `probability` a real sample is replaced by a fake one, which the discriminator is to take for real.

    Source: Jiang et al. 2021, Section 3.2.
    """
    deceive = jax.random.uniform(key, (len(real), *(1,) * (real.ndim - 1))) < probability
    return jnp.where(deceive, lax.stop_gradient(fake), real)
