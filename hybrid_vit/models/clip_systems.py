"""The published image–text models: which image network and which text tower make one.

Pavan Kumar Anasosalu Vasu et al., "MobileCLIP", CVPR 2024, arXiv:2311.17049; Alec Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
arXiv:2103.00020, and open_clip's `ViT-B-16`. How pictures are prepared is the entry of the image
network: MobileCLIP's stay in [0, 1] and are resized bilinearly, those of open_clip and OpenAI are
normalised by CLIP's mean and deviation and resized bicubically.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from hybrid_vit.models.clip import CLIP
from hybrid_vit.models.registry import (
  Preprocessing,
  Published,
  create_model,
  model_arguments,
  model_entry,
)
from hybrid_vit.models.text import TEXT_TOWERS, TextTransformer, create_text_tower

EMBEDDING_SIZE = 512
_TEXT_ARGUMENTS = tuple(
  f.name for f in dataclasses.fields(TextTransformer) if f.name not in ("parent", "name")
)


@dataclasses.dataclass(frozen=True)
class ClipSystem:
  """A named pair of towers.

  Attributes:
    image: the image network's name in the registry.
    text: the text tower's name in `text.TEXT_TOWERS`.
    max_scale: see `CLIP`.
    arguments: of both towers, where they replace their own.
    published: parameters of both towers and the scale, counted; zero-shot top-1.
  """

  image: str
  text: str
  max_scale: float | None
  arguments: Mapping[str, Any]
  published: Published

  @property
  def preprocessing(self) -> Preprocessing:
    """What the weights expect of a picture."""
    return model_entry(self.image).preprocessing


def _system(
  image: str,
  text: str,
  max_scale: float | None,
  top1: float,
  source: str,
  **arguments: Any,
) -> ClipSystem:
  counted = model_entry(image).published.parameters
  parameters = None if counted is None else counted + TEXT_TOWERS[text][1] + 1
  return ClipSystem(
    image,
    text,
    max_scale,
    arguments,
    Published(parameters, None, top1, f"zero-shot top-1: {source}"),
  )


_APPLE, _OPEN_CLIP = "apple/ml-mobileclip README", "open_clip's table of DataComp-XL"
_OPENAI = "open_clip's table of OpenAI's weights"
CLIP_MODELS: dict[str, ClipSystem] = {
  "mobileclip_s0": _system("mci0", "mobileclip_s0", 100.0, 67.8, _APPLE),
  "mobileclip_s1": _system("mci1", "mobileclip_s1", 100.0, 72.6, _APPLE),
  "mobileclip_s2": _system("mci2", "mobileclip_s2", 100.0, 74.4, _APPLE),
  "mobileclip_b": _system("vit_b16", "mobileclip_b", 100.0, 76.8, _APPLE),
  # open_clip's training clamps the parameter instead of the scale.
  "openclip_vit_b16": _system("vit_base_patch16_clip_224", "clip_vit_b16", None, 73.5, _OPEN_CLIP),
  "openai_vit_b16": _system(
    "vit_base_patch16_clip_224", "clip_vit_b16", None, 68.3, _OPENAI, activation="quick_gelu"
  ),
}


def create_clip(name: str, *, embedding_size: int = EMBEDDING_SIZE, **overrides: Any) -> CLIP:
  """Builds both towers of a system of `CLIP_MODELS`.

  Args:
    name: of the system.
    embedding_size: width of what the towers have in common.
    **overrides: attributes of the towers that replace their own, such as `reparameterized` or
      `dtype`: each goes to every tower that has it.

  Raises:
    ValueError: an unknown name, or an attribute that no tower has; the message gives the closest.
  """
  arguments = clip_arguments(name, **overrides)
  return make_clip(**arguments, embedding_size=embedding_size)


def clip_arguments(name: str, **overrides: Any) -> dict[str, Any]:
  """What `make_clip` takes, but for the width: as metadata of weights say it.

  Returns:
    {"image", "image_arguments", "text", "text_arguments", "max_scale"}.

  Raises:
    ValueError: as `create_clip`.
  """
  system = clip_system(name)
  both = {**system.arguments, **overrides}
  image = set(model_arguments(system.image)) - {"num_classes"}
  text = set(_TEXT_ARGUMENTS) - {"embedding_size"}
  for argument in both:
    if argument not in image | text:
      close = difflib.get_close_matches(argument, sorted(image | text), n=1, cutoff=0.5)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      raise ValueError(f"no tower of {name} has an argument {argument!r}{hint}")
  return {
    "image": system.image,
    "image_arguments": {k: v for k, v in both.items() if k in image},
    "text": system.text,
    "text_arguments": {k: v for k, v in both.items() if k in text},
    "max_scale": system.max_scale,
  }


def make_clip(
  image: str,
  text: str,
  *,
  embedding_size: int,
  image_arguments: Mapping[str, Any] | None = None,
  text_arguments: Mapping[str, Any] | None = None,
  max_scale: float | None = 100.0,
) -> CLIP:
  """Any image network of the registry with any text tower.

  Args:
    image: the network's name in the registry.
    text: the tower's name in `text.TEXT_TOWERS`.
    embedding_size: width of both projections.
    image_arguments: attributes of the network that replace its own.
    text_arguments: attributes of the tower that replace its own.
    max_scale: see `CLIP`.

  Raises:
    ValueError: an unknown name or attribute.
  """
  given = dict(text_arguments or {})
  for argument in given:
    if argument not in _TEXT_ARGUMENTS:
      raise ValueError(
        f"text tower {text} has no argument {argument!r}; it has: {', '.join(_TEXT_ARGUMENTS)}"
      )
  # Metadata has lists where the tower has tuples.
  tupled = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  return CLIP(
    create_model(image, num_classes=embedding_size, **(image_arguments or {})),
    create_text_tower(text, **{**tupled, "embedding_size": embedding_size}),
    max_scale,
  )


def clip_system(name: str) -> ClipSystem:
  """The system of a name.

  Raises:
    ValueError: for an unknown name; the message gives the closest.
  """
  if name not in CLIP_MODELS:
    close = difflib.get_close_matches(name, list(CLIP_MODELS), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"no CLIP is named {name!r}{hint}; there are: {', '.join(CLIP_MODELS)}")
  return CLIP_MODELS[name]
