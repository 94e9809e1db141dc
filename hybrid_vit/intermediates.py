"""What is inside the blocks of a network: weights of attention, FocalNet's modulators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax

from hybrid_vit.models.focalnet import FocalModulation

# Names of blocks among endpoints and modules.
BLOCK = re.compile(r"stage(\d+)_block(\d+)")


def evaluation_form(model: nn.Module) -> nn.Module:
  """The same network with its blocks written out, none of them recomputed."""
  plain: dict[str, Any] = {name: False for name in ("remat", "scan_blocks") if hasattr(model, name)}
  return model.clone(**plain)


def attention_weights(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
  """Weights of softmax attention over whole maps, float32 `[B, H, Q, K]`, by block, first to last.

  Attention in several windows has none, and neither has linear attention.

  Args:
    model: see `evaluation_form`.
    variables: of the network.
    images: float `[B, H, W, 3]`, normalised.
  """
  _, inside = model.apply(variables, images, train=False, mutable=["intermediates"])
  return {block: x for block, x in _by_block(inside, "attention_weights") if x.ndim == 4}


def modulators(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
  """FocalNet's modulators `[B, h, w, C]`, what queries are multiplied by, by block, first to last.

  Arguments as of `attention_weights`; other networks have none.
  """

  def wanted(module: nn.Module, method: str) -> bool:
    inside_modulation = isinstance(module.parent, FocalModulation)
    return inside_modulation and module.name == "projection_context" and method == "__call__"

  _, inside = model.apply(
    variables, images, train=False, mutable=["intermediates"], capture_intermediates=wanted
  )
  return dict(_by_block(inside, "projection_context"))


def _by_block(inside: Mapping[str, Any], part: str) -> list[tuple[str, jax.Array]]:
  """(block, array) of intermediates whose path has `part` in it, in the order of the blocks."""
  flat = flax.traverse_util.flatten_dict(dict(inside.get("intermediates", {})))
  found = []
  for path, values in flat.items():
    match = BLOCK.fullmatch(path[0])
    if match and part in path:
      found.append(((int(match[1]), int(match[2])), path[0], values[0]))
  return [(block, value) for _, block, value in sorted(found, key=lambda item: item[0])]
