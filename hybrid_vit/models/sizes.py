"""What of a network's arguments goes with the size of its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_vit.models.registry import model_entry

# Stripes up to this width stay what they are at larger sizes, as CSWin's authors have it.
_THIN = 2


def arguments_for_size(
  name: str,
  image_size: int,
  *,
  trained: Mapping[str, Any] | None = None,
  trained_size: int | None = None,
) -> dict[str, Any]:
  """Arguments of a network for another picture size than its own, as its authors do it.

  Windows grow in proportion (Swin, L2ViT: 7 at 224 is 12 at 384), so that a map stays divided into
  as many; so do CSWin's stripes but for the thin ones, and ViT's table of positions. Tables of
  another size than the weights' are resized where those are taken over (`weights.transfer`); those
  of MOAT and PVT keep their size and are resized within the network. Other networks take any size
  as they are.

  Args:
    name: in the registry.
    image_size: side in pixels.
    trained: arguments beyond its entry's that the network has at its own size.
    trained_size: its own size; None for the entry's.

  Returns:
    Arguments of `create_model`, those of `trained` not among them; {} where nothing changes.

  Raises:
    ValueError: an unknown name.
  """
  entry = model_entry(name)
  ratio = image_size / (trained_size or entry.preprocessing.image_size)

  def scaled(width: int) -> int:
    return max(1, round(width * ratio))

  # What the entry leaves out is its class's default.
  whole = {**_defaults(entry.module_class), **entry.arguments, **(trained or {})}
  found: dict[str, Any] = {}
  if entry.module_class.__name__ in ("Swin", "L2ViT"):
    found["window_size"] = scaled(whole["window_size"])
  elif entry.module_class.__name__ == "VisionTransformer":
    side = whole["position_size"]
    found["position_size"] = scaled(side) if isinstance(side, int) else tuple(map(scaled, side))
  elif entry.module_class.__name__ == "CSWin":
    found["stripe_widths"] = tuple(w if w <= _THIN else scaled(w) for w in whole["stripe_widths"])
  return {key: value for key, value in found.items() if value != whole[key]}


def _defaults(module_class: type) -> dict[str, Any]:
  fields: dict[str, Any] = module_class.__dataclass_fields__  # type: ignore[attr-defined]
  return {name: field.default for name, field in fields.items()}
