"""RevCol: copies of one small pyramid, chained so that each map can be undone from the next.

Yuxuan Cai et al., "Reversible Column Networks", ICLR 2023, arXiv:2212.11696. Follows the authors'
PyTorch code (megvii-research/RevCol, `models/revcol.py` and `models/revcol_huge.py`), with these
differences:

* The gain alpha of each column is clamped where it is used; there, every forward pass writes the
  clamped value into the parameter, which the optimizer then sees.
* Any sides from 32 pixels on work, as in the authors' copies for segmentation, which stretch a
  deeper map to the size of the one it is added to; in the others that addition fails. With
  intermediate supervision, whose pictures have the size of whole cells, 32 has to divide them.
* Intermediate supervision takes 4, 8, 12, … columns; there, other numbers fail inside.
* A map is kept in `dtype`; there, under mixed precision, it is float32, as it is here where the
  network is `reversible`.
* The reversible backward pass keeps the maps of every third column, or of the last one alone;
  there, those of every column. The paper's constant memory is that of the last one alone, which
  float32 bears for few columns: see `ops/reversible.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import scan_blocks
from hybrid_vit.models.registry import FeatureSpec, Published, imagenet_preprocessing, register
from hybrid_vit.ops.reversible import inverse_errors, reversible_sequence

# The authors cut the draw at +-2, a hundred deviations: plain normal.
_INIT = nn.initializers.normal(0.02)
_LAYER_NORM_EPSILON = 1e-6
_ALPHA_INIT = 0.5
_ALPHA_FLOOR = 1e-3
_LEVELS = 4
# Of the deepest level's map.
_STRIDE = 32
# Columns are cut in quarters; after each but the last comes one auxiliary head and one decoder.
_QUARTERS = 4
# Up to here reconstructions come from a decoder of several steps, above from one projection.
_MOST_CLASSES_OF_STEP_DECODER = 1000

Maps = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class RevCol(nn.Module):
  """The RevCol network with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]`, both sides at least 32, and returns logits `[B, num_classes]`
  in float32 (None when `num_classes` is 0) and the endpoints: "stem";
  "column0_level0" and so on, the map of every level of every column; "stage1" to "stage4", the maps
  of the last column; "pre_logits" `[B, C]` (the mean over the deepest map; with a classifier,
  after its layer norm). With intermediate supervision also, in float32, "auxiliary_logits0" to
  "auxiliary_logits2" `[B, num_classes]` and "reconstruction0" to "reconstruction2" `[B, H, W, 3]`,
  logits of the picture's intensities in [0, 1].

  Attributes:
    widths: channels of the four levels.
    depths: blocks of the four levels.
    num_columns: copies of the pyramid.
    num_classes: 0 for no classifier: neither norm nor head.
    intermediate_supervision: heads and decoders after each quarter of the columns (section 3.3).
    bottom_to_top: the first level also takes the previous column's deepest map, as in the largest
      network.
    kernel_size: of the depthwise convolutions, odd.
    expansion: width inside a block over its output's.
    layer_scale_init: where the blocks' layer scale begins.
    head_init_scale: factor of the classifier's first kernel; fine-tuning takes 0.001.
    drop_path_rate: of the last block of every column; its first has 0, evenly between.
    remat: recompute each level in the backward pass instead of storing its inside.
    scan_blocks: all columns but the first as the turns of a loop, see `models/blocks.py`.
    reversible: in training, rebuild every column's maps from the next one's (section 3.2, and
      `ops/reversible.py`), so that of all columns' activations only the maps that `keep_every`
      says are kept. Of the endpoints of single columns there is none then. Maps are float32, in
      evaluation, too.
    keep_every: of `reversible`: after how many columns their maps are kept, so that rounding starts
      afresh; 0 to keep the last column's alone.
    dtype: of the computation; parameters, norm statistics and gains are float32.

  Every level's sides are those of the level above, halved and rounded down; the first has H // 4.

  Raises (in a call):
    ValueError: sides below 32, or with intermediate supervision such that 32 does not divide, or
      attributes that do not fit together.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  num_columns: int
  num_classes: int = 1000
  intermediate_supervision: bool = False
  bottom_to_top: bool = False
  kernel_size: int = 3
  expansion: int = 4
  layer_scale_init: float = 1e-6
  head_init_scale: float = 1.0
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_blocks: bool = False
  reversible: bool = False
  keep_every: int = 3
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of the last column's levels."""
    return tuple(FeatureSpec(f"stage{i + 1}", 4 * 2**i, w) for i, w in enumerate(self.widths))

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check(images.shape)
    endpoints: dict[str, jax.Array] = {}
    stem = Stem(self.widths[0], self.dtype, name="stem")(images.astype(self.dtype))
    endpoints["stem"] = stem

    if self.reversible and train and self.num_columns > 1 and not self.is_initializing():
      maps, quarters = self._reversed_columns(stem)
    else:
      maps, quarters = self._columns(stem, train, endpoints)
    for part, deepest in enumerate(quarters):
      head = AuxiliaryHead(self.num_classes, name=f"auxiliary_head{part}")
      endpoints[f"auxiliary_logits{part}"] = head(deepest)
      endpoints[f"reconstruction{part}"] = self._decoder(part)(deepest)
    endpoints |= {f"stage{level + 1}": x for level, x in enumerate(maps)}

    x = maps[-1].mean((1, 2), dtype=jnp.float32)
    logits = None
    if self.num_classes:
      x = layers.layer_norm(_LAYER_NORM_EPSILON, jnp.float32, "head_norm")(x)
      logits = _classifier(self.num_classes, self.head_init_scale, "head")(x)
    endpoints["pre_logits"] = x
    return logits, endpoints

  def inverse_errors(self, images: jax.Array) -> jax.Array:
    """How well the maps before each column but the first are rebuilt from those after the last.

    Args:
      images: `[B, H, W, 3]`.

    Returns:
      `[num_columns - 1, 4]`, float32, relative; see `ops.reversible.inverse_errors`.
    """
    parameters = self.variables["params"]
    stem = Stem(self.widths[0], self.dtype, parent=None)
    shared = stem.apply({"params": parameters["stem"]}, images.astype(self.dtype))
    first = self._column(parent=None)
    maps = first.apply({"params": parameters["column0"]}, shared, None, False)
    key, every = jax.random.key(0), self.keep_every or None
    return inverse_errors(*self._sequence(False), shared, maps, key, keep_every=every)

  def _columns(
    self, stem: jax.Array, train: bool, endpoints: dict[str, jax.Array]
  ) -> tuple[Maps, list[jax.Array]]:
    """The last column's maps, and the deepest ones at the quarters; adds every map's endpoint."""
    maps = self._column(name="column0")(stem, None, train)
    columns = [maps]
    names = [f"column{i}" for i in range(1, self.num_columns)]
    if self.scan_blocks and names and not self.is_initializing():

      def call(column: Any, maps: Maps) -> Maps:
        new: Maps = column(stem, maps, train)
        return new

      arguments = [self._column_arguments()] * len(names)
      columns += scan_blocks(self, Column, names, arguments, 1, maps, call, remat=False)
    else:
      for name in names:
        columns.append(self._column(name=name)(stem, columns[-1], train))
    for i, maps in enumerate(columns):
      endpoints |= {f"column{i}_level{level}": x for level, x in enumerate(maps)}
    return columns[-1], [columns[i][-1] for i in self._quarters()]

  def _reversed_columns(self, stem: jax.Array) -> tuple[Maps, list[jax.Array]]:
    """As `_columns`, in training: only the last column's maps are kept."""
    first_class = nn.remat(Column, static_argnums=(3,))
    first = self._column(first_class, name="column0")(stem, None, True)
    key = self.make_rng("dropout") if self.drop_path_rate else jax.random.key(0)
    taps = [(i - 1, _LEVELS - 1) for i in self._quarters() if i]
    (c0, c1, c2, c3), tapped = reversible_sequence(
      *self._sequence(True),
      stem,
      first,
      key,
      taps,
      keep_every=self.keep_every or None,
      scan=self.scan_blocks,
    )
    quarters = ([first[-1]] if 0 in self._quarters() else []) + list(tapped)
    return (c0, c1, c2, c3), quarters

  def _sequence(self, train: bool) -> tuple[Any, Any, Any]:
    """Functions, parameters and gains of the levels of all columns but the first."""
    level_classes = self._column(parent=None).levels()
    functions = tuple(_level_function(level, self.bottom_to_top, train) for level in level_classes)
    numbers = range(1, self.num_columns)
    columns = [self.variables["params"][f"column{i}"] for i in numbers]
    parameters = [[column[f"level{j}"] for j in range(_LEVELS)] for column in columns]
    gains = [[clamp_alpha(column[f"alpha{j}"]) for j in range(_LEVELS)] for column in columns]
    return [functions for _ in numbers], parameters, gains

  def _quarters(self) -> range:
    """Numbers of the columns after which a head and a decoder come."""
    if not self.intermediate_supervision:
      return range(0)
    interval = self.num_columns // _QUARTERS
    return range(interval - 1, self.num_columns - 1, interval)

  def _column(self, column_class: Any = None, **place: Any) -> Any:
    return (column_class or Column)(**self._column_arguments(), **place)

  def _column_arguments(self) -> dict[str, Any]:
    return {
      "widths": self.widths,
      "depths": self.depths,
      "kernel_size": self.kernel_size,
      "expansion": self.expansion,
      "bottom_to_top": self.bottom_to_top,
      "layer_scale_init": self.layer_scale_init,
      "drop_path_rate": self.drop_path_rate,
      "remat": self.remat,
      "dtype": self.dtype,
      "map_dtype": jnp.float32 if self.reversible else self.dtype,
    }

  def _decoder(self, part: int) -> nn.Module:
    name = f"decoder{part}"
    if self.num_classes <= _MOST_CLASSES_OF_STEP_DECODER:
      return StepDecoder(self.widths, self.layer_scale_init, self.dtype, name=name)
    return ProjectionDecoder(_STRIDE, self.dtype, name=name)

  def _check(self, shape: tuple[int, ...]) -> None:
    for name in ("widths", "depths"):
      if len(getattr(self, name)) != _LEVELS:
        raise ValueError(
          f"RevCol: a column has {_LEVELS} levels, but {name} has {getattr(self, name)}"
        )
    if self.num_columns < 1:
      raise ValueError(f"RevCol: num_columns is {self.num_columns}; there must be at least one")
    if self.reversible and self.remat:
      raise ValueError(
        "RevCol: remat and reversible both make the backward pass compute anew; give one of them"
      )
    if self.keep_every < 0:
      raise ValueError(f"RevCol: keep_every is {self.keep_every}; 0 or more was expected")
    if self.kernel_size % 2 == 0:
      raise ValueError(f"RevCol: kernel_size is {self.kernel_size}; it must be odd")
    if self.intermediate_supervision and self.num_columns % _QUARTERS:
      raise ValueError(
        f"RevCol: intermediate_supervision cuts the columns in {_QUARTERS} parts; num_columns is "
        f"{self.num_columns}, which {_QUARTERS} does not divide"
      )
    if self.intermediate_supervision and not self.num_classes:
      raise ValueError("RevCol: intermediate_supervision needs num_classes; it is 0")
    if min(shape[1:3]) < _STRIDE:
      raise ValueError(
        f"RevCol: the image is {shape[1]} x {shape[2]}; both sides must be at least {_STRIDE}"
      )
    if self.intermediate_supervision and (shape[1] % _STRIDE or shape[2] % _STRIDE):
      raise ValueError(
        f"RevCol: the image is {shape[1]} x {shape[2]}; with intermediate_supervision both sides "
        f"must be multiples of {_STRIDE}, so that the pictures reconstructed are as large"
      )


def clamp_alpha(alpha: jax.Array) -> jax.Array:
  """`alpha` at least 1e-3 away from 0, its sign kept; an exact 0 stays 0 (paper, section 3.2).

  The gradient passes unchanged, as if the clamped value were the parameter.
  """
  clamped = jnp.sign(alpha) * jnp.maximum(jnp.abs(alpha), _ALPHA_FLOOR)
  return jax.lax.stop_gradient(clamped) + (alpha - jax.lax.stop_gradient(alpha))


class Column(nn.Module):
  """One copy of the pyramid: each level's new map is its gain times its old map plus a level.

  Attributes as in `RevCol`, and
    map_dtype: of the maps that come out; None for that of the computation.
  """

  widths: Sequence[int]
  depths: Sequence[int]
  kernel_size: int
  expansion: int
  bottom_to_top: bool
  layer_scale_init: float
  drop_path_rate: float
  remat: bool
  dtype: Any
  map_dtype: Any = None

  def levels(self) -> list["Level"]:
    """The levels as modules of no place, for `Level.apply`."""
    return [Level(**arguments, parent=None) for arguments in self._level_arguments()]

  def _level_arguments(self) -> list[dict[str, Any]]:
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    return [
      {
        "width": width,
        "downsample": i > 0,
        "kernel_size": self.kernel_size,
        "expansion": self.expansion,
        "layer_scale_init": self.layer_scale_init,
        "drop_path_rates": tuple(rates[i]),
        "dtype": self.dtype,
      }
      for i, width in enumerate(self.widths)
    ]

  @nn.compact
  def __call__(self, stem: jax.Array, maps: Maps | None, train: bool) -> Maps:
    """The stem's map and the previous column's maps to this column's maps.

    Args:
      stem: `[B, H / 4, W / 4, C0]`.
      maps: of levels 0 to 3, each half the sides of the one before, rounded down; None for the
        first column, which has gains too, though nothing to apply them to.
      train: whether drop path is on.
    """
    level_class = nn.remat(Level, static_argnums=(4,)) if self.remat else Level
    map_dtype = self.map_dtype or self.dtype
    new: list[jax.Array] = []
    x = stem
    for i, arguments in enumerate(self._level_arguments()):
      width = self.widths[i]
      alpha = self.param(f"alpha{i}", nn.initializers.constant(_ALPHA_INIT), (width,), jnp.float32)
      below = maps[i + 1] if maps is not None and i + 1 < _LEVELS else None
      deepest = maps[-1] if maps is not None and self.bottom_to_top and i == 0 else None
      x = level_class(**arguments, name=f"level{i}")(x, below, deepest, train)
      if maps is not None:
        x = clamp_alpha(alpha) * maps[i].astype(jnp.float32) + x
      x = x.astype(map_dtype)
      new.append(x)
    return new[0], new[1], new[2], new[3]


class Level(nn.Module):
  """The fusion of maps of the levels around (section 3.1), then blocks.

  Attributes:
    width: channels.
    downsample: halve the map that comes from above.
    kernel_size: see `RevCol`.
    expansion: see `RevCol`.
    layer_scale_init: see `RevCol`.
    drop_path_rates: one for each block.
    dtype: of the computation.
  """

  width: int
  downsample: bool
  kernel_size: int
  expansion: int
  layer_scale_init: float
  drop_path_rates: Sequence[float]
  dtype: Any

  @nn.compact
  def __call__(
    self, above: jax.Array, below: jax.Array | None, deepest: jax.Array | None, train: bool
  ) -> jax.Array:
    """Maps to this level's contribution `[B, h, w, width]`.

    Args:
      above: this column's map of the level above, or the stem's.
      below: the previous column's map of the level below, `[B, h // 2, w // 2, C]`, or None.
      deepest: the previous column's last map, `[B, h // 8, w // 8, C]`, or None.
      train: whether drop path is on.
    """
    x = above
    if self.downsample:
      x = layers.Conv(
        self.width,
        (2, 2),
        strides=2,
        padding="VALID",
        kernel_init=_INIT,
        dtype=self.dtype,
        name="down_conv",
      )(x)
      x = layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, "down_norm")(x)
    size = (x.shape[1], x.shape[2])
    if below is not None:
      x = x + Up(self.width, size, self.dtype, name="up")(below)
    if deepest is not None:
      x = x + Up(self.width, size, self.dtype, name="deepest_up")(deepest)
    for i, rate in enumerate(self.drop_path_rates):
      x = layers.ConvNeXtBlock(
        kernel_size=self.kernel_size,
        hidden=self.expansion * self.width,
        layer_scale_init=self.layer_scale_init,
        layer_norm_epsilon=_LAYER_NORM_EPSILON,
        drop_path_rate=rate,
        kernel_init=_INIT,
        dtype=self.dtype,
        name=f"block{i}",
      )(x, train)
    return x


def _level_function(level: Level, bottom_to_top: bool, train: bool) -> Callable[..., jax.Array]:
  """A level as `ops.reversible` takes it."""

  def apply(parameters: Any, stem: Any, above: Any, below: Any, key: jax.Array) -> Any:
    deepest = below[-1] if bottom_to_top and not above else None
    return level.apply(
      {"params": parameters},
      above[-1] if above else stem,
      below[0] if below else None,
      deepest,
      train,
      rngs={"dropout": key},
    )

  return apply


class Up(nn.Module):
  """A dense layer and a layer norm, then the map stretched to `size`, see `stretch_nearest`."""

  width: int
  size: tuple[int, int]
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.PointwiseConv(self.width, kernel_init=_INIT, dtype=self.dtype, name="dense")(x)
    x = layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, "norm")(x)
    return stretch_nearest(x, self.size)


class Stem(nn.Module):
  """Patches of 4x4 by one convolution, then a layer norm."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.Conv(
      self.width,
      (4, 4),
      strides=4,
      padding="VALID",
      kernel_init=_INIT,
      dtype=self.dtype,
      name="conv",
    )(x)
    return layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, "norm")(x)


class AuxiliaryHead(nn.Module):
  """A classifier of a map: mean, layer norm, dense layer, all in float32."""

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.mean((1, 2), dtype=jnp.float32)
    x = layers.layer_norm(_LAYER_NORM_EPSILON, jnp.float32, "norm")(x)
    return _classifier(self.num_classes, 1.0, "dense")(x)


class StepDecoder(nn.Module):
  """The deepest map to a picture `[B, H, W, 3]` in float32, undoing one level after the other."""

  widths: Sequence[int]
  layer_scale_init: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i, width in enumerate(reversed(self.widths[:-1])):
      x = layers.PointwiseConv(width, kernel_init=_INIT, dtype=self.dtype, name=f"dense{i}")(x)
      x = layers.gelu(layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, f"norm{i}")(x))
      x = layers.ConvNeXtBlock(
        kernel_size=3,
        hidden=width,
        layer_scale_init=self.layer_scale_init,
        layer_norm_epsilon=_LAYER_NORM_EPSILON,
        drop_path_rate=0.0,
        kernel_init=_INIT,
        dtype=self.dtype,
        name=f"block{i}",
      )(upsample_to_corners(x), False)
    return _to_picture(x, 4, self.dtype)


class ProjectionDecoder(nn.Module):
  """The deepest map to a picture `[B, H, W, 3]` in float32, `stride` times as large, at once."""

  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, "norm")(x)
    return _to_picture(x, self.stride, self.dtype)


def stretch_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """`[B, h, w, C]` to `[B, H, W, C]`: cell i of a side takes the cell floor(i h / H).

  That is torch's `interpolate` with `mode="nearest"`; if h divides H, each cell comes H / h times.
  """
  for axis, n in zip((1, 2), size):
    old = x.shape[axis]
    if n % old == 0:
      # A broadcast: its gradient is a sum, that of a gather scatters.
      shape = (*x.shape[: axis + 1], n // old, *x.shape[axis + 1 :])
      x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
      x = x.reshape(*shape[:axis], n, *shape[axis + 2 :])
    else:
      x = x.take(np.arange(n) * old // n, axis)
  return x


def upsample_to_corners(x: jax.Array) -> jax.Array:
  """Doubles both sides of `[B, H, W, C]`, bilinear, the corner cells' centres staying in place.

  That is torch's `align_corners=True`; in float32, the dtype of `x` is kept.
  """
  dtype = x.dtype
  x = x.astype(jnp.float32)
  for axis in (1, 2):
    n = x.shape[axis]
    position = np.arange(2 * n) * ((n - 1) / (2 * n - 1))
    low = np.minimum(position.astype(int), max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    shape = [1] * x.ndim
    shape[axis] = 2 * n
    part = jnp.asarray((position - low).reshape(shape), jnp.float32)
    x = x.take(low, axis) * (1.0 - part) + x.take(high, axis) * part
  return x.astype(dtype)


def _to_picture(x: jax.Array, cell: int, dtype: Any) -> jax.Array:
  """Inside a decoder: each cell becomes `cell` x `cell` pixels of three channels, in float32."""
  x = layers.PointwiseConv(3 * cell * cell, kernel_init=_INIT, dtype=dtype, name="to_pixels")(x)
  batch, height, width, _ = x.shape
  x = x.reshape(batch, height, width, 3, cell, cell).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(batch, height * cell, width * cell, 3).astype(jnp.float32)


def _classifier(num_classes: int, init_scale: float, name: str) -> nn.Dense:
  init = nn.initializers.normal(0.02 * init_scale)
  return nn.Dense(num_classes, kernel_init=init, dtype=jnp.float32, name=name)


def _register_family() -> None:
  readme = "RevCol README"
  sizes: dict[str, dict[str, Any]] = {
    "tiny": {"widths": (64, 128, 256, 512), "depths": (2, 2, 4, 2), "num_columns": 4},
    "small": {"widths": (64, 128, 256, 512), "depths": (2, 2, 4, 2), "num_columns": 8},
    "base": {"widths": (72, 144, 288, 576), "depths": (1, 1, 3, 2), "num_columns": 16},
    "large": {"widths": (128, 256, 512, 1024), "depths": (1, 2, 6, 2), "num_columns": 8},
    "xlarge": {"widths": (224, 448, 896, 1792), "depths": (1, 2, 6, 2), "num_columns": 8},
    "huge": {
      "widths": (360, 720, 1440, 2880),
      "depths": (1, 2, 6, 2),
      "num_columns": 8,
      "bottom_to_top": True,
    },
  }
  # name after "revcol_", classes, drop path, input size, parameters with one head (counted in the
  # authors' code for 1,000 classes; the wider head is arithmetic), multiply-adds in 10^9, top-1
  table: tuple[tuple[Any, ...], ...] = (
    ("tiny", 1000, 0.1, 224, 30456168, 4.5, 82.2, "ImageNet-1K"),
    ("small", 1000, 0.3, 224, 60568424, 9.0, 83.5, "ImageNet-1K"),
    ("base", 1000, 0.4, 224, 138616408, 16.6, 84.1, "ImageNet-1K"),
    ("large", 1000, 0.3, 224, 273095400, 39.0, 86.6, "ImageNet-22K, then 1K"),
    ("xlarge", 1000, 0.4, 384, 833807400, None, 88.2, "top-1 from the abstract; 22K, then 1K"),
    ("huge", 1000, 0.4, 640, 2157600160, 2537.0, 90.0, "168M private pictures, then 1K"),
    ("base_22k", 21841, 0.3, 224, 150641665, None, None, "ImageNet-22K"),
    ("large_22k", 21841, 0.3, 224, 294457425, None, None, "ImageNet-22K"),
    ("xlarge_22k", 21841, 0.4, 224, 871175313, None, None, "ImageNet-22K"),
    ("base_22kto1k", 1000, 0.2, 224, 138616408, 16.6, 85.6, "ImageNet-22K, then 1K"),
    ("base_384_22kto1k", 1000, 0.2, 384, 138616408, 48.9, 86.7, "ImageNet-22K, then 1K"),
    ("large_384_22kto1k", 1000, 0.3, 384, 273095400, 116.0, 87.6, "ImageNet-22K, then 1K"),
  )
  for name, classes, drop_path, image_size, parameters, giga, top1, trained_on in table:
    register(
      f"revcol_{name}",
      RevCol,
      {**sizes[name.split("_")[0]], "num_classes": classes, "drop_path_rate": drop_path},
      preprocessing=imagenet_preprocessing(image_size),
      published=Published(
        parameters=parameters,
        multiply_adds=None if giga is None else round(giga * 1e9),
        top1=top1,
        source=f"{readme}; {trained_on}",
      ),
    )


_register_family()
