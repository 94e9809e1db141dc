"""What the curricula save, counted in multiply-adds, beside the published figures.

Also what making a picture smaller within the step costs, beside the step of the lightest network.

    python docs/results/efficienttrain/cost.py

Takes each recipe of `configs/` with `config.curriculum` set, as a training would, and counts the
forward pass of every phase at the size and with the arguments that its network has there; nothing
is compiled. Writes `cost.csv`, `cost.md` and `crop.md` beside this file.
"""

import csv
import functools
from pathlib import Path

import jax

from hybrid_vit import build
from hybrid_vit.config import Config, load_config
from hybrid_vit.config_files import find_config
from hybrid_vit.models.registry import create_model
from hybrid_vit.ops.low_frequency_crop import lanczos_resize, low_frequency_crop
from hybrid_vit.tools.summarize import count_multiply_adds

# ImageNet-1K, and the papers' baseline and budget in epochs.
EXAMPLES, BASELINE, BUDGET = 1_281_167, 300, 200
# Configuration, variant, published saving of EfficientTrain (wall time; its paper gives no other)
# and of EfficientTrain++ (compute, table 7; wall time).
MODELS = (
  ("resnet", "resnet50", 1.44, 1.49, 1.45),
  ("convnext", "convnext_tiny", 1.49, 1.49, 1.49),
  ("convnext", "convnext_small", 1.50, 1.49, 1.52),
  ("convnext", "convnext_base", 1.48, 1.49, 1.49),
  ("vit", "deit_tiny_patch16_224", 1.55, 1.56, 1.64),
  ("vit", "deit_small_patch16_224", 1.51, 1.52, 1.60),
  ("pvt", "pvt_tiny", None, 1.51, 1.51),
  ("pvt", "pvt_small", None, 1.51, 1.49),
  ("pvt", "pvt_medium", None, 1.51, 1.49),
  ("pvt", "pvt_large", None, 1.51, 1.48),
  ("swin", "swin_tiny", None, 1.51, 1.49),
  ("swin", "swin_small", None, 1.51, 1.51),
  ("swin", "swin_base", None, 1.50, 1.47),
  ("cswin", "cswin_tiny", None, 1.52, 1.50),
  ("cswin", "cswin_small", None, 1.52, 1.52),
  ("cswin", "cswin_base", None, 1.51, 1.52),
)
COLUMNS = (
  "network", "multiply_adds_224", "efficienttrain", "efficienttrain_published_wall",
  "efficienttrain++", "efficienttrain++_published", "efficienttrain++_published_wall",
)  # fmt: skip


@functools.cache
def forward(name: str, size: int, arguments: tuple[tuple[str, object], ...]) -> int:
  """Multiply-adds of one picture's forward pass."""
  model = create_model(name, **dict(arguments))
  images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  return count_multiply_adds(lambda v, x: model.apply(v, x)[0], variables, images)


def saving(file: str, variant: str, curriculum: str) -> float:
  """The baseline's multiply-adds over the curriculum's."""
  values = load_config(find_config(file), variant)
  values.total_epochs = BASELINE
  plus = curriculum == "efficienttrain++"
  values.curriculum = dict(name=curriculum, epochs=BUDGET if plus else BASELINE)
  config = Config(values)
  found = build.read_curriculum(config, EXAMPLES, build.preprocessing_of(config))
  cost = sum(
    phase.steps
    * phase.batch_size
    * forward(variant, phase.shown_size or phase.image_size, tuple(phase.arguments.items()))
    for phase in found.phases
  )
  return BASELINE * EXAMPLES * forward(variant, 224, ()) / cost


def main() -> None:
  """Counts all of them and writes the tables."""
  rows = []
  for file, variant, wall, compute, wall_plus in MODELS:
    counted = [saving(file, variant, name) for name in ("efficienttrain", "efficienttrain++")]
    rows.append(
      dict(
        zip(
          COLUMNS,
          (
            variant,
            forward(variant, 224, ()),
            round(counted[0], 3),
            wall,
            round(counted[1], 3),
            compute,
            wall_plus,
          ),
        )
      )
    )
    print(rows[-1], flush=True)
  here = Path(__file__).parent
  with (here / "cost.csv").open("w", newline="") as out:
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  (here / "cost.md").write_text(table(rows), encoding="utf-8")
  (here / "crop.md").write_text(crop_table(), encoding="utf-8")


def crop_table(networks: tuple[str, ...] = ("deit_tiny_patch16_224", "resnet50")) -> str:
  """Multiply-adds of the crop of a picture of 224 px, and their part of a training step."""
  lines = [
    "| to | method | multiply-adds | " + " | ".join(f"of a step of {n}" for n in networks) + " |",
    "| ---: | --- | ---: |" + " ---: |" * len(networks),
  ]
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
  for size in (96, 160, 192):
    for crop in (low_frequency_crop, lanczos_resize):
      adds = count_multiply_adds(functools.partial(crop, size=size), images)
      cells = []
      for name in networks:
        grown = {"position_size": size // 16} if name.startswith("deit") else {}
        step = 3 * forward(name, size, tuple(grown.items()))
        cells.append(f"{adds / (adds + step):.1%}")
      lines.append(f"| {size} | `{crop.__name__}` | {adds / 1e6:.1f} M | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> str:
  """As Markdown."""
  lines = [
    "| network | multiply-adds at 224 | EfficientTrain, counted | published (wall) | "
    "EfficientTrain++, counted | published (compute) | published (wall) |",
    "| --- |" + " ---: |" * 6,
  ]
  for row in rows:
    name, adds, *figures = row.values()
    cells = ["" if value is None else f"{value:.2f}" for value in figures]
    lines.append(" | ".join((f"| {name}", f"{adds / 1e9:.2f} G", *cells)) + " |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
