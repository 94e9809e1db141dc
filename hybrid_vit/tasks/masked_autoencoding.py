"""Learning without labels: rebuild the hidden patches of a picture (MAE, SimMIM, MaskFeat)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hybrid_vit.data.spec import INDEX, MASK, Field, Spec
from hybrid_vit.models import mae
from hybrid_vit.models.initialization import initial_variables
from hybrid_vit.ops.hog import hog
from hybrid_vit.plots import plot_rows
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables, summed
from hybrid_vit.tasks.pictures import Shrinking, displayable, normalized, shrunk_and_normalized
from hybrid_vit.tasks.registry import Context, register_task
from hybrid_vit.weights.transfer import is_head

TARGETS = ("normalized_pixels", "pixels", "hog")
MASKINGS = ("sparse", "dense")
# Of HOG, as MaskFeat has them.
_CELL, _ORIENTATIONS = 8, 9
# Pictures in a drawing.
_DRAWN = 8
_POSITIONS = "position_embedding"


@dataclasses.dataclass(frozen=True)
class DecoderSettings:
  """`config.task.decoder`, of the sparse form; see `mae.Decoder`."""

  width: int = 512
  depth: int = 8
  num_heads: int = 16


@dataclasses.dataclass(frozen=True)
class MaskedAutoencodingSettings:
  """`config.task`; see `MaskedAutoencoding`. No `masking`: "sparse" where the network can."""

  masking: str | None = None
  mask_ratio: float = 0.75
  target: str = "normalized_pixels"
  decoder: DecoderSettings | None = None
  shrink: Shrinking | None = None

  def __post_init__(self) -> None:
    for name, known in (("masking", MASKINGS), ("target", TARGETS)):
      value = getattr(self, name)
      if value is not None and value not in known:
        raise ValueError(f"config.task.{name} {value!r} is not one of {', '.join(known)}")
    if not 0.0 < self.mask_ratio < 1.0:
      raise ValueError(
        f"config.task.mask_ratio is {self.mask_ratio}; a number between 0 and 1 was expected"
      )


@register_task("masked_autoencoding", MaskedAutoencodingSettings)
def build_masked_autoencoding(
  settings: MaskedAutoencodingSettings, context: Context
) -> MaskedAutoencoding:
  """The task of `config.task.name = "masked_autoencoding"`.

  Raises:
    ValueError: sparse masking of a network that sees whole pictures only, a decoder's settings for
      dense masking, cells of HOG that do not divide a patch, or pictures to be made smaller that
      are then no whole patches.
  """
  model = context.make_network(0)
  name, able = type(model).__name__, getattr(model, "takes_kept", False)
  masking = settings.masking or ("sparse" if able else "dense")
  if masking == "sparse" and not able:
    raise ValueError(
      f"config.task.masking is 'sparse', and {name} sees whole pictures only: take 'dense'"
    )
  patch = model.features[-1].stride
  if settings.shrink is not None:
    if settings.shrink.size % patch:
      raise ValueError(
        f"config.task.shrink.size is {settings.shrink.size}, and {name}'s patches of "
        f"{patch}x{patch} are to be whole: take a multiple"
      )
    mae.visible_patches((settings.shrink.size // patch) ** 2, settings.mask_ratio)
  outputs = 3 * patch**2
  if settings.target == "hog":
    if patch % _CELL:
      raise ValueError(
        f"config.task.target is 'hog', whose cells of {_CELL}x{_CELL} do not divide {name}'s "
        f"patches of {patch}x{patch}: take 'normalized_pixels'"
      )
    outputs = 3 * _ORIENTATIONS * (patch // _CELL) ** 2
  decoder: nn.Module
  if masking == "sparse":
    if model.pool_before_norm:
      # Its only norm is to be one of tokens here; its name is the same.
      model = model.clone(pool_before_norm=False)
    full = context.preprocessing.image_size
    if settings.shrink is not None:
      # Sines are not trained, so the table stays that of the full size, and is read in between.
      here = model.at_size(full, settings.shrink.size)
      model = model.clone(**here)
    own = dataclasses.asdict(settings.decoder or DecoderSettings())
    grid = full // patch
    shared = {name: getattr(model, name) for name in ("remat", "scan_blocks", "dtype")}
    decoder = mae.Decoder(outputs, **own, positions=(grid, grid), **shared)
  elif settings.decoder is not None:
    raise ValueError("config.task.decoder is of sparse masking; the dense form has a linear layer")
  else:
    decoder = mae.DenseDecoder(outputs, patch)
  return MaskedAutoencoding(
    model=model,
    decoder=decoder,
    masking=masking,
    mask_ratio=settings.mask_ratio,
    target=settings.target,
    mean=tuple(context.preprocessing.mean),
    std=tuple(context.preprocessing.std),
    shrink=settings.shrink,
  )


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding:
  """Rebuilds hidden patches of images `[B, H, W, 3]`; no labels.

  A patch is a cell of the network's last map. In the sparse form (MAE) the network sees the visible
  patches only; its positions are fixed sines. In the dense form (SimMIM) it sees the picture with a
  trained patch in the hidden places. The loss is the mean squared error of the hidden patches.

  The parameters are the network's, under its own names and without a head, and "decoder": they
  start a classification through `config.init_from` with `config.reinitialize_head`.

  Attributes:
    model: the network without a head.
    decoder: see `hybrid_vit.models.mae`.
    masking: "sparse" or "dense".
    mask_ratio: part of the patches that is hidden.
    target: "normalized_pixels" (each patch by its own mean and deviation), "pixels" (of the
      normalised picture) or "hog" (9 orientations, cells of 8).
    mean: per channel.
    std: per channel.
    shrink: to what size training pictures are brought first, or None.
  """

  model: Any
  decoder: Any
  masking: str
  mask_ratio: float
  target: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  shrink: Shrinking | None = None
  separable: bool = True

  @property
  def spec(self) -> Spec:
    """A picture of the transform's size."""
    fields = {"image": Field("image", shape=(None, None, 3))}
    return Spec(fields, fields)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`; the loss of held-out pictures, whose masks are always the same."""
    return {"loss": "min"}

  @property
  def patch_size(self) -> int:
    """Side of a patch in pixels."""
    return int(self.model.features[-1].stride)

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return {"num_classes": 0}

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """See `Task`. Norms before the head are there too, though nothing here trains them."""
    size = tuple(batch["image"].shape[1:3])
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    rngs = jax.random.split(rng)
    variables = initial_variables(self.model.clone(num_classes=1), rngs[0], images)
    params = {
      name: value for name, value in variables["params"].items() if not is_head(f"params/{name}/")
    }
    grid = self._grid(size)
    if self.masking == "dense":
      features = jnp.zeros((1, *grid, self.model.features[-1].channels), jnp.float32)
      decoder = self.decoder.init(rngs[1], features)
    else:
      if _POSITIONS in params:
        made = self.model.position_size
        made = (made, made) if isinstance(made, int) else made
        table = params[_POSITIONS]
        tokens = table.shape[0] - made[0] * made[1]
        params[_POSITIONS] = jnp.asarray(mae.sincos_positions(table.shape[1], made, tokens))
      masking = self._masking(jnp.zeros((1, grid[0] * grid[1]), jnp.float32))
      patches = jnp.zeros((1, masking.kept.shape[1], self.model.width), jnp.float32)
      token = patches[:, 0] if self.model.class_token else None
      decoder = self.decoder.init(rngs[1], patches, token, masking.restore, grid, False)
    params["decoder"] = decoder["params"]
    return {"params": params, "batch_stats": variables.get("batch_stats", {})}

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Shrinks, normalises, and draws "noise" float32 `[B, L]`, which says what is hidden."""
    del step
    images = shrunk_and_normalized(batch["image"], self.mean, self.std, self.shrink)
    rows, columns = self._grid(images.shape[1:3])
    noise = jax.random.uniform(rng, (images.shape[0], rows * columns), jnp.float32)
    return {"image": images, "noise": noise}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`."""
    rebuilt, mask, _, stats = self._rebuild(variables, batch["image"], batch["noise"], rng)
    losses = self.losses(rebuilt, batch["image"], mask)
    weight = jnp.asarray(losses.shape[0], jnp.float32)
    metrics = {"loss": (jnp.sum(losses), weight)}
    return jnp.mean(losses), {"metrics": metrics, "batch_stats": stats}

  def targets(self, images: jax.Array) -> jax.Array:
    """Normalised images `[B, H, W, 3]` → what is to be rebuilt, float32 `[B, L, D]`."""
    images = images.astype(jnp.float32)
    if self.target == "hog":
      # A cell's numbers are like a pixel's channels.
      cells = hog(images, cell=_CELL, orientations=_ORIENTATIONS)
      return mae.patchify(cells.reshape(*cells.shape[:3], -1), self.patch_size // _CELL)
    patches = mae.patchify(images, self.patch_size)
    if self.target == "normalized_pixels":
      mean, std = _patch_statistics(patches)
      patches = (patches - mean) / std
    return patches

  def losses(self, rebuilt: jax.Array, images: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B]`: mean squared error of the hidden patches, of `rebuilt` `[B, L, D]`."""
    errors = jnp.mean(jnp.square(rebuilt - self.targets(images)), axis=-1)
    return jnp.sum(errors * mask, axis=-1) / jnp.sum(mask, axis=-1)

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, the network's endpoints in forward order, the rebuilt patches."""
    rebuilt, _, endpoints, _ = self._rebuild(variables, batch["image"], batch["noise"], rng)
    return {"image": batch["image"], **endpoints, "rebuilt": rebuilt}

  def predict(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Rebuilt patches `[B, L, D]` and the mask `[B, L]`, which a picture's position decides."""
    images = normalized(batch["image"], self.mean, self.std)
    rows, columns = self._grid(images.shape[1:3])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(batch[INDEX])
    noise = jax.vmap(lambda key: jax.random.uniform(key, (rows * columns,), jnp.float32))(keys)
    return self._rebuild(variables, images, noise)[:2]

  def evaluate_batch(self, variables: Variables, batch: Batch) -> dict[str, Any]:
    """Sum and weight over the rows whose "mask" is 1."""
    rebuilt, mask = self.predict(variables, batch)
    images = normalized(batch["image"], self.mean, self.std)
    losses = jnp.where(batch[MASK] > 0, self.losses(rebuilt, images, mask), 0.0)
    return {"loss": (jnp.sum(losses), jnp.sum(batch[MASK]))}

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    evaluate_batch, predict = jax.jit(self.evaluate_batch), jax.jit(self.predict)
    return [ReconstructionEvaluator(self, item, evaluate_batch, predict) for item in data]

  def _grid(self, size: Sequence[int]) -> tuple[int, int]:
    rows, columns = (-(-n // self.patch_size) for n in size)
    return rows, columns

  def _masking(self, noise: jax.Array) -> mae.Masking:
    return mae.mask_by_noise(noise, self.mask_ratio)

  def _rebuild(
    self, variables: Variables, images: jax.Array, noise: jax.Array, rng: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], Any]:
    """(rebuilt, mask, endpoints, batch statistics); training where there is a key."""
    params = {name: value for name, value in variables["params"].items() if name != "decoder"}
    decoder = {"params": variables["params"]["decoder"]}
    grid, masking = self._grid(images.shape[1:3]), self._masking(noise)
    # Says what is wrong with a picture's size before the network does.
    mae.patchify(images, self.patch_size)
    train, arguments = rng is not None, {}
    seen = images
    if self.masking == "sparse":
      arguments["kept"] = masking.kept
      if _POSITIONS in params:
        params[_POSITIONS] = jax.lax.stop_gradient(params[_POSITIONS])
    else:
      mask = masking.mask.reshape(-1, *grid)
      seen = self.decoder.apply(decoder, images, mask, method="hide")
    (_, endpoints), updated = self.model.apply(
      {"params": params, "batch_stats": variables.get("batch_stats", {})},
      seen,
      train=train,
      rngs={"dropout": rng} if train else None,
      mutable=["batch_stats"] if train else [],
      **arguments,
    )
    if self.masking == "sparse":
      patches, token = endpoints["head_norm"], endpoints.get("head_norm_token")
      rebuilt = self.decoder.apply(decoder, patches, token, masking.restore, grid, train)
    else:
      rebuilt = self.decoder.apply(decoder, endpoints[self.model.features[-1].name])
    return rebuilt, masking.mask, endpoints, updated.get("batch_stats", {})


def _patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and deviation (n - 1, as torch's) of each patch, `[B, L, 1]`."""
  mean = jnp.mean(patches, axis=-1, keepdims=True)
  variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
  return mean, jnp.sqrt(variance + 1e-6)


class ReconstructionEvaluator:
  """The loss over a data set, every picture counted once under a mask of its own."""

  def __init__(
    self, task: MaskedAutoencoding, data: EvaluationData, evaluate_batch: Any, predict: Any
  ):
    self.name = data.name
    self._task, self._data = task, data
    self._evaluate_batch, self._predict = evaluate_batch, predict

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Raises:
      ValueError: no picture counted.
    """
    total, weight = summed(self._data, self._evaluate_batch, variables).get("loss", (0.0, 0.0))
    if not weight:
      raise ValueError(f"evaluation set {self.name!r} holds no readable picture")
    return {"loss": total / weight, "examples": weight}

  def draw(self, variables: Variables, path: Path) -> bool:
    """Rows of originals, of what the network saw, and of what it made of the hidden patches."""
    images = self._data.sample(_DRAWN)["image"]
    if not len(images):
      return False
    answer = self._predict(variables, {"image": images, INDEX: np.arange(len(images))})
    if jax.process_count() > 1:
      answer = multihost_utils.process_allgather(answer, tiled=True)
    if jax.process_index():
      return True
    task = self._task
    rebuilt, mask = (jnp.asarray(part) for part in answer)
    originals = normalized(jnp.asarray(images), task.mean, task.std).astype(jnp.float32)
    size, grid = task.patch_size, task._grid(images.shape[1:3])
    hidden = np.asarray(mae.unpatchify(jnp.repeat(mask[..., None], size**2, -1), grid, size)) > 0
    shown = displayable(np.asarray(originals), task.mean, task.std)
    rows = {"original": shown, "seen": np.where(hidden, np.uint8(128), shown)}
    if task.target == "hog":
      for name, patches in (("HOG", task.targets(originals)), ("HOG, rebuilt", rebuilt)):
        cells = mae.unpatchify(patches, grid, size // _CELL)
        rows[name] = draw_histograms(np.asarray(cells))
      rows["HOG, rebuilt"] = np.where(hidden, rows["HOG, rebuilt"], rows["HOG"])
    else:
      if task.target == "normalized_pixels":
        mean, std = _patch_statistics(mae.patchify(originals, size))
        rebuilt = rebuilt * std + mean
      made = np.asarray(mae.unpatchify(rebuilt, grid, size))
      rows["rebuilt"] = np.where(hidden, displayable(made, task.mean, task.std), shown)
    plot_rows(rows, path)
    return True


def draw_histograms(cells: np.ndarray) -> np.ndarray:
  """Histograms `[B, h, w, 3 * orientations]` → grey pictures uint8 `[B, h * 8, w * 8, 3]`.

  Each orientation is a line through its cell, across the gradient, as bright as its part.
  """
  histograms = cells.reshape(*cells.shape[:3], 3, _ORIENTATIONS).mean(3)
  place = np.arange(_CELL) - (_CELL - 1) / 2
  lines = []
  for k in range(_ORIENTATIONS):
    # A gradient along the rows has the angle 0; its edge lies across it.
    angle = np.pi * (k + 0.5) / _ORIENTATIONS
    along = place[:, None] * np.cos(angle) + place[None, :] * np.sin(angle)
    lines.append(np.abs(along) < 0.75)
  pictures = np.einsum("bhwk,kij->bhiwj", np.clip(histograms, 0, None), np.stack(lines))
  batch, rows, _, columns, _ = pictures.shape
  grey = pictures.reshape(batch, rows * _CELL, columns * _CELL, 1)
  return (255 * np.clip(grey, 0, 1)).astype(np.uint8).repeat(3, -1)
