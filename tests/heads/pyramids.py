"""Pyramids of noise for heads, and the golden files of heads that are fed with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.weights.convert import KeyMap, import_weights
from tests import golden
from tests.models import contract


def levels(widths: Sequence[int], strides: Sequence[int] = (4, 8, 16, 32)) -> tuple[Any, ...]:
  """Names "stage1" … with these widths and strides."""
  named = enumerate(zip(strides, widths), start=1)
  return tuple(FeatureSpec(f"stage{i}", stride, width) for i, (stride, width) in named)


def noise(
  features: Sequence[FeatureSpec], size: tuple[int, int], batch: int = 2, seed: int = 0
) -> dict[str, np.ndarray]:
  """Standard normal maps of a picture of `size`; what does not fill a cell has one, too."""
  rng = np.random.default_rng(seed)
  return {
    f.name: rng.standard_normal(
      (batch, -(-size[0] // f.stride), -(-size[1] // f.stride), f.channels), np.float32
    )
    for f in features
  }


def initialised(module: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
  """What a module answers at first, and its variables.

  By two programs: where one makes a kernel of zeros and multiplies by it, XLA's CPU compiler (up to
  0.12 at least) fuses the two with a maximum that follows and reads memory that nobody wrote.
  """
  variables = contract.initialize(module, *inputs)
  return jax.jit(module.apply)(variables, *inputs), variables


def golden_inputs(given: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
  """The maps that a golden file's description names by shape and seed."""
  return [golden.image({"input": one}) for one in given]


def with_golden_weights(module: Any, key_map: KeyMap, weights: Any, *inputs: Any) -> dict[str, Any]:
  """The module's variables with a golden file's numbers, each used exactly once."""
  template = dict(jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs))
  named = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
  return import_weights(named, template, key_map)[0]
