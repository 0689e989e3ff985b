"""The Inception network of December 2015, on whose features FID and the Inception Score are defined.

TensorFlow published it as `inception-2015-12-05`. It is not the Inception v3 of image libraries: its average pools
leave the padding out of the count, the last block pools by maximum, and it has 1008 logits. Only scores from exactly
these weights may be called FID or IS, so the extractor of any other file gets another name.

**Shapes** images: uint8 [B, H, W, C], C = 1 (repeated to three channels) or 3. Inside: float32 [B, 299, 299, 3] in
[-1, 1]. pool3: [B, 2048], at least 0. logits: [B, 1008].

**Source** Szegedy et al. 2016 (Inception v3); Heusel et al. 2017 (FID); Salimans et al. 2016 (Inception Score).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from stabletrain.errors import ConfigError, DataError, nearest
from stabletrain.metrics.weights import INCEPTION, find_inception, sha256_of
from stabletrain.nn.torch_file import read_arrays
from stabletrain.random_keys import random_key

SIZE = 299
FEATURES = 2048
LOGITS = 1008
BATCH_NORM_EPSILON = 1e-3
NAME = "inception2015"
RESIZES = ("tf1-bilinear", "pytorch-fid")

# Every product in full float32. Accelerators would otherwise round the factors (TF32: 10 bits), and FID would move.
PRECISION = lax.Precision.HIGHEST


# --- input ----------------------------------------------------------------------------------------------------


def preprocess(images: jax.Array, resize: str = "tf1-bilinear") -> jax.Array:
    """uint8 [B, H, W, C] -> float32 [B, 299, 299, 3] in [-1, 1].

    `tf1-bilinear`: what the published graph does: corners of pixels aligned (output i looks at i * H / 299), no
    antialiasing, then (x - 128) / 128, so that 255 becomes 0.9921875.
    `pytorch-fid`: what pytorch-fid does with the same weights: centres of pixels aligned (output i looks at
    (i + 1/2) * H / 299 - 1/2, at least 0), no antialiasing, then 2 x / 255 - 1. The two give different scores.

    Raises: `ConfigError` for another `resize`; `DataError` unless images are uint8 of one or three channels.
    """
    if resize not in RESIZES:
        raise ConfigError(f"unknown resize {resize!r}: {nearest(resize, RESIZES)}")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != jnp.uint8:
        raise DataError(
            "the Inception takes uint8 images [B, H, W, 1] or [B, H, W, 3], "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    pixels = images.astype(jnp.float32)
    pixels = _resize_axis(pixels, 2, resize)  # columns first, as in TensorFlow's kernel: the order is part of rounding
    pixels = _resize_axis(pixels, 1, resize)
    return (pixels - 128) / 128 if resize == "tf1-bilinear" else 2 * (pixels / 255) - 1


def _resize_axis(pixels: jax.Array, axis: int, resize: str) -> jax.Array:
    length = pixels.shape[axis]
    if length == SIZE:
        return pixels
    scale = np.float32(length) / np.float32(SIZE)
    position = np.arange(SIZE, dtype=np.float32) * scale
    if resize == "pytorch-fid":
        position = np.maximum((np.arange(SIZE, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    below = np.minimum(position.astype(np.int32), length - 1)
    above = np.minimum(below + 1, length - 1)
    shape = [1] * pixels.ndim
    shape[axis] = SIZE
    weight = (position - below).astype(np.float32).reshape(shape)
    low, high = (jnp.take(pixels, index, axis=axis) for index in (below, above))
    return low + (high - low) * weight


# --- layers ---------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with stored statistics, ReLU. All five arrays are parameters."""

    features: int
    size: int | tuple[int, int] = 1
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        # Variance-preserving under ReLU: random weights are for tests and timing, and should give usable numbers.
        kernel = self.param("kernel", nn.initializers.he_normal(), (*size, images.shape[-1], self.features))
        scale = self.param("scale", ones, (self.features,))
        bias = self.param("bias", zeros, (self.features,))
        mean = self.param("mean", zeros, (self.features,))
        variance = self.param("variance", ones, (self.features,))
        images = lax.conv_general_dilated(
            images,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=PRECISION,
        )
        factor = scale * lax.rsqrt(variance + BATCH_NORM_EPSILON)
        return nn.relu(images * factor + (bias - mean * factor))


def max_pool(images: jax.Array) -> jax.Array:
    """The largest of each 3 x 3 window with stride 2, windows inside the image.

    Pools are taken along one axis and then the other, as slices: XLA:CPU runs its window operation 3 to 6 times slower.
    """
    for axis in (1, 2):
        last = images.shape[axis] - 2
        parts = [lax.slice_in_dim(images, i, last + i, 2, axis) for i in range(3)]
        images = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return images


def max_pool_same(images: jax.Array) -> jax.Array:
    """The largest of each 3 x 3 window with stride 1, over those of its pixels that lie in the image."""
    for axis in (1, 2):
        before, after = _neighbours(images, axis, -jnp.inf)
        images = jnp.maximum(jnp.maximum(before, images), after)
    return images


def average_pool(images: jax.Array) -> jax.Array:
    """The mean of each 3 x 3 window with stride 1, over those of its pixels that lie in the image."""
    for axis in (1, 2):
        before, after = _neighbours(images, axis, 0)
        length = images.shape[axis]
        count = 3.0 - (np.arange(length) == 0) - (np.arange(length) == length - 1)
        count = count.reshape([length if i == axis else 1 for i in range(images.ndim)])
        images = (before + images + after) / count.astype(images.dtype)
    return images


def _neighbours(images: jax.Array, axis: int, outside: float) -> tuple[jax.Array, jax.Array]:
    """For each pixel the one before and the one behind it along `axis`."""
    edge = jnp.full_like(lax.slice_in_dim(images, 0, 1, axis=axis), outside)
    length = images.shape[axis]
    before = jnp.concatenate([edge, lax.slice_in_dim(images, 0, length - 1, axis=axis)], axis)
    after = jnp.concatenate([lax.slice_in_dim(images, 1, length, axis=axis), edge], axis)
    return before, after


class InceptionA(nn.Module):
    """35 x 35: 1 x 1, 5 x 5, two 3 x 3, pool."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(64, name="branch1x1")(x)
        five = ConvNorm(48, name="branch5x5_1")(x)
        five = ConvNorm(64, 5, name="branch5x5_2")(five)
        three = ConvNorm(64, name="branch3x3dbl_1")(x)
        three = ConvNorm(96, 3, name="branch3x3dbl_2")(three)
        three = ConvNorm(96, 3, name="branch3x3dbl_3")(three)
        pool = ConvNorm(self.pool_features, name="branch_pool")(average_pool(x))
        return jnp.concatenate([one, five, three, pool], -1)


class InceptionB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(384, 3, 2, "VALID", name="branch3x3")(x)
        double = ConvNorm(64, name="branch3x3dbl_1")(x)
        double = ConvNorm(96, 3, name="branch3x3dbl_2")(double)
        double = ConvNorm(96, 3, 2, "VALID", name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, max_pool(x)], -1)


class InceptionC(nn.Module):
    """17 x 17: 1 x 1, 7 x 7 in two factors, twice 7 x 7 in four factors, pool."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 7), (7, 1)
        one = ConvNorm(192, name="branch1x1")(x)
        seven = ConvNorm(self.inner, name="branch7x7_1")(x)
        seven = ConvNorm(self.inner, row, name="branch7x7_2")(seven)
        seven = ConvNorm(192, column, name="branch7x7_3")(seven)
        double = ConvNorm(self.inner, name="branch7x7dbl_1")(x)
        double = ConvNorm(self.inner, column, name="branch7x7dbl_2")(double)
        double = ConvNorm(self.inner, row, name="branch7x7dbl_3")(double)
        double = ConvNorm(self.inner, column, name="branch7x7dbl_4")(double)
        double = ConvNorm(192, row, name="branch7x7dbl_5")(double)
        pool = ConvNorm(192, name="branch_pool")(average_pool(x))
        return jnp.concatenate([one, seven, double, pool], -1)


class InceptionD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(192, name="branch3x3_1")(x)
        three = ConvNorm(320, 3, 2, "VALID", name="branch3x3_2")(three)
        seven = ConvNorm(192, name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, 3, 2, "VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, max_pool(x)], -1)


class InceptionE(nn.Module):
    """8 x 8. The second of the two pools by maximum: an oddity of the 2015 graph, and part of FID's definition."""

    pool_by_maximum: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 3), (3, 1)
        one = ConvNorm(320, name="branch1x1")(x)
        three = ConvNorm(384, name="branch3x3_1")(x)
        three_row = ConvNorm(384, row, name="branch3x3_2a")(three)
        three_column = ConvNorm(384, column, name="branch3x3_2b")(three)
        double = ConvNorm(448, name="branch3x3dbl_1")(x)
        double = ConvNorm(384, 3, name="branch3x3dbl_2")(double)
        double_row = ConvNorm(384, row, name="branch3x3dbl_3a")(double)
        double_column = ConvNorm(384, column, name="branch3x3dbl_3b")(double)
        pool = max_pool_same(x) if self.pool_by_maximum else average_pool(x)
        pool = ConvNorm(192, name="branch_pool")(pool)
        return jnp.concatenate([one, three_row, three_column, double_row, double_column, pool], -1)


class Inception(nn.Module):
    """Preprocessed images [B, 299, 299, 3] -> (pool3 [B, 2048], logits [B, 1008]). Modules bear the published names."""

    logit_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = ConvNorm(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)  # [B, 149, 149, 32]
        x = ConvNorm(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)  # [B, 147, 147, 32]
        x = ConvNorm(64, 3, name="Conv2d_2b_3x3")(x)
        x = max_pool(x)  # [B, 73, 73, 64]
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)  # [B, 71, 71, 192]
        x = max_pool(x)  # [B, 35, 35, 192]
        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)  # [B, 35, 35, 288]
        x = InceptionB(name="Mixed_6a")(x)  # [B, 17, 17, 768]
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        x = InceptionC(192, name="Mixed_6e")(x)
        x = InceptionD(name="Mixed_7a")(x)  # [B, 8, 8, 1280]
        x = InceptionE(False, name="Mixed_7b")(x)
        x = InceptionE(True, name="Mixed_7c")(x)  # [B, 8, 8, 2048]
        pool3 = jnp.mean(x, (1, 2))
        return pool3, nn.Dense(LOGITS, use_bias=self.logit_bias, precision=PRECISION, name="fc")(pool3)


# --- weights --------------------------------------------------------------------------------------------------

ARRAY_OF = {
    "conv.weight": "kernel",
    "bn.weight": "scale",
    "bn.bias": "bias",
    "bn.running_mean": "mean",
    "bn.running_var": "variance",
}
COUNTER = "bn.num_batches_tracked"  # of training; no result depends on it


@functools.cache
def parameter_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path of each parameter -> its shape."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    shapes = jax.eval_shape(Inception().init, random_key(0), images)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def random_parameters(seed: int = 0) -> Any:
    """Weights for tests and timing; scores from them mean nothing."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, shape in parameter_shapes().items():
        match path[-1]:
            case "kernel":
                values = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
            case "scale" | "variance":
                values = rng.uniform(0.5, 1.5, shape)
            case _:
                values = rng.normal(0, 0.1, shape)
        params[path] = values.astype(np.float32)
    return unflatten_dict(params)


def published_name(path: tuple[str, ...]) -> str:
    """The name that the published file has for a parameter: `Mixed_5b.branch1x1.conv.weight`, `fc.bias`."""
    *modules, array = path
    if modules == ["fc"]:
        return f"fc.{'weight' if array == 'kernel' else 'bias'}"
    return ".".join([*modules, next(theirs for theirs, ours in ARRAY_OF.items() if ours == array)])


def to_published(params: Any) -> dict[str, NDArray[np.float32]]:
    """The arrays under the published names and in PyTorch's layout: kernels [out, in, h, w]."""
    arrays = {}
    for path, leaf in flatten_dict(params).items():
        array = np.asarray(leaf)
        arrays[published_name(path)] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return arrays


def from_published(arrays: dict[str, np.ndarray], source: str = "the weights") -> Any:
    """The parameters, from arrays under the published names. Counters of batches are left out.

    Raises: `DataError` when a name is missing or not known, or when a shape is another.
    """
    params = {}
    left = {name for name in arrays if not name.endswith(COUNTER)}
    for path, shape in parameter_shapes().items():
        name = published_name(path)
        if name not in arrays:
            raise DataError(f"{source} has no {name}: it is not the 2015 Inception ({_hint(arrays)})")
        array = arrays[name]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if array.shape != shape:
            theirs = arrays[name].shape
            raise DataError(f"{source}: {name} has shape {theirs}, which is not the 2015 Inception's ({_hint(arrays)})")
        params[path] = np.ascontiguousarray(array, np.float32)
        left.discard(name)
    if left:
        raise DataError(f"{source} holds {len(left)} arrays that the 2015 Inception does not have: {min(left)}, ...")
    return unflatten_dict(params)


def _hint(arrays: dict[str, np.ndarray]) -> str:
    classes = arrays["fc.weight"].shape[0] if "fc.weight" in arrays else None
    if classes == 1000:
        return "1000 classes: torchvision's Inception v3 is another network"
    return f"wanted: {INCEPTION.file_name}"


# --- the extractor --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InceptionExtractor:
    """Features and logits of images, in batches of one size on all devices of this process.

    Memory is bounded by the batch, whatever the number of images: see `default_batch_size`.
    """

    name: str
    """`inception2015` for the published weights and no others."""
    sha256: str
    """Of the weights file."""
    params: Any
    resize: str = "tf1-bilinear"
    logit_bias: bool = False
    """Whether logits include the bias. The Inception Score's code (Salimans et al. 2016) left it out."""
    batch_size: int = 0
    """Images at a time, over all devices; 0 chooses `default_batch_size`."""
    max_devices: int = 0
    """Devices to use at most; 0 for all of this process that divide the batch."""
    _placed: dict[Any, Any] = field(default_factory=dict, repr=False)
    """The parameters on the devices of a mesh, put there once."""

    def features(self, images: np.ndarray) -> NDArray[np.float32]:
        """uint8 [B, H, W, C] -> pool3 [B, 2048]. Raises: `DataError` for images of another kind."""
        return self.outputs(images)[0]

    def logits(self, images: np.ndarray) -> NDArray[np.float32]:
        """uint8 [B, H, W, C] -> [B, 1008]. Raises: `DataError` for images of another kind."""
        return self.outputs(images)[1]

    def outputs(self, images: np.ndarray) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(features, logits) for the price of one."""
        images = np.asarray(images)
        batch_size = self.batch_size or default_batch_size()
        features = np.empty((len(images), FEATURES), np.float32)
        logits = np.empty((len(images), LOGITS), np.float32)
        params, sharding = self._on_devices(batch_size)
        if not len(images):
            preprocess(jnp.zeros((1, *images.shape[1:]), images.dtype), self.resize)  # complains where it should
        previous: tuple[slice, Any] | None = None
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            where = slice(start, start + len(batch))
            padding = np.zeros((batch_size - len(batch), *images.shape[1:]), images.dtype)
            batch = jax.device_put(np.concatenate([batch, padding]), sharding)
            result = _forward(params, batch, self.resize, self.logit_bias)
            if previous is not None:  # fetched while the device works on the next batch
                self._fetch(*previous, features, logits)
            previous = (where, result)
        if previous is not None:
            self._fetch(*previous, features, logits)
        return features, logits

    def _fetch(self, where: slice, result: Any, features: np.ndarray, logits: np.ndarray) -> None:
        count = where.stop - where.start
        features[where], logits[where] = (np.asarray(part)[:count] for part in result)

    def _on_devices(self, batch_size: int) -> tuple[Any, NamedSharding]:
        devices = _devices(batch_size, self.max_devices)
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        if mesh not in self._placed:
            self._placed[mesh] = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return self._placed[mesh], NamedSharding(mesh, PartitionSpec("data"))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _forward(params: Any, images: jax.Array, resize: str, logit_bias: bool) -> tuple[jax.Array, jax.Array]:
    outputs: Any = Inception(logit_bias).apply({"params": params}, preprocess(images, resize))
    return outputs


def default_batch_size() -> int:
    """32 on CPU (no size is faster, and the process stays below 1 GiB), 128 for each accelerator."""
    return 32 if jax.default_backend() == "cpu" else 128 * jax.local_device_count()


def _devices(batch_size: int, limit: int) -> Sequence[jax.Device]:
    """As many devices as divide the batch, at most `limit`."""
    devices = jax.local_devices()
    most = min(limit or len(devices), len(devices))
    return devices[: max(count for count in range(1, most + 1) if batch_size % count == 0)]


def load_inception(path: str | Path | None = None, *, resize: str = "tf1-bilinear") -> InceptionExtractor:
    """The extractor, from the file that `find_inception` finds.

    A file with another hash than the published one's gives an extractor called `inception-custom-<8 hex>`.

    Raises: `DataError` when no file is found, or when it does not hold this network; `ConfigError` for `resize`.
    """
    if resize not in RESIZES:
        raise ConfigError(f"unknown resize {resize!r}: {nearest(resize, RESIZES)}")
    file = find_inception(None if path is None else str(path))
    sha256 = sha256_of(file)
    params = from_published(read_arrays(file), str(file))
    name = NAME if sha256 == INCEPTION.sha256 else f"inception-custom-{sha256[:8]}"
    return InceptionExtractor(name, sha256, params, resize)
