"""The recipes of COCO: figures beside the authors', their optimizers on their networks."""

import csv
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_vit import build, detection_recipes
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.heads.detectors import create_detector
from hybrid_vit.heads.rcnn_settings import detectron2_settings
from hybrid_vit.models.depth import layer_depths
from hybrid_vit.models.registry import create_model
from hybrid_vit.optimizers import (
  DEFAULT_WEIGHT_DECAY_RULES,
  learning_rate_factors,
  match_rules,
  schedule_from_config,
)
from hybrid_vit.sharding import path_name

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
with open(HERE / "detection_recipe_figures.csv", newline="") as file:
  ROWS = list(csv.DictReader(file))
# Pictures of COCO with objects, and with sides of at least 32 pixels.
COCO = 117_266
PICTURES = {
  "single": r"decode\|resize_short_side\(800, 1333, within=\{canvas\}\)\|flip_lr\|",
  "multi": r"decode\|flip_lr\|detr_augmentation\(.*within=\{canvas\}\)\|",
  "jitter": r"decode\|flip_lr\|large_scale_jitter\(\{canvas\}\)\|boxes_from_masks\|",
}
# Parameters of which each set of rules spares those on the left and decays those on the right.
SPARED = {
  "nothing": ("", r"backbone/.*(norm|bias)"),
  "norms": (
    r"backbone/.*norm",
    r"backbone/.*(attention|projection|stem/.*conv\w*)/bias|^rpn.*bias",
  ),
  "norms and tables": (r"backbone/.*(norm|position_)", r"backbone/.*attention/.*bias$|^rpn.*bias"),
  "vectors": (r"(bias|scale|gamma|alpha\d)$", r"kernel$"),
}


def load(recipe):
  name, _, variant = recipe.partition(":")
  return load_config(CONFIGS / f"{name}.py", variant)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["recipe"])
def test_figures_are_those_of_the_authors_code(row):
  config = load(row["recipe"])
  optimizer, schedule = config.optimizer, config.optimizer.schedule
  (kind,) = [k for k, text in PICTURES.items() if re.match(text, config.data.transform)]
  rules = optimizer.get("learning_rate_rules")
  found = {
    "batch": config.data.batch_size,
    "detector": config.task.detector.name,
    "rate": optimizer.learning_rate,
    "decay": optimizer.weight_decay,
    "warmup": schedule.warmup_steps,
    "epochs": config.total_epochs,
    "drops": " ".join(map(str, schedule.drop_epochs)),
    "drop_path": config.model.arguments.get("drop_path_rate"),
    "layer_decay": optimizer.layer_decay.rate if "layer_decay" in optimizer else None,
    "clip": optimizer.get("gradient_clip_norm"),
    "backbone_rate": dict(rules)["^backbone/"] if rules else None,
    "pictures": kind,
  }
  for name, value in found.items():
    told = "" if value is None else value
    same = told == row[name] if isinstance(told, str) else float(told) == float(row[name] or "nan")
    assert same, (name, value, row[name])
  masks = config.task.detector.name.endswith("mask_rcnn")
  assert ("crop_masks" in config.data.transform) == masks == (config.task.mask_size > 0)
  assert config.task.inference.canvases == config.data.canvases
  assert config.optimizer.name == "adamw" and schedule.get("drop_factor", 0.1) == 0.1


def test_the_rate_is_mmdetections():
  config = load("swin_coco:mask_rcnn_swin_tiny_1x")
  per_epoch = COCO / 16
  schedule = schedule_from_config(
    Config(config.optimizer, "config.optimizer"),
    batch_size=16,
    total_steps=round(12 * per_epoch),
    steps_per_epoch=per_epoch,
  )
  # The first step is the first of the warm-up's 500.
  start = 1e-4 * (1e-3 + (1 - 1e-3) / 500)
  at = lambda epoch: round(epoch * per_epoch)  # noqa: E731
  for step, rate in (
    (0, start), (249, 1e-4 * (1e-3 + (1 - 1e-3) / 2)), (500, 1e-4), (at(8) - 1, 1e-4),
    (at(8), 1e-5), (at(11) - 1, 1e-5), (at(11), 1e-6), (at(12) - 1, 1e-6),
  ):  # fmt: skip
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-4), step


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    ({"drop_epochs": (8, 11), "drop_steps": (5,)}, "there are drop_epochs and drop_steps"),
    ({"drop_epochs": None}, "one of them; there are none"),
    ({"drop_epochs": (11, 8)}, r"drop_epochs` is \(11, 8\); rising numbers above 0"),
    ({"drop_epochs": (8, "11")}, "rising numbers above 0"),
  ],
)
def test_drops_that_cannot_be_are_said(changes, error):
  fields = load("swin_coco:mask_rcnn_swin_tiny_1x").optimizer.to_dict()
  fields["schedule"] |= changes
  fields["schedule"] = {k: v for k, v in fields["schedule"].items() if v is not None}
  with pytest.raises(ConfigError, match=error):
    schedule_from_config(Config(fields), batch_size=16, total_steps=1000, steps_per_epoch=80)


# One of each set of rules.
WHOLE = (
  "focalnet_coco:mask_rcnn_focalnet_tiny_srf_1x",
  "smt_coco:mask_rcnn_smt_s_1x",
  "smt_coco:dino_smt_s_1x",
  "l2vit_coco:retinanet_l2vit_tiny_1x",
  "revcol_coco:revcol_tiny",
  "moat_coco:moat_0",
  "clip_coco:mci0",
  "swin_coco:cascade_mask_rcnn_swin_tiny_1x",
  "swin_coco:mask_rcnn_convnext_tiny_3x",
)


@pytest.fixture(scope="module", params=WHOLE)
def built(request):
  config = Config(load(request.param))
  run = build.build(config, DataFacts(num_examples=COCO))
  config.assert_all_read()
  return request.param, config, run


def test_a_whole_run_of_each_kind_builds(built):
  recipe, config, run = built
  assert run.settings.best_metric == "validation/box_ap" and run.optimizer is not None
  shapes = [batch["image"].shape for batch in run.canvas_batches(0)]
  assert shapes == [(config.data.batch_size, *canvas, 3) for canvas in config.data.canvases]
  assert run.curriculum.total_steps == round(config.total_epochs * COCO / config.data.batch_size)
  (row,) = [row for row in ROWS if row["recipe"] == recipe] or [None]
  if row is None:
    return
  rules = config.optimizer.get("weight_decay_rules") or DEFAULT_WEIGHT_DECAY_RULES
  factors = match_rules(run.params, rules, field="rules", must_match=False)
  named = {path_name(p): f for p, f in jax.tree_util.tree_leaves_with_path(factors)}
  spared, decayed = SPARED[row["spared"]]
  assert all(f == 0 for n, f in named.items() if spared and re.search(spared, n))
  kept = [f for n, f in named.items() if re.search(decayed, n) and not re.search(spared or "$^", n)]
  assert kept and all(f == 1 for f in kept)


def test_rates_of_layers_and_of_dinos_backbone(built):
  recipe, config, run = built
  factors = learning_rate_factors(config.optimizer, run.params)
  if factors is None:
    assert "dino" not in recipe and "layer_decay" not in config.optimizer
    return
  named = {path_name(p): f for p, f in jax.tree_util.tree_leaves_with_path(factors)}
  heads = {f for n, f in named.items() if not n.startswith("backbone/")}
  assert heads == {1.0}
  backbone = {n: f for n, f in named.items() if n.startswith("backbone/")}
  if "dino" in recipe:
    assert set(backbone.values()) == {0.1}
    return
  # The authors' constructors: the stem is the deepest, every layer one factor less.
  rate = config.optimizer.layer_decay.rate
  layers = 7 if "convnext" in recipe else max(layer_depths(named).values())
  assert min(backbone.values()) == pytest.approx(rate**layers)
  assert {n for n, f in backbone.items() if f == min(backbone.values())} == {
    n for n in backbone if n.startswith("backbone/stem/")
  }
  if "convnext" in recipe:
    for name, layer in (
      ("stage1_block2/", 1), ("stage2_downsample/", 2), ("stage2_block0/", 2),
      ("stage3_downsample/", 3), ("stage3_block2/", 3), ("stage3_block3/", 4),
      ("stage3_block8/", 5), ("stage4_downsample/", 6), ("stage4_block2/", 6), ("stage1_norm/", 7),
    ):  # fmt: skip
      own = [f for n, f in backbone.items() if n.startswith(f"backbone/{name}")]
      assert own and np.allclose(own, rate ** (7 - layer)), name


def test_a_local_try_keeps_the_cascade_and_an_unknown_schedule_is_named():
  config = load("revcol_coco:runlocal")
  assert config.task.detector.name == "cascade_mask_rcnn"
  assert "canvases" not in config.data and "layer_decay" not in config.optimizer
  with pytest.raises(ValueError, match="schedule '2x' is not one of 1x, 3x"):
    detection_recipes.coco(
      "swin_tiny", detection_recipes.MASK_RCNN, schedule="2x", drop_path_rate=0.1
    )
  config = load("finetune_detection:runlocal")
  assert config.task.detector.to_dict() == load("clip_coco:runlocal").task.detector.to_dict()


def test_canvases_and_transforms_go_together():
  config = load("swin_coco:mask_rcnn_swin_tiny_1x")
  preprocessing = build.preprocessing_of(Config(config))
  phase = build.read_curriculum(Config(config), COCO, preprocessing).phases[0]
  assert "within=(800, 1344))" in phase.transform and "pad_to((800, 1344))" in phase.transform
  (other,) = phase.other_transforms
  assert "within=(1344, 800))" in other and "pad_to((1344, 800))" in other
  config.data.canvases = ()
  with pytest.raises(ConfigError, match=r"canvases is \(\) .* were expected together"):
    build.read_curriculum(Config(config), COCO, preprocessing)


@pytest.mark.parametrize(("detector", "fits"), [("cascade_mask_rcnn", True), ("dino", False)])
def test_batch_norm_groups_need_a_batch_norm_somewhere(detector, fits):
  config = load("swin_coco:mask_rcnn_swin_tiny_1x")
  config.batch_norm_groups = 8
  config.task.detector = dict(name=detector)
  config.task.mask_size = 56 if fits else 0
  given = Config(config), DataFacts(), build.preprocessing_of(Config(config)), None
  if fits:
    (task,), _ = build.build_tasks(*given)
    assert task.model.stages[0].batch_norm_groups == 8
    return
  with pytest.raises(ConfigError, match="is 8, and neither swin_tiny nor what the task"):
    build.build_tasks(*given)


def test_vitdet_trains_as_detectron2_does():
  for variant, stages in (("vit_b16", 1), ("vit_b16_cascade", 3)):
    config = load(f"clip_coco:{variant}")
    assert (config.total_steps, config.data.batch_size) == (184_375, 64)
    assert config.optimizer.schedule.drop_steps == (163_889, 177_546)
    assert config.optimizer.layer_decay.rate == 0.7 and config.optimizer.weight_decay == 0.1
    assert re.match(PICTURES["jitter"], config.data.transform)
    parts = config.task.detector.to_dict()
    model = create_detector(parts.pop("name"), create_model("vit_b16", 0), 80, masks=True, **parts)
    assert model.settings == detectron2_settings(stages)
    assert len(model.mask_heads) == 1 and len(model.stages) == stages
    assert model.stages[0].class_agnostic == (stages == 3)


def test_a_local_try_is_of_the_detector_asked_for_or_refused():
  def local(detector):
    return load(f"finetune_detection:runlocal,detector={detector}").task.detector.name

  assert local("cascade_mask_rcnn") == "cascade_mask_rcnn"
  with pytest.raises(ValueError, match="a local try of 'dino'; one of mask_rcnn, cascade"):
    local("dino")
