"""Parameters and multiply-adds of backbones with their decoders, beside the published figures.

python -m hybrid_vit.tools.summarize_dense 'focalnet*'

With `--docs=docs` every system is counted, and `dense_models.md` and `dense_models.csv` are written
there.
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

import jax
import jax.numpy as jnp

from hybrid_vit.dense_systems import DenseSystem, dense_systems
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
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), small)

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


def as_csv(rows: Sequence[DenseSummary]) -> str:
  """Plain numbers."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([field.name for field in dataclasses.fields(DenseSummary)])
  for row in rows:
    writer.writerow(["" if value is None else value for value in dataclasses.astuple(row)])
  return out.getvalue()


def as_markdown(rows: Sequence[DenseSummary]) -> str:
  """A table for people."""
  lines = [
    "| backbone | decoder | picture | parameters | published | mult-adds | published | mIoU | "
    "multi-scale | source |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
  ]
  for r in rows:
    cells = [
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
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


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
  parser.add_argument("patterns", nargs="*", default=["*"], help="names or patterns of backbones")
  parser.add_argument("--docs", type=Path, help="directory to write dense_models.md and .csv into")
  args = parser.parse_args(argv)
  patterns = ["*"] if args.docs is not None else args.patterns
  chosen = [
    system
    for system in dense_systems()
    if any(fnmatch.fnmatchcase(system.backbone, pattern) for pattern in patterns)
  ]
  if not chosen:
    known = ", ".join(dict.fromkeys(system.backbone for system in dense_systems()))
    print(f"error: no system has a backbone {' or '.join(patterns)}: {known}", file=sys.stderr)
    return 1
  rows = [summarize_dense(system) for system in chosen]
  if args.docs is None:
    print(as_markdown(rows))
    return 0
  args.docs.mkdir(parents=True, exist_ok=True)
  (args.docs / "dense_models.csv").write_text(as_csv(rows), encoding="utf-8")
  page = f"{_PAGE_HEAD}\n{as_markdown(rows)}\n"
  (args.docs / "dense_models.md").write_text(page, encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
