"""Masked autoencoding under EfficientTrain++: what it saves, and pretraining on CIFAR-10 with it.

    python docs/results/efficienttrain/mae.py --data zip:/path/cifar10.zip --workdir /tmp/mae

Pretrains a small ViT without labels, baseline and curriculum in turn, fine-tunes each on a few
labelled pictures, and one from scratch; a run that has ended is not done again. Writes `mae.csv`
(a line for each fine-tuned network) and `mae.png` beside this file, and prints the tables.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from hybrid_vit import build, main
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, load_config
from hybrid_vit.config_files import find_config
from hybrid_vit.evaluate import evaluate
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tables import write_table
from hybrid_vit.tools.summarize import count_multiply_adds

WAYS = ("from scratch", "MAE", "MAE, efficienttrain++")
COLORS = ("tab:gray", "tab:orange", "tab:blue")
NETWORK = dict(width=48, depth=3, num_heads=3, patch_size=4, position_size=8)
IMAGENET = 1_281_167


def pretraining(curriculum: bool, seed: int, data: str, part: str, epochs: float) -> ConfigDict:
  """The two differ in `config.curriculum` alone."""
  config = ConfigDict()
  config.seed = seed
  config.total_epochs = epochs
  if curriculum:
    config.curriculum = "efficienttrain++"
  config.model = dict(name="vit_base_patch16_224", arguments=NETWORK)
  config.task = dict(
    name="masked_autoencoding", mask_ratio=0.6, decoder=dict(width=32, depth=1, num_heads=2)
  )
  config.data = pictures(data, f"train{part}", "decode|random_crop(32, 4, 'reflect')|flip_lr")
  config.evaluation = dict(sets=dict(test=dict(split="test[:10%]", batch_size=500)))
  config.evaluate_every_epochs = epochs
  config.optimizer = adamw(2e-3, b2=0.95, warmup=2)
  config.checkpoint = dict(keep=1, keep_best=False)
  config.sinks = ()
  return config


def fine_tuning(start: Path | None, seed: int, data: str, part: str, epochs: float) -> ConfigDict:
  """On the labelled part, by the mean of the patches."""
  config = ConfigDict()
  config.seed = seed
  config.total_epochs = epochs
  if start is not None:
    config.init_from = str(start)
    config.reinitialize_head = True
  arguments = dict(NETWORK, pool="mean", pool_before_norm=True, drop_path_rate=0.1)
  config.model = dict(name="vit_base_patch16_224", arguments=arguments)
  config.task = dict(name="classification", label_smoothing=0.1)
  transform = "decode|random_crop(32, 4, 'reflect')|flip_lr|randaugment(2, 5)"
  config.data = pictures(data, f"train{part}", transform)
  config.evaluation = dict(sets=dict(test=dict(split="test", batch_size=500)))
  config.evaluate_every_epochs = epochs
  config.optimizer = adamw(1e-3, b2=0.999, warmup=2)
  config.checkpoint = dict(keep=1, keep_best=False)
  config.sinks = ()
  return config


def pictures(data: str, split: str, transform: str) -> dict:
  """CIFAR-10's."""
  return dict(
    source=data,
    split=split,
    batch_size=128,
    transform=transform,
    image_size=32,
    crop_ratio=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
  )


def adamw(rate: float, *, b2: float, warmup: float) -> dict:
  """Cosine to zero."""
  return dict(
    name="adamw",
    learning_rate=rate,
    b2=b2,
    weight_decay=0.05,
    gradient_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_epochs=warmup, end_learning_rate=0.0),
  )


def multiply_adds(values: ConfigDict, num_examples: int) -> float:
  """Of a whole pretraining: three forward passes a picture, each phase at its size."""
  run = build.build(Config(values), DataFacts(num_examples=num_examples))
  total, known = 0.0, {}
  for phase, task in zip(run.curriculum.phases, run.tasks):
    size = phase.shown_size or phase.image_size
    if size not in known:
      batch = {"image": jax.ShapeDtypeStruct((1, size, size, 3), "float32")}
      variables = jax.eval_shape(task.init, jax.random.key(0), batch)
      patches = (size // task.patch_size) ** 2
      batch["noise"] = jax.ShapeDtypeStruct((1, patches), "float32")
      known[size] = count_multiply_adds(
        lambda v, b, t=task: t.loss(v, b, jax.random.key(0))[0], variables, batch
      )
    total += 3.0 * phase.steps * phase.batch_size * known[size]
  return total


def published() -> str:
  """ViT-B on ImageNet-1K: 1600 epochs of pixels over 400 epochs' worth of the curriculum."""
  baseline = load_config(find_config("mae"), "vit_base,epochs=1600")
  short = load_config(find_config("mae"), "vit_base_hog,epochs=1600")
  short.curriculum = dict(name="efficienttrain++", epochs=400)
  whole, part = (multiply_adds(values, IMAGENET) for values in (baseline, short))
  return f"{whole:.4g} over {part:.4g} multiply-adds: {whole / part:.2f}"


def seen(values: ConfigDict, num_examples: int) -> int:
  """Examples of a training."""
  run = build.build(Config(values), DataFacts(num_examples=num_examples))
  return run.curriculum.examples_before(run.curriculum.total_steps)


def draw(rows: list[dict], path: Path) -> None:
  """Each network a point: its accuracy over what its pretraining cost."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(6, 4))
  for way, color in zip(WAYS, COLORS):
    chosen = [row for row in rows if row["way"] == way]
    axis.plot(
      [row["pretraining_multiply_adds"] / 1e12 for row in chosen],
      [row["test_top1"] for row in chosen],
      "o",
      color=color,
      label=way,
    )
  axis.set_xlabel("multiply-adds of the pretraining, 10^12")
  axis.set_ylabel("test top-1 after fine-tuning, %")
  axis.grid(alpha=0.3)
  axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def cli() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="folder:… or zip:… with train/ and test/")
  parser.add_argument("--workdir", type=Path, required=True, help="for the runs; not kept")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--part", default="[:20%]", help="pictures without labels")
  parser.add_argument("--examples", type=int, default=10_000, help="in that part")
  parser.add_argument("--labelled", default="[:4%]", help="pictures with labels")
  parser.add_argument("--epochs", type=float, default=20, help="of the baseline's pretraining")
  parser.add_argument("--fine_tuning_epochs", type=float, default=20)
  args = parser.parse_args()
  here, rows = Path(__file__).parent, []
  print("ViT-B, 1600 epochs of MAE over 400 of EfficientTrain++ with HOG:", published(), flush=True)
  for seed in args.seeds:
    for way in WAYS:
      start, cost, examples, loss = None, 0.0, 0, None
      if way != WAYS[0]:
        start = args.workdir / f"{'curriculum' if way == WAYS[2] else 'plain'}-{seed}"
        config = pretraining(way == WAYS[2], seed, args.data, args.part, args.epochs)
        if not (start / "export").exists():
          main.train(config, start)
        cost, examples = multiply_adds(config, args.examples), seen(config, args.examples)
        ends = [x for x in read_metrics(start / "metrics.jsonl") if x["kind"] == "eval/test"]
        loss = round(ends[-1]["loss"], 4)
      tuned = args.workdir / f"tuned-{WAYS.index(way)}-{seed}"
      config = fine_tuning(start, seed, args.data, args.labelled, args.fine_tuning_epochs)
      if not (tuned / "export").exists():
        main.train(config, tuned)
      rows.append(
        {
          "way": way,
          "seed": seed,
          "pretraining_examples": examples,
          "pretraining_multiply_adds": round(cost),
          "reconstruction_loss": loss,
          "test_top1": round(100 * evaluate(Config(config), tuned)["test/top1"], 2),
        }
      )
      print(rows[-1], flush=True)
  write_table(here / "mae.csv", rows)
  draw(rows, here / "mae.png")
  for way in WAYS:
    found = [row["test_top1"] for row in rows if row["way"] == way]
    print(f"{way}: {np.mean(found):.2f} ± {np.std(found, ddof=1) if len(found) > 1 else 0:.2f}")


if __name__ == "__main__":
  cli()
