"""Pieces of detectors' tests: a backbone of blank maps, true objects, golden files."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.heads.rpn import Proposals
from tests import golden


class Blank(nn.Module):
  """A backbone without parameters whose maps repeat the picture's first channel, averaged."""

  features: tuple[Any, ...]
  batch_norm_groups: int = 1

  @nn.compact
  def __call__(self, images, train=False):
    del train
    found = {}
    for level in self.features:
      s = level.stride
      x = jnp.pad(
        images[..., :1], ((0, 0), (0, -images.shape[1] % s), (0, -images.shape[2] % s), (0, 0))
      )
      x = nn.avg_pool(x, (s, s), (s, s))
      found[level.name] = x * jnp.linspace(-1, 1, level.channels)
    return None, found


def ellipses(boxes: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Masks `[G, H, W]` of the ellipses inscribed in boxes, at pixels' centres."""
  y, x = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
  out = []
  for x1, y1, x2, y2 in np.asarray(boxes, np.float64):
    w, h = max(x2 - x1, 1e-9), max(y2 - y1, 1e-9)
    out.append(((x - (x1 + x2) / 2) / (w / 2)) ** 2 + ((y - (y1 + y2) / 2) / (h / 2)) ** 2 <= 1)
  return np.array(out, bool).reshape(-1, *size)


def padded(rows: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
  """Arrays of different lengths as one with zeros behind, and flags of what there is."""
  out = np.zeros((len(rows), count, *rows[0].shape[1:]), rows[0].dtype)
  valid = np.zeros((len(rows), count), bool)
  for i, row in enumerate(rows):
    out[i, : len(row)], valid[i, : len(row)] = row, True
  return out, valid


def golden_targets(expected, canvas, *, names="labels", first=0, room=5) -> dict[str, np.ndarray]:
  """The true objects of a golden file of two pictures."""
  boxes, valid = padded([expected[f"gt_boxes_{i}"] for i in range(2)], room)
  labels, _ = padded([expected[f"gt_{names}_{i}"].astype(np.int32) - first for i in range(2)], room)
  masks = [ellipses(expected[f"gt_boxes_{i}"], canvas) for i in range(2)]
  return {"boxes": boxes, "labels": labels, "valid": valid, "masks": padded(masks, room)[0]}


def golden_proposals(expected, room=24) -> Proposals:
  """The proposals given in a golden file."""
  boxes, valid = padded([expected[f"given_{i}"] for i in range(2)], room)
  return Proposals(*map(jnp.asarray, (boxes, np.zeros(valid.shape, np.float32), valid)))


def assert_detections(expected, found, labels="labels", first=0) -> None:
  """Boxes, scores and labels of two pictures, in order."""
  for i in range(2):
    count = len(expected[f"det_scores_{i}"])
    assert int(found["valid"][i].sum()) == count
    np.testing.assert_allclose(found["scores"][i, :count], expected[f"det_scores_{i}"], rtol=2e-5)
    np.testing.assert_array_equal(found["labels"][i, :count] + first, expected[f"det_{labels}_{i}"])
    np.testing.assert_allclose(
      found["boxes"][i, :count], expected[f"det_boxes_{i}"], rtol=1e-5, atol=2e-4
    )
    assert not np.any(found["boxes"][i, count:])
    assert not bool(found["truncated"][i])


def assert_near(expected: float, found: Any, tolerance: float = 1e-5) -> None:
  """A loss, relatively."""
  np.testing.assert_allclose(float(found), float(expected), rtol=tolerance)


def maps_of(description, features) -> dict[str, jax.Array]:
  """The golden file's maps by the names of the levels."""
  given = [golden.image({"input": one}) for one in description["input"]["features"]]
  return {level.name: jnp.asarray(x) for level, x in zip(features, given)}
