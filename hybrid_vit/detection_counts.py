"""Parameters and multiply-adds of whole detectors, and the page that has them.

The conventions are those of mmdetection's figures: a picture of 800 x 1280, 1000 proposals through
every box head and 100 boxes through every mask head; pooling, sampling and suppression do not
count. `tools.summarize_dense --task=detection --docs=docs` writes the page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit.detection_systems import DetectionSystem
from hybrid_vit.heads.rcnn import RCNN
from hybrid_vit.models.initialization import variable_shapes
from hybrid_vit.tables import markdown_table
from hybrid_vit.tools.summarize import count_multiply_adds, count_parameters

_PROPOSALS, _MASKS = 1000, 100


@dataclasses.dataclass(frozen=True)
class DetectionSummary:
  """One row; published figures are None where there are none.

  Attributes:
    recipe: file in `configs/` and variant.
    height: of the picture that is counted on.
    width: of that picture.
    parameters: trainable ones, counted.
    published_parameters: in millions, as rounded there.
    multiply_adds: of one picture in the test, counted.
    published_multiply_adds: in 10^9.
    published_box_ap: on COCO's validation part.
    published_mask_ap: likewise.
    source: of the published figures.
  """

  recipe: str
  height: int
  width: int
  parameters: int
  published_parameters: str
  multiply_adds: int
  published_multiply_adds: float | None
  published_box_ap: float | None
  published_mask_ap: float | None
  source: str


def summarize_detection(system: DetectionSystem) -> DetectionSummary:
  """Counts one system, without weights and without computing anything."""
  model = system.build()
  height, width = system.counted_on
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  variables = variable_shapes(model, images)
  # Of all but R-CNN the answer is what is counted: suppression has no products.
  method = _parts_of_rcnn if isinstance(model, RCNN) else None

  def answers(variables, images):
    return model.apply(variables, images, method=method)

  return DetectionSummary(
    recipe=system.recipe,
    height=height,
    width=width,
    parameters=count_parameters(variables["params"]),
    published_parameters=system.parameters,
    multiply_adds=count_multiply_adds(answers, variables, images),
    published_multiply_adds=system.multiply_adds,
    published_box_ap=system.box_ap,
    published_mask_ap=system.mask_ap,
    source=system.source,
  )


def _parts_of_rcnn(model: Any, images: jax.Array) -> list[Any]:
  """What the parts of a detector answer, on as many boxes as the field counts."""
  _, endpoints = model.backbone(images, train=False)
  maps = model.neck(endpoints, False)
  found = [model.rpn(maps, False)]
  settings, width = model.settings, model.features[0].channels
  for kind, count, side, heads in (
    ("box", _PROPOSALS, settings.box_pool, model.stages),
    ("mask", _MASKS, settings.mask_pool, model.mask_heads),
  ):
    boxes = jnp.zeros((count, side, side, width))
    found += [getattr(model, f"{kind}_head{i}")(boxes, False) for i in range(len(heads))]
  return found


def as_markdown(rows: Sequence[DetectionSummary]) -> str:
  """A table for people."""
  head = [
    "recipe", "picture", "parameters", "published", "mult-adds", "published", "box AP", "mask AP",
    "source",
  ]  # fmt: skip
  lines = [
    [
      r.recipe,
      f"{r.height} x {r.width}",
      f"{r.parameters:,}",
      f"{r.published_parameters} M" if r.published_parameters else "",
      f"{r.multiply_adds / 1e9:,.1f} G",
      "" if r.published_multiply_adds is None else f"{r.published_multiply_adds:,g} G",
      "" if r.published_box_ap is None else f"{r.published_box_ap:.1f}",
      "" if r.published_mask_ap is None else f"{r.published_mask_ap:.1f}",
      r.source,
    ]
    for r in rows
  ]
  return markdown_table(head, lines, texts=(0, 1, 8))


PAGE_HEAD = """# Detectors

Systems of detection on COCO (80 classes). Parameters and multiply-adds are counted here, of the
network and the detector that the recipe in `configs/` trains, by the conventions of mmdetection's
figures: one picture of 800 x 1280, 1000 proposals through each box head and 100 boxes through each
mask head. "published" and the AP of boxes and masks are the authors' figures, not ours: nothing was
trained to them here. The same as plain numbers: [detection_models.csv](detection_models.csv).

Where the two differ by more than rounding or cutting:

* FocalNet with Mask R-CNN, but the deep networks: the published millions are those of first kernels
  11, 9, 9, 7 (48.6, 70.8, 72.3, 109.4, 111.4); here they are 9 in all stages, as the paper says and
  the released configurations have it. The 48.9 of tiny_lrf would be kernels from 7 on.
* FocalNet-H: 746 million are the network with its classifier of ImageNet-22K, not the detector.
* SMT-S: its published millions go with a smaller network than the released `smt_s`, as on ADE20K.
  SMT's published multiply-adds leave out its attention over the whole map, 75 G of `smt_s`, which
  is counted here; those of DINO count its sampling, which is not.
* MOAT: the heads are derived from the published parameters, and by these from its multiply-adds,
  which are 101 to 114 G larger, as much as most of a third box head would add.
* FocalNet's and others' published multiply-adds are up to 3 G larger, which are element-wise
  products.

Written by `python -m hybrid_vit.tools.summarize_dense --task=detection --docs=docs`.
"""
