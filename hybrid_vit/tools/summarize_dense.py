"""Parameters and multiply-adds of backbones with their decoders, beside the published figures.

python -m hybrid_vit.tools.summarize_dense 'focalnet*'
python -m hybrid_vit.tools.summarize_dense --task=detection '*swin_tiny*'

With `--docs=docs` every system is counted, and `dense_models.md` and `dense_models.csv` are written
there; with `--task=detection`, `detection_models.md` and `detection_models.csv`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fnmatch
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit import detection_counts
from hybrid_vit.dense_systems import DenseSystem, dense_systems
from hybrid_vit.detection_systems import detection_systems
from hybrid_vit.models.initialization import variable_shapes
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tables import markdown_table
from hybrid_vit.tools.summarize import count_multiply_adds, count_parameters


@dataclasses.dataclass(frozen=True)
class DenseSummary:
  """One row; published figures are None where there are none.

  Attributes:
    backbone: name in the registry.
    decoder: name of the head.
    height: of the picture that is counted on.
    width: of that picture.
    parameters: trainable ones, counted, the auxiliary head's included.
    published_parameters: in millions.
    multiply_adds: of one picture in the test, counted; an auxiliary head is not run there.
    published_multiply_adds: in 10^9.
    published_mean_iou: of one scale.
    published_mean_iou_multi_scale: of several.
    source: of the published figures.
  """

  backbone: str
  decoder: str
  height: int
  width: int
  parameters: int
  published_parameters: float | None
  multiply_adds: int
  published_multiply_adds: float | None
  published_mean_iou: float | None
  published_mean_iou_multi_scale: float | None
  source: str


def summarize_dense(system: DenseSystem) -> DenseSummary:
  """Counts one system, without weights and without computing anything."""
  model = system.build()
  height, width = system.counted_on
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  # Of windows and tables alike the variables do not depend on the picture: a small one is traced.
  small = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = variable_shapes(model, small)

  def answers(variables, images):
    return model.apply(variables, images, train=False)[0]

  return DenseSummary(
    backbone=system.backbone,
    decoder=system.decoder,
    height=height,
    width=width,
    parameters=count_parameters(variables["params"]),
    published_parameters=system.parameters,
    multiply_adds=count_multiply_adds(answers, variables, images),
    published_multiply_adds=system.multiply_adds,
    published_mean_iou=system.mean_iou,
    published_mean_iou_multi_scale=system.mean_iou_multi_scale,
    source=system.source,
  )


def as_csv(rows: Sequence[Any]) -> str:
  """Plain numbers: a column for each field of the dataclass that the rows are."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([field.name for field in dataclasses.fields(rows[0])])
  for row in rows:
    writer.writerow(["" if value is None else value for value in dataclasses.astuple(row)])
  return out.getvalue()


def as_markdown(rows: Sequence[DenseSummary]) -> str:
  """A table for people."""
  head = [
    "backbone", "decoder", "picture", "parameters", "published", "mult-adds", "published", "mIoU",
    "multi-scale", "source",
  ]  # fmt: skip
  lines = [
    [
      r.backbone,
      r.decoder,
      f"{r.height} x {r.width}",
      f"{r.parameters:,}",
      "" if r.published_parameters is None else f"{r.published_parameters:g} M",
      f"{r.multiply_adds / 1e9:,.1f} G",
      "" if r.published_multiply_adds is None else f"{r.published_multiply_adds:,g} G",
      "" if r.published_mean_iou is None else f"{r.published_mean_iou:.1f}",
      "" if r.published_mean_iou_multi_scale is None else f"{r.published_mean_iou_multi_scale:.1f}",
      r.source,
    ]
    for r in rows
  ]
  return markdown_table(head, lines, texts=(0, 1, 2, 9))


_PAGE_HEAD = """# Backbones with decoders

Systems of semantic segmentation on ADE20K (150 classes). Parameters and multiply-adds are counted
here, of the network and the decoder that the recipe in `configs/` trains; "published", mIoU and its
multi-scale form are the authors' figures, not ours: nothing was trained to them here. The same as
plain numbers: [dense_models.csv](dense_models.csv).

Where the two differ by more than rounding:

* SMT: the published multiply-adds leave out its attention over the whole map, which is counted
  here; its 50 million go with a smaller network than the released `smt_s`.
* `revcol_base`: 122 million and 1169 G are ConvNeXt-B's; with RevCol-B's own backbone (138 million)
  it is what is counted here.
* Millions of parameters are rounded down in some tables (FocalNet's deep ones, MOAT).
* FocalNet: published multiply-adds are 2 to 3 G larger, which are element-wise products.
* `revcol_huge`: here with the 7x7 kernels that it has on dense tasks.
* The ViT is MobileCLIP's; MAE's published 163.9 million have relative positions and layer scales.

Written by `python -m hybrid_vit.tools.summarize_dense --docs=docs`.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 1 where no system is named so."""
  parser = argparse.ArgumentParser(prog="summarize_dense", description=__doc__.splitlines()[0])
  parser.add_argument("patterns", nargs="*", default=["*"], help="names or patterns of systems")
  parser.add_argument("--task", choices=("segmentation", "detection"), default="segmentation")
  parser.add_argument("--docs", type=Path, help="directory to write the page and its numbers into")
  args = parser.parse_args(argv)
  patterns = ["*"] if args.docs is not None else args.patterns
  detection = args.task == "detection"
  systems: list[Any] = detection_systems() if detection else dense_systems()

  def name(system: Any) -> str:
    return system.recipe if detection else system.backbone

  chosen = [s for s in systems if any(fnmatch.fnmatchcase(name(s), p) for p in patterns)]
  if not chosen:
    known = ", ".join(dict.fromkeys(map(name, systems)))
    what = "recipe" if detection else "backbone"
    print(f"error: no system has a {what} {' or '.join(patterns)}: {known}", file=sys.stderr)
    return 1
  if detection:
    found: list[Any] = [detection_counts.summarize_detection(system) for system in chosen]
    table, head, file = (
      detection_counts.as_markdown(found), detection_counts.PAGE_HEAD, "detection_models"
    )  # fmt: skip
  else:
    found = [summarize_dense(system) for system in chosen]
    table, head, file = as_markdown(found), _PAGE_HEAD, "dense_models"
  if args.docs is None:
    print(table)
    return 0
  args.docs.mkdir(parents=True, exist_ok=True)
  (args.docs / f"{file}.csv").write_text(as_csv(found), encoding="utf-8")
  (args.docs / f"{file}.md").write_text(f"{head}\n{table}\n", encoding="utf-8")
  return 0


if __name__ == "__main__":
  run_tool(main)
