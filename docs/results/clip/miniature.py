"""Caption quality in miniature: two small towers on scenes, exact captions against noisy ones.

    python docs/results/clip/miniature.py --workdir /tmp/clip

At an equal budget of steps, from the same first weights: captions that are exact, and ones of which
three quarters are shuffled words, wrong attributes or what web pages have beside pictures. Of each
network: zero-shot top-1 on pairs of shape and colour that no training scene has (64 classes), and,
by a linear probe of its frozen maps, mIoU of a segmentation and RMSE of depth on held-out scenes.
Several numbers of pairs, several seeds at one of them; and the maps of new weights, for comparison.
Writes `miniature.csv` (a line a network) and `miniature.png` beside this file.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import load_clip, main, recipes
from hybrid_vit.config import load_config
from hybrid_vit.config_files import find_config
from hybrid_vit.data.scenes import SceneSource
from hybrid_vit.tables import write_table

QUALITIES = ("exact", "noisy")
COLORS = {"exact": "tab:blue", "noisy": "tab:red", "none": "tab:gray"}
SIZE, OBJECTS, NOISE = 48, 2, 0.75
MAPS = ("stage2", "stage3")
PROBED, HELD_OUT = 600, 300


def get_config(quality: str, pairs: int, seed: int, steps: int):
  """Two that differ in quality alone differ in one word."""
  config = load_config(find_config("clip_quality_captions"), f"runlocal,steps={steps}")
  config.seed = seed
  config.data.source = f"scenes:size={SIZE},objects={OBJECTS},noise={NOISE},count={pairs}"
  config.data.transform = f"decode|resize({SIZE})|captions({quality!r})|tokenize(40)"
  for name, item in config.evaluation.sets.items():
    count = 500 if name == "held_out" else 200
    item.source = item.source.partition(",count")[0].replace("objects=2", f"objects={OBJECTS}")
    item.source += f",count={count}"
  config.evaluate_every_steps = steps
  config.sinks = ()
  return config


def maps_of(model, variables, images):
  """The named maps of the image tower, brought to the first one's grid, `[N, h, w, C]`."""

  @jax.jit
  def run(variables, images):
    tower = {name: tree["image"] for name, tree in variables.items() if tree}
    x = (images.astype(jnp.float32) - 255 * jnp.asarray(recipes.IMAGENET_MEAN)) / (
      255 * jnp.asarray(recipes.IMAGENET_STD)
    )
    _, endpoints = model.image.apply(tower, x, train=False)
    found = [endpoints[name] for name in MAPS]
    rows, columns = found[0].shape[1:3]
    return jnp.concatenate(
      [jnp.repeat(jnp.repeat(m, rows // m.shape[1], 1), columns // m.shape[2], 2) for m in found],
      axis=-1,
    )

  parts = [np.asarray(run(variables, images[i : i + 100])) for i in range(0, len(images), 100)]
  return np.concatenate(parts)


def scenes(split: str, count: int) -> dict[str, np.ndarray]:
  source = SceneSource(split, size=SIZE, count=count, objects=OBJECTS, combinations="all")
  found = [source[i] for i in range(count)]
  return {name: np.stack([scene[name] for scene in found]) for name in ("image", "map", "depth")}


def cells(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """`[N, S, S, …]` → `[N * cells, pixels of a cell, …]`."""
  count, rows, columns = maps.shape[0], *grid
  step = maps.shape[1] // rows
  x = maps.reshape(count, rows, step, columns, step, *maps.shape[3:])
  return np.moveaxis(x, 3, 2).reshape(count * rows * columns, step * step, *maps.shape[3:])


def probe(model, variables) -> dict[str, float]:
  """Ridge regression from each cell of the maps to its pixels' classes and depths, closed form."""
  known, held = scenes("validation", PROBED), scenes("test", HELD_OUT)
  features = [maps_of(model, variables, part["image"]) for part in (known, held)]
  grid = features[0].shape[1:3]
  mean, std = features[0].mean((0, 1, 2)), features[0].std((0, 1, 2)) + 1e-6
  x, y = (((f - mean) / std).reshape(-1, f.shape[-1]) for f in features)
  x, y = (np.concatenate([f, np.ones((len(f), 1))], 1).astype(np.float64) for f in (x, y))
  classes = int(known["map"].max()) + 1
  targets = np.eye(classes)[cells(known["map"], grid)].reshape(len(x), -1)
  targets = np.concatenate([targets, cells(known["depth"], grid)], axis=1)
  # As strong as a hundredth of the features' own variance.
  gram = x.T @ x + 0.01 * len(x) * np.eye(x.shape[1])
  answer = y @ np.linalg.solve(gram, x.T @ targets)
  pixels = targets.shape[1] // (classes + 1)
  predicted = answer[:, : pixels * classes].reshape(len(y), pixels, classes).argmax(-1)
  truth = cells(held["map"], grid)
  confusion = np.bincount((truth * classes + predicted).ravel(), minlength=classes**2)
  confusion = confusion.reshape(classes, classes)
  union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
  depth = answer[:, pixels * classes :] - cells(held["depth"], grid)
  return {
    "miou": round(100 * float(np.mean(np.diag(confusion) / union)), 2),
    "depth_rmse": round(float(np.sqrt(np.mean(np.square(depth)))), 4),
  }


def run(quality: str, pairs: int, seed: int, steps: int, workdir: Path) -> dict:
  """One network: trained where that is not done yet, then probed."""
  directory = workdir / f"{quality}-{pairs}-{seed}"
  begin = time.monotonic()
  if not (directory / "result.json").exists():
    results = main.train(get_config(quality, pairs, seed, steps), directory)
    seconds = time.monotonic() - begin
    (directory / "result.json").write_text(json.dumps({**results, "seconds": seconds}))
  found = json.loads((directory / "result.json").read_text())
  model = load_clip(directory)
  return {
    "captions": quality,
    "pairs": pairs,
    "seed": seed,
    "steps": steps,
    "zero_shot_top1": round(100 * found["held_out/top1"], 2),
    "image_to_text_r1": round(100 * found["captions/image_to_text_r1"], 2),
    **probe(model.model, model.variables),
    "minutes": round(found["seconds"] / 60, 2),
  }


def draw(rows: list[dict], path: Path) -> None:
  """Each network a point over the number of pairs, means as lines."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  panels = (
    ("zero_shot_top1", "zero-shot top-1 on unseen pairs, %"),
    ("miou", "mIoU of a linear probe, %"),
    ("depth_rmse", "depth RMSE of a linear probe, m"),
  )
  figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
  for axis, (column, label) in zip(axes, panels):
    for quality in QUALITIES:
      own = [row for row in rows if row["captions"] == quality]
      sizes = sorted({row["pairs"] for row in own})
      means = [np.mean([r[column] for r in own if r["pairs"] == n]) for n in sizes]
      name = "exact" if quality == "exact" else f"{NOISE:.0%} of them bad"
      axis.plot(sizes, means, "-", color=COLORS[quality], label=name)
      points = [(row["pairs"], row[column]) for row in own]
      axis.plot(*zip(*points), "o", color=COLORS[quality], markersize=4)
    for row in rows:
      if row["captions"] == "none" and row[column] is not None:
        axis.axhline(row[column], color=COLORS["none"], linestyle=":", label="new weights")
    axis.set_xscale("log")
    sizes = sorted({row["pairs"] for row in rows if row["pairs"]})
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    axis.set_xlabel("pairs")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
  axes[1].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=110)


def cli() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, required=True, help="for the runs; not kept")
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--pairs", type=int, nargs="+", default=[400, 1600, 6400])
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--seeds_at", type=int, default=6400, help="pairs of which all seeds are run")
  args = parser.parse_args()
  jax.config.update("jax_compilation_cache_dir", str(args.workdir / "compiled"))
  here, rows = Path(__file__).parent, []
  # The figure of several seeds first.
  for pairs in sorted(args.pairs, key=lambda n: n != args.seeds_at):
    for seed in args.seeds if pairs == args.seeds_at else args.seeds[:1]:
      for quality in QUALITIES:
        rows.append(run(quality, pairs, seed, args.steps, args.workdir))
        print(rows[-1], flush=True)
        write_table(here / "miniature", rows)
  model = load_clip(args.workdir / f"{QUALITIES[0]}-{args.seeds_at}-{args.seeds[0]}").model
  begun = jax.jit(model.init)(
    jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, 40), jnp.int32)
  )
  rows.append(
    {"captions": "none", "pairs": 0, "seed": 0, "steps": 0, "zero_shot_top1": None,
     "image_to_text_r1": None, **probe(model, begun), "minutes": 0.0}
  )  # fmt: skip
  write_table(here / "miniature", rows)
  draw(rows, here / "miniature.png")


if __name__ == "__main__":
  cli()
