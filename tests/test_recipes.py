"""The recipes' figures against those of the papers and the authors' code, in `recipe_figures.csv`.

An empty cell is a thing that a recipe has not. Betas, epsilons and how mixing is drawn are the same
in all of them, and stand here.
"""

import csv
import re
from pathlib import Path

import pytest

from hybrid_vit import build, recipes
from hybrid_vit.config import Config, load_config
from hybrid_vit.models.registry import model_entry
from hybrid_vit.optimizers import schedule_from_config

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
with open(HERE / "recipe_figures.csv", newline="") as file:
  ROWS = list(csv.DictReader(file))
with open(HERE / "dense_recipe_figures.csv", newline="") as file:
  DENSE_ROWS = list(csv.DictReader(file))
STEPS_PER_EPOCH = 1000
CLIP = "clip_quality_captions:"


def load(recipe, **keys):
  name, _, variant = recipe.partition(":")
  argument = ",".join([variant, *(f"{key}={value}" for key, value in keys.items())])
  return load_config(CONFIGS / f"{name}.py", argument)


def rates(config):
  """Where the schedule begins, its peak, and where it ends."""
  fields = config.optimizer.schedule
  length = config.get("total_steps") or round(config.total_epochs * STEPS_PER_EPOCH)
  schedule = schedule_from_config(
    Config(config.optimizer, "config.optimizer"),
    batch_size=config.data.batch_size,
    total_steps=length,
    steps_per_epoch=STEPS_PER_EPOCH,
  )
  warmup = fields.get("warmup_steps") or fields.get("warmup_epochs", 0) * STEPS_PER_EPOCH
  peak, first = float(schedule(warmup)), float(schedule(0))
  # The first step is one part of the warm-up on its way to the peak.
  start = (first - peak / warmup) / (1 - 1 / warmup) if warmup else None
  return start, peak, float(schedule(length))


def number(pattern, text):
  found = re.search(pattern, text)
  return float(found[1]) if found else None


def figures(config):
  """Every column of the table, read from a configuration as a run reads it."""
  transform, optimizer, task = config.data.transform, config.optimizer, config.task
  mixing, schedule = task.get("mixing"), optimizer.schedule
  start, peak, end = rates(config)
  drop_path = config.model.arguments.get(
    "drop_path_rate", model_entry(config.model.name).arguments.get("drop_path_rate")
  )
  warmup = [
    f"{schedule[f'warmup_{unit}']:g} {unit}"
    for unit in ("epochs", "steps")
    if schedule.get(f"warmup_{unit}")
  ]
  length = [
    f"{config[f'total_{unit}']:g} {unit}"
    for unit in ("epochs", "steps")
    if config.get(f"total_{unit}")
  ]
  found = re.search(r"randaugment\((\d+), (\d+)", transform)
  randaugment = f"{found[1]}x{found[2]}" if found else None
  for name, pattern in (("std", "magnitude_std"), ("max", "magnitude_max")):
    if f"{pattern}=" in transform:
      randaugment += f" {name} {number(pattern + r'=([0-9.]+)', transform):g}"
  if "increasing=True" in transform:
    randaugment += " rising"
  return {
    "optimizer": optimizer.name,
    "batch": config.data.batch_size,
    "rate": peak,
    "schedule": schedule.name,
    "start": start,
    "end": end,
    "warmup": next(iter(warmup), None),
    "length": next(iter(length)),
    "decay": optimizer.weight_decay,
    "clip": optimizer.get("gradient_clip_norm"),
    "drop_path": drop_path,
    "loss": task.loss,
    "smoothing": task.get("label_smoothing"),
    "mixup": mixing.get("mixup_alpha", 0.0) if mixing else None,
    "cutmix": mixing.get("cutmix_alpha", 0.0) if mixing else None,
    "erasing": number(r"random_erasing\(([0-9.]+)\)", transform),
    "randaugment": randaugment,
    "repeats": config.data.get("repeats"),
    "ema": config.get("ema_decay"),
    "layer_decay": optimizer.layer_decay.rate if "layer_decay" in optimizer else None,
  }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["recipe"])
def test_figures_are_those_of_the_paper_or_the_authors_code(row):
  config = load(row["recipe"])
  found = figures(config)
  assert list(found) == [column for column in row if column not in ("recipe", "source")]
  for name, value in found.items():
    said = row[name]
    if isinstance(value, int | float):
      assert said, f"{name} is {value}; none was expected"
      assert value == pytest.approx(float(said), rel=1e-3, abs=1e-11), name
    else:
      assert (value or "") == said, name
  # As torch and timm have them, and all of these recipes with them but one.
  b2 = 0.95 if row["recipe"].startswith(CLIP) else 0.999
  for name, default in (("b1", 0.9), ("b2", b2), ("eps", 1e-8), ("momentum", 0.9)):
    assert config.optimizer.get(name, default) == default
  if mixing := config.task.get("mixing"):
    assert mixing.get("probability", 1.0) == 1.0 and mixing.get("switch_probability", 0.5) == 0.5
    assert mixing.get("mode", "batch") == "batch"


def test_every_file_with_a_recipe_of_a_paper_has_its_figures():
  named = {row["recipe"].partition(":")[0] for row in ROWS}
  named |= {row["recipe"].partition(":")[0] for row in DENSE_ROWS}
  with open(HERE / "detection_recipe_figures.csv", newline="") as file:
    named |= {row["recipe"].partition(":")[0] for row in csv.DictReader(file)}
  own = {"cifar10", "quickstart", "finetune"}
  own |= {f"finetune_{task}" for task in ("segmentation", "depth", "detection", "panoptic")}
  named |= {"focalnet_mask2former", "moat_panoptic"}  # tests/test_mask_recipes.py
  assert named | own == {path.stem for path in CONFIGS.glob("*.py")}


@pytest.mark.parametrize("row", DENSE_ROWS, ids=lambda row: row["recipe"])
def test_dense_recipes_have_their_figures(row):
  config = load(row["recipe"])
  optimizer, task, schedule = config.optimizer, config.task, config.optimizer.schedule
  inference, length = task.inference, config.get("total_steps")
  decay = optimizer.get("layer_decay")
  crop, stride = inference.get("crop"), inference.get("stride")
  found = {
    "batch": config.data.batch_size,
    "crop": config.data.image_size,
    "rate": optimizer.learning_rate,
    "decay": optimizer.weight_decay,
    "warmup": f"{schedule.warmup_steps} steps" if length else f"{schedule.warmup_epochs:g} epochs",
    "length": f"{length} steps" if length else f"{config.total_epochs} epochs",
    "power": schedule.get("power"),
    "drop_path": config.model.arguments.get("drop_path_rate"),
    "layer_decay": decay["rate"] if decay else None,
    "head": f"{task.head.name} {task.head.get('channels', '')}".strip(),
    "neck": (task.get("neck") or {}).get("name"),
    "auxiliary": task.auxiliary_weight if task.get("auxiliary") else None,
    "slide": f"{crop[0]}/{stride[-1]}" if inference.mode == "slide" else None,
  }
  for name, value in found.items():
    wanted = row[name]
    told = "" if value is None else value
    same = str(told) == wanted if isinstance(told, str) else float(told) == float(wanted or "nan")
    assert same, (name, value, wanted)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["recipe"])
def test_rates_follow_the_batch_as_in_the_authors_code(row):
  """The peak does but of CLIP, which is told its own; start and end in the codes that do so."""
  start, peak, end = rates(load(row["recipe"], batch_size=2 * int(row["batch"])))
  times = 1 if row["recipe"].startswith(CLIP) else 2
  assert peak == pytest.approx(times * float(row["rate"]), rel=1e-4)
  follow = row["recipe"].partition(":")[0] in ("swin", "focalnet", "smt", "revcol")
  for name, found in (("start", start), ("end", end)):
    if row[name]:
      factor = 2 if follow or row["schedule"] == "constant" else 1
      assert found == pytest.approx(factor * float(row[name]), rel=1e-3, abs=1e-11), name


@pytest.mark.parametrize(
  "recipe", [row["recipe"] for row in ROWS if row["recipe"].endswith("_22k")]
)
def test_pretraining_on_22k_holds_out_fifty_thousand_pictures_of_its_folder(recipe):
  config = Config(load(recipe))
  (evaluation,) = build.read_evaluation(config, build.preprocessing_of(config))
  assert config.data.split == f"all[{recipes.HELD_OUT_OF_22K}:]"
  assert evaluation.split == f"all[:{recipes.HELD_OUT_OF_22K}]"
  assert evaluation.source == config.data.source == "folder:data/imagenet22k"
  assert config.model.num_classes == (21842 if "focalnet" in recipe else 21841)


@pytest.mark.parametrize(
  ("variant", "model", "weights", "captions", "towers", "size"),
  [
    ("datacomp12m", "mobileclip_b", (1.0, 0.0), 1, ("vit_b16", "mobileclip_b"), 224),
    ("datacompdr12m", "mobileclip_b", (0.0, 1.0), 2, ("vit_b16", "mobileclip_b"), 224),
    ("datacompdr1b", "mobileclip_b", (0.25, 0.75), 2, ("vit_b16", "mobileclip_b"), 224),
    ("datacompdr1b", "mobileclip_s0", (0.0, 1.0), 2, ("mci0", "mobileclip_s0"), 256),
    ("datacompdr1b", "mobileclip_s1", (0.0, 1.0), 2, ("mci1", "mobileclip_s1"), 256),
    ("datacompdr1b", "mobileclip_s2", (0.0, 1.0), 2, ("mci2", "mobileclip_s2"), 256),
  ],
)
def test_clip_has_the_losses_captions_and_towers_of_the_scripts(
  variant, model, weights, captions, towers, size
):
  """ml-mobileclip's `run_*.sh`: the S models on the large set have no contrastive term."""
  config = load(CLIP + variant, model=model)
  task = config.task
  assert (task.contrastive_weight, task.distillation_weight) == weights
  assert task.teacher_scale == task.max_scale == 100.0
  drawn = re.search(r"captions\(([^)]*)\)\|tokenize\(77\)", config.data.transform)
  assert len(drawn[1].split(",")) == captions
  assert (config.model.name, task.text_tower) == towers
  assert build.preprocessing_of(Config(config)).image_size == size
