"""What checkpoints may be of: the networks of the registry and the two-tower CLIPs, alike.

Of a CLIP the width of the head is that of the embedding, which both towers share.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import clip, clip_systems
from hybrid_vit.models.clip_systems import CLIP_MODELS, EMBEDDING_SIZE
from hybrid_vit.models.initialization import variable_shapes
from hybrid_vit.models.registry import Preprocessing, create_model, list_models, model_entry


def is_clip(architecture: str) -> bool:
  """Whether it is one of the two-tower models."""
  return architecture in CLIP_MODELS


def all_architectures() -> dict[str, str]:
  """Name → module of the family; whole CLIPs before the networks that are a part of them."""
  return {
    **dict.fromkeys(CLIP_MODELS, clip.__name__),
    **{name: model_entry(name).module_class.__module__ for name in list_models()},
  }


def build(architecture: str, num_classes: int | None = None, **arguments: Any) -> nn.Module:
  """The network, with a head (a CLIP: an embedding) of that width; None for its own.

  Raises:
    ValueError: an unknown name or argument; the message gives the closest.
  """
  if is_clip(architecture):
    size = num_classes or arguments.pop("embedding_size", EMBEDDING_SIZE)
    return clip_systems.create_clip(architecture, **{**arguments, "embedding_size": size})
  _check(architecture)
  return create_model(architecture, num_classes=num_classes, **arguments)


def module_of(architecture: str) -> str:
  """The module that its family is written in.

  Raises:
    ValueError: an unknown name.
  """
  if is_clip(architecture):
    return clip.__name__
  _check(architecture)
  return model_entry(architecture).module_class.__module__


def parameters_of(architecture: str) -> float | None:
  """As published or counted from the authors' code."""
  if is_clip(architecture):
    return CLIP_MODELS[architecture].published.parameters
  return model_entry(architecture).published.parameters


def preprocessing_of(architecture: str) -> Preprocessing:
  """What its weights expect of a picture."""
  if is_clip(architecture):
    return CLIP_MODELS[architecture].preprocessing
  return model_entry(architecture).preprocessing


def shapes_of(architecture: str, model: nn.Module) -> dict[str, Any]:
  """Shapes of the model's variables, at the entry's own input size."""
  size = preprocessing_of(architecture).image_size
  inputs = [jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)]
  if isinstance(model, clip.CLIP):
    length = model.text.context_length
    inputs.append(jax.ShapeDtypeStruct((1, length), jnp.int32))
  return variable_shapes(model, *inputs)


def image_tower(architecture: str) -> str:
  """The registry's name of a CLIP's image network."""
  return CLIP_MODELS[architecture].image


def clip_with(image: str, text: str) -> str | None:
  """A CLIP of these two towers; None where no published one has them."""
  return next((n for n, s in CLIP_MODELS.items() if (s.image, s.text) == (image, text)), None)


def head_prefix(architecture: str) -> str:
  """Where the paths of the head begin; of a CLIP the image tower's projection."""
  return "params/image/head/" if is_clip(architecture) else "params/head/"


def stored_description(
  architecture: str, num_classes: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """What metadata says of the network; a CLIP's is that of a contrastive training, too."""
  if not is_clip(architecture):
    return {"name": architecture, "arguments": dict(arguments), "task": "classification"}
  own = {k: v for k, v in arguments.items() if k != "embedding_size"}
  parts = clip_systems.clip_arguments(architecture, **own)
  return {
    "name": parts["image"],
    "arguments": parts["image_arguments"],
    "task": "contrastive",
    "text_tower": parts["text"],
    "text_arguments": parts["text_arguments"],
    "embedding_size": num_classes,
    "max_scale": parts["max_scale"],
    "loss": "softmax",
    "system": architecture,
  }


def _check(architecture: str) -> None:
  known = all_architectures()
  if architecture not in known and (
    close := difflib.get_close_matches(architecture, list(known), n=1, cutoff=0.5)
  ):
    raise ValueError(f"no model is named {architecture!r}; did you mean {close[0]!r}?")
