"""A directory of weights of an image and a text tower → embeddings of pictures and of texts.

    model = hybrid_vit.load_clip("weights/mobileclip_s2")
    images, texts = model.encode_image(["cat.jpg"]), model.encode_text(["a cat", "a dog"])
    probabilities = model.probabilities(images, texts)

What such weights say of themselves (`metadata.json`; imports and trainings alike): "name" and
"arguments" are the image network's, as in every export; "text_tower", "text_arguments",
"embedding_size", "max_scale" and "loss" are the rest, and "system" is the name of a published pair.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import checkpoints
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.fingerprints import digest, first_nonfinite
from hybrid_vit.models import mobileone
from hybrid_vit.models.clip import CLIP
from hybrid_vit.models.clip_systems import clip_system, make_clip
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.photos import prepare
from hybrid_vit.tasks.pictures import normalized
from hybrid_vit.weights.stored import is_two_towers, network_of
from hybrid_vit.weights.transfer import is_clip, without_text

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class StoredClip:
  """Weights of two towers.

  Attributes:
    name: of the published pair, else the image network's and the text tower's.
    image: the image network's name in the registry.
    text: the text tower's name.
    model: both, built as they were trained.
    variables: {"params", "batch_stats"}, NumPy arrays.
    embedding_size: D.
    loss: of the training: "softmax" or "sigmoid".
    preprocessing: what the weights expect of a picture.
    preprocessing_said_by: where that is from, for people.
    metadata: everything else that lies beside the weights.
  """

  name: str
  image: str
  text: str
  model: CLIP
  variables: dict[str, Any]
  embedding_size: int
  loss: str
  preprocessing: Preprocessing
  preprocessing_said_by: str
  metadata: dict[str, Any]

  def encode_image(
    self, images: np.ndarray | jax.Array | Sequence[str | Path | np.ndarray], batch_size: int = 32
  ) -> np.ndarray:
    """Embeddings of unit length, float32 `[B, D]`.

    Args:
      images: uint8 `[B, H, W, 3]`, which are normalised as the weights expect; float32 of the same
        shape, which are taken as normalised already; or files of photos, which are prepared whole.
      batch_size: pictures at once.

    Raises:
      ValueError: another shape or type.
      CorruptExampleError: a file that is no picture, or only part of one.
    """
    if not hasattr(images, "shape"):
      photos: list[Any] = [images] if _is_path(images) else list(images)
      size = self.preprocessing.image_size
      prepared = [prepare(p, self.preprocessing) if _is_path(p) else np.asarray(p) for p in photos]
      images = np.stack(prepared) if prepared else np.zeros((0, size, size, 3), np.uint8)
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype not in (np.uint8, np.float32):
      raise ValueError(
        f"pictures of type {array.dtype} and shape {list(array.shape)}; uint8 or float32 "
        "[B, H, W, 3] was expected"
      )
    return self._in_batches(self._image, array, batch_size)

  def encode_text(
    self, texts: str | Sequence[str] | np.ndarray, batch_size: int = 64
  ) -> np.ndarray:
    """Embeddings of unit length, float32 `[T, D]`.

    Args:
      texts: one or several, or tokens int `[T, L]`.
      batch_size: texts at once.

    Raises:
      ValueError: tokens of another shape or beyond the vocabulary.
      ImportError: a text beyond plain ASCII where ftfy is not installed.
    """
    tokens = texts if hasattr(texts, "shape") else self.tokenizer(texts)
    tokens = np.asarray(tokens)
    known = self.model.text.vocabulary_size
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
      raise ValueError(
        f"tokens of type {tokens.dtype} and shape {list(tokens.shape)}; int [T, L] was expected"
      )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < known:
      raise ValueError(
        f"tokens from {tokens.min()} to {tokens.max()}; this text tower knows 0 to {known - 1}"
      )
    return self._in_batches(self._text, tokens.astype(np.int32), batch_size)

  def probabilities(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Embeddings `[B, D]` and `[T, D]` → float32 `[B, T]`, of each text for each picture.

    Over the texts (softmax), or of each pair by itself after training by a sigmoid.
    """
    params = self.variables["params"]
    scale = float(np.exp(params["logit_scale"]))
    if self.model.max_scale is not None:
      scale = min(scale, self.model.max_scale)
    logits = scale * np.asarray(images) @ np.asarray(texts).T
    if self.loss == "sigmoid":
      return np.asarray(jax.nn.sigmoid(logits + params.get("logit_bias", 0.0)))
    return np.asarray(jax.nn.softmax(logits, axis=-1))

  @functools.cached_property
  def tokenizer(self) -> ClipTokenizer:
    """Of the text tower's length."""
    return ClipTokenizer(self.model.text.context_length)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Differs where the weights do: embeddings of other weights do not go together."""
    return digest(self.variables)

  @functools.cached_property
  def _on_device(self) -> dict[str, Any]:
    return jax.device_put(self.variables)

  @functools.cached_property
  def _image(self) -> Any:
    expected = self.preprocessing

    def encode(variables: Any, images: jax.Array) -> jax.Array:
      pictures = normalized(images, expected.mean, expected.std)
      features: Any = self.model.apply(variables, pictures, None, train=False)
      return features[0]

    return jax.jit(encode)

  @functools.cached_property
  def _text(self) -> Any:
    def encode(variables: Any, tokens: jax.Array) -> jax.Array:
      features: Any = self.model.apply(variables, None, tokens, train=False)
      return features[1]

    return jax.jit(encode)

  def _in_batches(self, encode: Any, array: np.ndarray, batch_size: int) -> np.ndarray:
    """One compiled shape for all batches."""
    size = max(1, min(batch_size, len(array)))
    found = [np.zeros((0, self.embedding_size), np.float32)]
    for start in range(0, len(array), size):
      part = array[start : start + size]
      padded = np.pad(part, ((0, size - len(part)), *([(0, 0)] * (array.ndim - 1))))
      found.append(np.asarray(encode(self._on_device, jnp.asarray(padded)))[: len(part)])
    return np.concatenate(found)


def load_clip(
  directory: str | Path, name: str | None = None, *, raw: bool = False, merge: bool = False
) -> StoredClip:
  """Loads an export, an import, a checkpoint or a work directory of two towers.

  Args:
    directory: see `checkpoints.load_weights`.
    name: of the published pair that they must be of; None for any.
    raw: see `checkpoints.load_weights`.
    merge: merge the branches of MCi and of the convolutional text tower, which answers faster.

  Raises:
    ValueError: weights of one network alone, of another pair, or that are no numbers.
    CheckpointError: no weights in `directory`.
  """
  weights, metadata = checkpoints.load_weights(directory, raw=raw)
  return clip_of(directory, weights, metadata, name, merge=merge)


def clip_of(
  directory: str | Path,
  weights: dict[str, Any],
  metadata: dict[str, Any],
  name: str | None = None,
  *,
  merge: bool = False,
) -> StoredClip:
  """The two towers that weights are of; see `load_clip`."""
  if not is_clip(weights) or not is_two_towers(metadata):
    said = metadata.get("name") or metadata.get("config", {}).get("model", {}).get("name")
    raise ValueError(
      f"{directory} has no text tower: its weights are of {said or 'a network'} alone, and weights "
      "of an image and a text tower were expected (hybrid_vit.tools.import_weights, or a training "
      "of the task 'contrastive')"
    )
  if (bad := first_nonfinite(weights)) is not None:
    raise ValueError(f"the weights in {directory} hold NaN or infinity, first in {bad!r}")
  # A state without `info` has its task in the configuration alone.
  said = metadata if metadata.get("text_tower") else metadata["config"]["task"]
  tower = network_of(directory, without_text(weights), metadata)
  image, text = tower.name, str(said["text_tower"])
  system = metadata.get("system")
  if name is not None:
    wanted = clip_system(name)
    if (system or name, image, text) != (name, wanted.image, wanted.text):
      raise ValueError(f"{directory} holds weights of {system or f'{image} + {text}'}, not {name}")
  own = metadata if "name" in metadata else metadata["config"]["model"]
  model = make_clip(
    image,
    text,
    embedding_size=tower.num_classes,
    image_arguments=own.get("arguments"),
    text_arguments=said.get("text_arguments"),
    max_scale=said.get("max_scale", 100.0),
  )
  variables = _with_tower(weights, tower.variables)
  if merge:
    model, variables = merged(model, variables)
  return StoredClip(
    name=system or f"{image} + {text}",
    image=image,
    text=text,
    model=model,
    variables=variables,
    embedding_size=tower.num_classes,
    loss=str(said.get("loss", "softmax")),
    preprocessing=tower.preprocessing,
    preprocessing_said_by=tower.preprocessing_said_by,
    metadata=metadata,
  )


def merged(model: Any, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """A network, or both towers, with their branches merged, and the variables of that form.

  Raises:
    ValueError: there are no branches, or they are merged already.
  """
  towers = {"image": model.image, "text": model.text} if isinstance(model, CLIP) else {"": model}
  able: dict[str, Any] = {
    name: tower.clone(reparameterized=True)
    for name, tower in towers.items()
    # A text tower of attention alone has no branches.
    if getattr(tower, "reparameterized", None) is False and getattr(tower, "mixer_blocks", True)
  }
  if not able:
    raise ValueError(f"{type(model).__name__}: there are no branches to merge, or none any more")
  whole = model.clone(**able) if isinstance(model, CLIP) else able[""]
  return whole, mobileone.reparameterize(variables)


def _with_tower(weights: Mapping[str, Any], tower: Mapping[str, Any]) -> dict[str, Any]:
  """Both towers, the image tower's variables as they were loaded for one network."""
  params = {**weights["params"], "image": tower["params"]}
  stats = {**weights.get("batch_stats", {})}
  if tower.get("batch_stats"):
    stats["image"] = tower["batch_stats"]
  return {"params": params, "batch_stats": stats}


def _is_path(item: Any) -> bool:
  return isinstance(item, (str, Path))
