"""RoIAlign: torchvision's answers and gradients, and the definition sample by sample."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops import roi_align as module
from hybrid_vit.ops.roi_align import FORMS, pyramid_roi_align, roi_align, roi_levels
from tests import golden

_MODES = [(aligned, ratio) for aligned in (True, False) for ratio in (0, 2)]


@functools.partial(jax.jit, static_argnames=("size", "scale", "ratio", "aligned", "form"))
def _all_images(features, boxes, size, scale, ratio, aligned, form):
  boxes = jnp.broadcast_to(boxes, (features.shape[0], *boxes.shape))
  return roi_align(
    features, boxes, output_size=size, spatial_scale=scale, sampling_ratio=ratio, aligned=aligned,
    form=form,
  )  # fmt: skip


def _of(features, rois, **kwargs):
  """Rows of (image, box) as torchvision has them."""
  found = _all_images(features, rois[:, 1:], **kwargs)
  return found[rois[:, 0].astype(int), jnp.arange(len(rois))]


def _by_definition(f, box, bins, scale, ratio, aligned):
  """One box of one map `[H, W, C]`, in float64."""
  height, width, channels = f.shape
  x1, y1, x2, y2 = np.asarray(box, np.float64) * scale - (0.5 if aligned else 0)
  w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
  across = ratio or math.ceil(w / bins[1])
  down = ratio or math.ceil(h / bins[0])
  out = np.zeros((*bins, channels))

  def value(y, x):
    if y < -1 or y > height or x < -1 or x > width:
      return np.zeros(channels)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    return (1 - v) * ((1 - u) * f[top, left] + u * f[top, right]) + v * (
      (1 - u) * f[bottom, left] + u * f[bottom, right]
    )

  for p, q in np.ndindex(*bins):
    for i, j in np.ndindex(max(down, 0), max(across, 0)):
      y = y1 + (p + (i + 0.5) / down) * h / bins[0]
      x = x1 + (q + (j + 0.5) / across) * w / bins[1]
      out[p, q] += value(y, x) / (down * across)
  return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("aligned", "ratio"), _MODES)
def test_torchvisions_answers(aligned, ratio, form):
  description, stored = golden.load("dense/roi_align", "roi_align_stride4")
  features = golden.image(description)
  mode = f"{'aligned' if aligned else 'unaligned'}_s{ratio}"
  run = functools.partial(
    _of, features, stored["rois"], scale=0.25, ratio=ratio, aligned=aligned, form=form
  )
  answers = {f"p7_{mode}": run(size=7), f"p14_{mode}": run(size=14)}
  answers[f"p14_{mode}_mean"] = answers[f"p14_{mode}"].mean((1, 2))
  prefixes = (f"p7_{mode}", f"p14_{mode}")
  expected = {k: v for k, v in stored.items() if k.startswith(prefixes)}
  golden.assert_matches(expected, answers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [0, 2])
def test_torchvisions_gradients(ratio, form):
  description, stored = golden.load("dense/roi_align", "roi_align_stride4")
  weights = golden.image({"input": {"shape": (20, 7, 7, 3), "seed": 38}})
  gradient = jax.grad(
    lambda f: jnp.sum(
      weights * _of(f, stored["rois"], size=7, scale=0.25, ratio=ratio, aligned=True, form=form)
    )
  )(golden.image(description))
  golden.assert_matches(
    {"gradient": stored[f"grad_aligned_s{ratio}"]}, {"gradient": gradient}, 2e-5
  )


def _pyramid(seed=0):
  rng = np.random.default_rng(seed)
  maps = [
    rng.standard_normal((2, -(-70 // s), -(-110 // s), 2)).astype(np.float32) for s in (4, 8, 16)
  ]
  corner = rng.uniform(-10, 70, (2, 9, 2))
  sides = np.exp(rng.uniform(1, 4.7, (2, 9, 2)))
  return maps, np.concatenate([corner, corner + sides], -1).astype(np.float32)


@pytest.mark.parametrize("ratio", [0, 2])
def test_pyramid_by_definition(ratio):
  maps, boxes = _pyramid()
  run = jax.jit(
    functools.partial(
      pyramid_roi_align, output_size=(3, 4), strides=(4, 8, 16), sampling_ratio=ratio,
      aligned=True, finest_scale=14.0,
    ),
    static_argnames="form",
  )  # fmt: skip
  levels = np.asarray(roi_levels(boxes, 3, 14.0))
  assert set(levels.ravel()) == {0, 1, 2}
  expected = np.array(
    [
      [
        _by_definition(maps[k][b], boxes[b, r], (3, 4), 0.25 / 2**k, ratio, True)
        for r, k in enumerate(levels[b])
      ]
      for b in range(2)
    ]
  )
  for form in FORMS:
    np.testing.assert_allclose(run(maps, boxes, form=form), expected, atol=2e-5)


def test_forms_agree_on_gradients_and_in_parts(monkeypatch):
  maps, boxes = _pyramid(1)
  weights = np.random.default_rng(2).standard_normal((2, 9, 3, 3, 2)).astype(np.float32)

  def gradients(form):
    return jax.jit(
      jax.grad(
        lambda maps: jnp.sum(
          weights
          * pyramid_roi_align(
            maps, boxes, output_size=3, strides=(4, 8, 16), sampling_ratio=2, aligned=False,
            finest_scale=14.0, form=form,
          )
        )
      )
    )(maps)  # fmt: skip

  whole = gradients("matrix")
  monkeypatch.setattr(module, "_PART", 500)
  for form in FORMS:
    for found, expected in zip(gradients(form), whole):
      np.testing.assert_allclose(found, expected, atol=1e-5)


def test_levels():
  sides = np.array([0, 1, 111.9, 112, 223.9, 224, 447, 448, 5000], np.float32)
  boxes = np.stack([0 * sides, 0 * sides, sides, sides], 1)
  for rule in module.LEVEL_RULES:
    np.testing.assert_array_equal(roi_levels(boxes, 4, rule=rule), [0, 0, 0, 1, 1, 2, 2, 3, 3])
  with pytest.raises(ValueError, match=r"'keras'.*mmdetection, detectron2, torchvision"):
    roi_levels(boxes, 4, rule="keras")


def test_half_precision_no_boxes_and_limits():
  features = jnp.ones((1, 6, 8, 2), jnp.bfloat16)
  boxes = jnp.array([[[4.0, 4, 20, 20]]])
  run = functools.partial(
    roi_align, output_size=2, spatial_scale=0.25, sampling_ratio=0, aligned=True
  )
  for form in FORMS:
    found = run(features, boxes, form=form)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1.0)
    assert run(features, boxes[:, :0], form=form).shape == (1, 0, 2, 2, 2)
  # One sample where the box would take two.
  ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None], (1, 6, 8, 1)) ** 2
  kwargs = dict(output_size=1, spatial_scale=1.0, aligned=True)
  one = roi_align(ramp, boxes / 4, sampling_ratio=0, max_samples=1, **kwargs)
  np.testing.assert_allclose(one, roi_align(ramp, boxes / 4, sampling_ratio=1, **kwargs))


def test_wrong_shapes_are_named():
  features, boxes = jnp.zeros((2, 4, 4, 1)), jnp.zeros((1, 3, 4))
  kwargs = dict(output_size=2, sampling_ratio=2, aligned=True)
  with pytest.raises(ValueError, match=r"boxes must be \[B, R, 4\].*\(1, 3, 4\)"):
    roi_align(features, boxes, spatial_scale=1.0, **kwargs)
  with pytest.raises(ValueError, match="1 maps and 2 strides"):
    pyramid_roi_align([features], boxes, strides=(4, 8), **kwargs)
  with pytest.raises(ValueError, match=r"'fast'.*gather, matrix"):
    roi_align(features[:1], boxes, spatial_scale=1.0, form="fast", **kwargs)
