"""Baseline and EfficientTrain++ on CIFAR-10, a small ResNet, several seeds: accuracy over time.

    python docs/results/efficienttrain/cifar10.py --data zip:/path/cifar10.zip --workdir /tmp/cifar

Trains one after the other, baseline and curriculum in turn; a run that has ended is not done again.
Writes `cifar10.csv` (a line for each evaluation) and `cifar10.png` beside this file.
"""

import argparse
import csv
import functools
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from hybrid_vit import main
from hybrid_vit.build import DataFacts, Run, build
from hybrid_vit.config import Config
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tools.summarize import count_multiply_adds

WAYS = ("baseline", "efficienttrain++")
COLUMNS = (
  "way", "seed", "step", "examples", "training_seconds", "waiting_seconds", "multiply_adds",
  "test_top1", "test_loss",
)  # fmt: skip


def get_config(way: str, seed: int, data: str, epochs: float, part: str) -> ConfigDict:
  """The two differ in `config.curriculum` alone."""
  config = ConfigDict()
  config.seed = seed
  config.total_epochs = epochs
  if way != "baseline":
    config.curriculum = way  # two thirds of the budget: the published setting
  config.log_every_steps = 10
  config.evaluate_every_epochs = epochs / 8 * (1.0 if way == "baseline" else 1.5)
  config.model = dict(
    name="resnet50",
    arguments=dict(stem_width=32, widths=(64, 128, 256), depths=(1, 1, 1), batch_norm_momentum=0.9),
  )
  config.task = dict(name="classification", label_smoothing=0.1)
  config.data = dict(
    source=data,
    split=f"train{part}",
    batch_size=128,
    transform="decode|random_crop(32, 4, 'reflect')|flip_lr"
    "|randaugment(2, 9, magnitude_std=0.5, increasing=True)",
    image_size=32,
    crop_ratio=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
  )
  config.evaluation = dict(sets=dict(test=dict(split="test", batch_size=500)))
  config.optimizer = dict(
    name="adamw",
    learning_rate=3e-3,
    weight_decay=0.05,
    gradient_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_epochs=1, end_learning_rate=1e-5),
  )
  config.checkpoint = dict(keep=1, keep_best=False)
  config.sinks = ()
  return config


def points(way: str, seed: int, run: Run, workdir: Path) -> list[dict]:
  """A line for each evaluation; times are those of training alone, from the log's windows.

  "waiting_seconds" is the part in which the loop waited for the host's pictures. Steps that were
  sent off before run on in it, so the rest is not the time of the steps.
  """
  curriculum = run.curriculum
  cost = [_multiply_adds(run, phase) for phase in range(len(curriculum.phases))]
  timings = [json.loads(line) for line in (workdir / "timings.jsonl").read_text().splitlines()]
  seconds, before, at = np.zeros(2), 0, {0: np.zeros(2)}
  for line in timings:
    if "examples_per_second" not in line or line["step"] <= before:
      continue
    seen = curriculum.examples_before(line["step"]) - curriculum.examples_before(before)
    whole = seen / line["examples_per_second"]
    seconds = seconds + np.array([whole, whole * line["data_wait_fraction"]])
    before = line["step"]
    at[before] = seconds
  found = []
  for line in read_metrics(workdir / "metrics.jsonl"):
    if line["kind"] != "eval/test":
      continue
    step = line["step"]
    ends = [*curriculum.first_steps[1:], curriculum.total_steps]
    counted = sum(
      max(0, min(step, last) - first) * curriculum.phases[k].batch_size * cost[k]
      for k, (first, last) in enumerate(zip(curriculum.first_steps, ends))
    )
    found.append(
      {
        "way": way,
        "seed": seed,
        "step": step,
        "examples": curriculum.examples_before(step),
        **{
          name: round(float(np.interp(step, list(at), [pair[i] for pair in at.values()])), 2)
          for i, name in enumerate(("training_seconds", "waiting_seconds"))
        },
        "multiply_adds": round(3 * counted),
        "test_top1": round(line["top1"], 4),
        "test_loss": round(line["loss"], 4),
      }
    )
  return found


@functools.lru_cache(maxsize=32)
def _forward(model: object, size: int) -> int:
  images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  return count_multiply_adds(lambda v, x: model.apply(v, x)[0], variables, images)


def _multiply_adds(run: Run, phase: int) -> int:
  shown = run.curriculum.phases[phase].shown_size or run.curriculum.phases[phase].image_size
  return _forward(run.tasks[phase].model, shown)


def draw(rows: list[dict], path: Path) -> None:
  """Accuracy over the time of training, and over its multiply-adds."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
  panels = (
    ("training_seconds", 60.0, "minutes of training"),
    ("multiply_adds", 1e12, "multiply-adds, 10^12"),
  )
  for axis, (column, unit, label) in zip(axes, panels):
    for way, colour in zip(WAYS, ("tab:gray", "tab:blue")):
      for number, seed in enumerate(sorted({row["seed"] for row in rows})):
        chosen = [row for row in rows if row["way"] == way and row["seed"] == seed]
        axis.plot(
          [row[column] / unit for row in chosen],
          [100 * row["test_top1"] for row in chosen],
          "o-",
          color=colour,
          markersize=3,
          linewidth=1,
          label=None if number else way,
        )
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("test top-1, %")
  axes[0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def summary(rows: list[dict]) -> str:
  """Mean and spread of the ends, as a Markdown table."""
  lines = [
    "| way | test top-1, % (mean ± deviation) | minutes of training | of these waiting for data | "
    "multiply-adds | examples |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  for way in WAYS:
    seeds = sorted({row["seed"] for row in rows if row["way"] == way})
    ends = [[r for r in rows if r["way"] == way and r["seed"] == s][-1] for s in seeds]
    if not ends:
      continue
    mean = {column: np.mean([row[column] for row in ends]) for column in COLUMNS[2:]}
    spread = 100 * np.std([row["test_top1"] for row in ends], ddof=1) if len(ends) > 1 else 0.0
    lines.append(
      f"| {way} | {100 * mean['test_top1']:.2f} ± {spread:.2f} | "
      f"{mean['training_seconds'] / 60:.2f} | {mean['waiting_seconds'] / 60:.2f} | "
      f"{mean['multiply_adds']:.3g} | "
      f"{mean['examples']:,.0f} |"
    )
  return "\n".join(lines)


def cli() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="folder:… or zip:… with train/ and test/")
  parser.add_argument("--workdir", type=Path, required=True, help="for the runs; not kept")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--epochs", type=float, default=20, help="of the baseline")
  parser.add_argument("--part", default="[:10%]", help="of the training split")
  parser.add_argument("--classes", type=int, default=10)
  parser.add_argument("--examples", type=int, default=5000, help="in that part")
  args = parser.parse_args()
  here, rows = Path(__file__).parent, []
  for seed in args.seeds:
    for way in WAYS:
      workdir = args.workdir / f"{way}-{seed}"
      config = get_config(way, seed, args.data, args.epochs, args.part)
      if not (workdir / "export").exists():
        main.train(config, workdir)
      facts = DataFacts(num_examples=args.examples, num_classes=args.classes)
      rows += points(way, seed, build(Config(config), facts), workdir)
      with (here / "cifar10.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
      print(summary(rows), flush=True)
  draw(rows, here / "cifar10.png")


if __name__ == "__main__":
  cli()
