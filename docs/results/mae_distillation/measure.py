"""Masked autoencoding and distillation on the embedded digits with few labels: runs end to end.

    python docs/results/mae_distillation/measure.py --out=docs/results/mae_distillation

Each accuracy is that of the 360 held-out digits. A run that stands in results.csv already is not
done again, so that the command goes on where it was stopped. Pretrained weights and teachers are
kept in --work.
"""

import argparse
import csv
import time
from pathlib import Path

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from hybrid_vit import main
from hybrid_vit.config import load_config

SEEDS = (0, 1, 2)
LABELS = 144
STEPS = 300
VIT = {"width": 64, "depth": 3, "num_heads": 2, "patch_size": 8, "position_size": 4}
MEAN_OF_PATCHES = {"pool": "mean", "pool_before_norm": True}
COLUMNS = ("experiment", "form", "seed", "labels", "steps", "top1", "seconds")


def base(seed: int, name: str, arguments: dict) -> ConfigDict:
  """A classification of a tenth of the digits."""
  config = load_config("finetune", "runlocal")
  config.seed = seed
  config.model.name, config.model.arguments = name, arguments
  config.data.split = f"train[:{LABELS}]"
  config.data.batch_size = 48
  config.evaluation.sets.validation.split = "validation"
  config.total_epochs = None
  config.total_steps = STEPS
  config.evaluate_every_epochs = 0
  config.reinitialize_head = False
  config.optimizer.learning_rate = 2e-3
  return config


def pretrain(seed: int, work: Path) -> Path:
  """All 1,437 digits without their labels."""
  config = load_config("mae", "runlocal,epochs=60")
  config.seed, config.evaluate_every_epochs = seed, 0
  return trained(config, work / f"mae_{seed}")


def teacher(work: Path) -> Path:
  """A tiny MOAT that saw all labels."""
  config = load_config("finetune", "runlocal")
  config.total_epochs, config.evaluate_every_epochs = 8, 0
  config.reinitialize_head = False
  return trained(config, work / "teacher")


def trained(config: ConfigDict, workdir: Path) -> Path:
  """The work directory of a finished run."""
  if not (workdir / "export").exists():
    main.train(config, workdir)
  return workdir


def masked_autoencoding(form: str, seed: int, work: Path) -> ConfigDict:
  """From scratch, or from what was learned without labels."""
  config = base(seed, "vit_base_patch16_224", {**VIT, **MEAN_OF_PATCHES})
  if form == "pretrained":
    config.init_from, config.reinitialize_head = str(pretrain(seed, work)), True
  return config


def distillation(form: str, seed: int, work: Path) -> ConfigDict:
  """A student with a distillation token, alone or with a teacher."""
  config = base(seed, "deit_tiny_distilled_patch16_224", VIT)
  if form != "no teacher":
    settings = {"kind": form, "alpha": 0.5 if form == "hard" else 0.9}
    config.task.update({"name": "distillation", "teacher": str(teacher(work)), **settings})
  return config


EXPERIMENTS = (
  ("masked autoencoding", masked_autoencoding, ("from scratch", "pretrained")),
  ("distillation", distillation, ("no teacher", "hard", "soft")),
)


def measure(out: Path, work: Path) -> list[dict[str, str]]:
  """The rows of results.csv, those of missing runs added one by one."""
  table = out / "results.csv"
  rows = list(csv.DictReader(table.open())) if table.exists() else []
  for seed in SEEDS:
    for experiment, make, forms in EXPERIMENTS:
      for form in forms:
        if any(
          (r["experiment"], r["form"], r["seed"]) == (experiment, form, str(seed)) for r in rows
        ):
          continue
        config = make(form, seed, work)
        begin = time.monotonic()
        found = main.train(config, work / f"{experiment} {form} {seed}".replace(" ", "_"))
        seconds = f"{time.monotonic() - begin:.0f}"
        top1 = f"{found['validation/top1']:.4f}"
        values = (experiment, form, str(seed), str(LABELS), str(STEPS), top1, seconds)
        rows.append(dict(zip(COLUMNS, values)))
        with table.open("w", newline="") as file:
          writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
          writer.writeheader()
          writer.writerows(rows)
  return rows


def draw(rows: list[dict[str, str]], png: Path) -> None:
  """Each run a point, the mean of the seeds a line."""
  figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
  for place, (experiment, _, forms) in enumerate(EXPERIMENTS):
    axes = figure.add_subplot(1, 2, place + 1)
    for x, form in enumerate(forms):
      values = [
        100 * float(r["top1"]) for r in rows if (r["experiment"], r["form"]) == (experiment, form)
      ]
      axes.plot([x] * len(values), values, "o", color="#0b63b0", alpha=0.6)
      axes.hlines(sum(values) / len(values), x - 0.25, x + 0.25, color="#d2541b")
    axes.set_xticks(range(len(forms)), forms, fontsize=8)
    axes.set_xlim(-0.6, len(forms) - 0.4)
    axes.set_title(f"{experiment}, {LABELS} labels", fontsize=9)
    axes.set_ylabel("held-out top-1, %", fontsize=8)
    axes.grid(True, axis="y", color="#dddddd")
  figure.savefig(png, metadata={"Software": None})


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--work", type=Path, default=Path("runs/mae_distillation"))
  arguments = parser.parse_args()
  found = measure(arguments.out, arguments.work)
  draw(found, arguments.out / "results.png")
