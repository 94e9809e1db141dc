"""A stored classifier → the probabilities of its classes for photos, and the likeliest of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models.registry import closest_hint
from hybrid_vit.tasks.pictures import normalized
from hybrid_vit.weights.stored import StoredNetwork, check_finite
from hybrid_vit.weights.stored_clip import StoredClip

# By the loss of the training: what makes probabilities of the logits.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "softmax": jax.nn.softmax,
  "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The likeliest classes of one photo.

  Attributes:
    photo: its path.
    image: as the network saw it, uint8 `[S, S, 3]`.
    classes: indices, the likeliest first.
    names: of those classes.
    probabilities: of those classes; after training with a sigmoid, of each by itself, so that they
      need not add up to 1.
  """

  photo: Path
  image: np.ndarray
  classes: tuple[int, ...]
  names: tuple[str, ...]
  probabilities: tuple[float, ...]


class Texts(NamedTuple):
  """Classes that are texts.

  Attributes:
    names: the texts.
    embeddings: of unit length, float32 `[T, D]`.
  """

  names: tuple[str, ...]
  embeddings: np.ndarray


def embedded_texts(model: StoredClip, text: str) -> Texts:
  """Texts between commas or on lines of their own, with their embeddings.

  Raises:
    ValueError: there is none.
    ImportError: one beyond plain ASCII where ftfy is not installed.
  """
  names = tuple(t.strip() for t in text.replace("\n", ",").split(",") if t.strip())
  if not names:
    raise ValueError('no text was given; at least one was expected, such as "a cat,a dog"')
  return Texts(names, model.encode_text(names))


def check_classifier(network: StoredNetwork) -> None:
  """What a network answers must be classes.

  Raises:
    ValueError: the weights have no classifier, are of another task, or hold what is no number.
  """
  if not network.num_classes:
    raise ValueError(f"these weights of {network.name} have no classifier")
  if network.loss not in ACTIVATIONS:
    task = network.metadata.get("task")
    raise ValueError(
      f"these weights of {network.name} were trained for the task {task!r} with the loss "
      f"{network.loss!r}; {' or '.join(ACTIVATIONS)} was expected: their outputs are no classes"
    )
  check_finite(network)


def class_probabilities(network: StoredNetwork) -> Callable[[Any, Any], jax.Array]:
  """`(variables, uint8 [B, S, S, 3]) → float32 [B, K]`, compiled once for each size of a batch."""
  expected, activation = network.preprocessing, ACTIVATIONS[network.loss]

  @jax.jit
  def run(variables: Any, batch: Any) -> jax.Array:
    pictures = normalized(batch, expected.mean, expected.std)
    logits, _ = network.model.apply(variables, pictures, train=False)
    return activation(logits.astype(jnp.float32))

  return run


def likeliest(
  photo: Path, image: np.ndarray, probabilities: np.ndarray, names: Sequence[str], top: int
) -> Prediction:
  """The `top` likeliest of a row of probabilities `[K]`."""
  best = np.argsort(-probabilities, kind="stable")[: min(top, len(probabilities))]
  return Prediction(
    photo,
    image,
    tuple(map(int, best)),
    tuple(names[i] for i in best),
    tuple(float(probabilities[i]) for i in best),
  )


def class_index(text: str, names: Sequence[str]) -> int:
  """The class that a text means: one's name, with or without its capitals, else its number from 0.

  Raises:
    ValueError: neither; the message gives the closest name.
  """
  if text in names:
    return list(names).index(text)
  folded = [name.casefold() for name in names]
  if folded.count(text.casefold()) == 1:
    return folded.index(text.casefold())
  if text.isdecimal() and int(text) < len(names):
    return int(text)
  raise ValueError(
    f"no class is named {text!r}{closest_hint(text, names)}; a name or a number from 0 to "
    f"{len(names) - 1} was expected"
  )
