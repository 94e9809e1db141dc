"""What a stored network answers to labelled pictures: logits and features of a whole data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import recipes
from hybrid_vit.data import loader
from hybrid_vit.data.sources import Source
from hybrid_vit.data.spec import INDEX, MASK, Field, kinds
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.tasks.pictures import normalized
from hybrid_vit.weights.stored import StoredNetwork, check_finite


@dataclasses.dataclass(frozen=True)
class Answers:
  """Rows in the order of the source, without pictures that could not be read.

  Attributes:
    features: float32 `[N, D]`, what the classifier is given ("pre_logits").
    logits: float32 `[N, K]`; None where the network has no classifier.
    labels: int32 `[N]`.
    indices: int64 `[N]`, positions in the source.
    unreadable: names of pictures that were left out.
  """

  features: np.ndarray
  logits: np.ndarray | None
  labels: np.ndarray
  indices: np.ndarray
  unreadable: tuple[str, ...]


def answer(
  network: StoredNetwork,
  source: Source,
  *,
  batch_size: int = 32,
  num_threads: int | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
  """Runs a network over a source, pictures prepared as its weights expect; on one device.

  Args:
    network: see `weights.stored.load_network`.
    source: its examples have "image" and "label".
    batch_size: pictures at once.
    num_threads: that read.
    progress: told (pictures done, pictures in all) after each batch.

  Raises:
    ValueError: weights that are no numbers, or no picture that can be read.
  """
  check_finite(network)
  expected = network.preprocessing
  size = expected.image_size
  fields = {
    "image": Field("image", "uint8", (size, size, 3)),
    "label": Field("value", "int32", minimum=0),
  }
  transform = parse_transform(recipes.eval_transform(expected), "pil", kinds(fields))
  batch_size = min(batch_size, len(source))
  batches = loader.eval_batches(
    source,
    loader.Reading(batch_size, transform, fields),
    num_threads=num_threads,
    max_corrupt_fraction=1.0,
  )

  @jax.jit
  def run(variables, images):
    pictures = normalized(images, expected.mean, expected.std)
    logits, endpoints = network.model.apply(variables, pictures, train=False)
    features = endpoints["pre_logits"].astype(jnp.float32)
    return features, None if logits is None else logits.astype(jnp.float32)

  variables = jax.device_put(network.variables)
  features, logits, labels, indices = [], [], [], []
  done = 0
  for arrays, _ in batches:
    there = arrays[MASK] > 0
    found, classified = jax.device_get(run(variables, arrays["image"]))
    features.append(found[there])
    if classified is not None:
      logits.append(classified[there])
    labels.append(arrays["label"][there])
    indices.append(arrays[INDEX][there])
    done = min(done + batch_size, len(source))
    progress(done, len(source))
  if not sum(map(len, labels)):
    raise ValueError(f"none of {len(source)} pictures could be read, e.g. {source.describe(0)}")
  return Answers(
    np.concatenate(features),
    np.concatenate(logits) if logits else None,
    np.concatenate(labels),
    np.concatenate(indices).astype(np.int64),
    tuple(batches.corrupt.names),
  )
