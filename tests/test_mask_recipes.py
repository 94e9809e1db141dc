"""Recipes of Mask2Former: figures of the authors' files, and sizes of whole systems."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_vit import build, mask_recipes
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.data.scenes import SceneSource
from hybrid_vit.optimizers import match_rules
from hybrid_vit.tasks.kmax_losses import KMaXLoss
from hybrid_vit.tools.summarize import count_parameters

CONFIGS = Path(__file__).parents[1] / "configs"
FOCALNET, OWN = CONFIGS / "focalnet_mask2former.py", CONFIGS / "finetune_panoptic.py"
MOAT = CONFIGS / "moat_panoptic.py"


def shapes_of(config, size=64):
  """The parameters of a recipe's network, as shapes."""
  config = Config(config)
  preprocessing = build.preprocessing_of(config)
  tasks, _ = build.build_tasks(config, DataFacts(), preprocessing, None)
  batch = {"image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)}
  return tasks[-1], jax.eval_shape(tasks[-1].init, jax.random.key(0), batch)["params"]


@pytest.mark.parametrize(
  ("variant", "queries", "classes", "parameters"),
  [("coco_panoptic", 200, 133, 225_900_838), ("ade20k", 100, 150, 225_854_007)],
)
def test_whole_systems_have_their_published_size(variant, queries, classes, parameters):
  """226 million of COCO; 218 of ADE20K were published, which this network has not."""
  task, params = shapes_of(load_config(FOCALNET, variant))
  head, pairs = params["head"], params["head"]["predictor"]["classifier"]["kernel"].shape[-1]
  assert head["query_features"].shape == (queries, 256) and pairs == classes + 1
  assert sum(name.startswith("decoder") for name in head) == 9
  assert count_parameters(params) == parameters
  assert task.loss_settings.num_points == 12_544 and task.loss_settings.num_candidates == 37_632


@pytest.mark.parametrize(
  ("variant", "whole", "backbone"),
  [
    ("tiny_moat_0", 37_072_618, 3_097_836),
    ("moat_0", 66_523_266, 27_076_356),
    # As wide as a ResNet-50, over which kMaX's head has as many as published.
    ("moat_4", 48_928_830 + 481_161_088, 481_161_088),
  ],
)
def test_moat_under_kmax_has_the_parameters_of_both(variant, whole, backbone):
  task, params = shapes_of(load_config(MOAT, variant))
  head = params["head"]
  assert count_parameters(params) == whole and count_parameters(params["backbone"]) == backbone
  assert head["decoder"]["cluster_centers"].shape == (128, 256)
  assert sum(name.startswith("layer") for name in head["decoder"]) == 6
  assert task.loss_settings == KMaXLoss() and task.separable
  # Attention is global, whatever the picture, over plain maps.
  model = task.model.backbone
  assert set(model.window_sizes) == {None} and model.pool_size == 3
  assert model.output_activation == "none"


def test_figures_of_kmax_are_those_of_the_authors_files():
  config = load_config(MOAT)
  optimizer, schedule = config.optimizer, config.optimizer.schedule
  assert (config.total_steps, config.data.batch_size, config.data.image_size) == (150_000, 64, 1281)
  assert (optimizer.learning_rate, optimizer.weight_decay) == (5e-4, 0.05)
  assert (schedule.name, schedule.power, schedule.warmup_steps) == ("polynomial", 0.9, 5000)
  assert dict(optimizer.learning_rate_rules) == {"^backbone/": 0.1, ".*": 1.0}
  assert config.task.head == ConfigDict(dict(name="kmax", drop_path_rate=0.2))
  assert config.task.inference.scale == (1281, 1281)
  assert config.task.inference.canvases == ((1281, 1281),)
  assert "large_scale_jitter({image_size}, (0.3, 1.7))|pad_to({image_size})" in (
    config.data.transform
  )


def test_figures_of_coco_are_those_of_the_authors_files():
  config = load_config(FOCALNET)
  schedule, optimizer = config.optimizer.schedule, config.optimizer
  # Swin-L's, in 100 epochs.
  assert config.total_steps == 737_500 and schedule.drop_steps == (655_556, 710_184)
  assert schedule.get("drop_factor", 0.1) == 0.1 and "warmup_steps" not in schedule
  assert (config.data.batch_size, config.data.image_size) == (16, 1024)
  assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-4, 0.05)
  assert optimizer.gradient_clip_norm == 0.01
  assert config.data.transform.split("|")[1:4] == [
    "flip_lr", "large_scale_jitter({image_size}, (0.1, 2.0))", "pad_to({image_size})",
  ]  # fmt: skip
  shorter = mask_recipes.coco("swin_tiny", "instance")
  assert shorter.total_steps == 368_750
  assert shorter.optimizer.schedule.drop_steps == (327_778, 355_092)
  assert shorter.data.source == "coco:data/coco?empty=false"
  assert shorter.evaluation.sets.validation.source == "coco:data/coco"


def test_figures_of_ade20k_are_those_of_the_authors_files():
  config = load_config(FOCALNET, "ade20k")
  assert config.total_steps == 160_000 and config.optimizer.schedule.power == 0.9
  assert config.data.image_size == 640 and "warmup_steps" not in config.optimizer.schedule
  assert config.task.inference.scale == (2560, 640) and "ratios" not in config.task.inference
  assert "resize_short_side((320, 384, 448, 512, 576, 640, " in config.data.transform
  assert "1216, 1280), 2560)" in config.data.transform
  several = load_config(FOCALNET, "ade20k,multi_scale=True").task.inference
  assert several.flip and several.ratios == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def test_what_is_decayed_and_how_fast_the_backbone_learns():
  config = load_config(OWN)
  config.model.num_classes = 5
  _, params = shapes_of(config)
  flat = lambda rules: {  # noqa: E731
    jax.tree_util.keystr(path, simple=True, separator="/"): value
    for path, value in jax.tree_util.tree_leaves_with_path(match_rules(params, rules, field="x"))
  }
  decays = flat(config.optimizer.weight_decay_rules)
  spared = {name for name, value in decays.items() if not value}
  assert {"head/query_features", "head/query_positions", "head/level_embedding"} < spared
  assert {"head/predictor/norm/scale", "head/pixel_decoder/encoder0/norm1/bias"} < spared
  assert any("position" in name for name in spared)
  decayed = set(decays) - spared
  assert {"head/pixel_decoder/level_embedding", "head/predictor/classifier/bias"} < decayed
  assert all("norm" not in name.rsplit("/", 2)[-2] for name in decayed)
  rates = flat(config.optimizer.learning_rate_rules)
  assert all(value == (0.1 if name.startswith("backbone/") else 1) for name, value in rates.items())
  assert np.isclose(sum(rates.values()), len(rates) - 0.9 * sum(v < 1 for v in rates.values()))


def locally(path, argument):
  """What a local try builds on scenes."""
  scenes = SceneSource("train", size=64, count=64)
  config = Config(load_config(path, argument))
  facts = DataFacts(info=scenes.info, num_examples=64, example=lambda: scenes[0])
  made = build.build(config, facts)
  config.assert_all_read()
  return made


def test_the_local_try_of_kmax_builds_on_scenes():
  made = locally(MOAT, "runlocal")
  assert made.settings.best_metric == "validation/pq"
  shapes = jax.eval_shape(made.task.init, jax.random.key(0), made.batches[0])["params"]
  assert shapes["head"]["decoder"]["cluster_centers"].shape == (16, 64)


@pytest.mark.parametrize("kind", mask_recipes.TASKS)
def test_every_kind_of_local_try_builds_on_scenes(kind):
  made = locally(OWN, f"runlocal,kind={kind}")
  best = {"panoptic": "pq", "instance": "mask_ap", "semantic": "mean_iou"}[kind]
  assert made.task.measures[best] == "max"
  assert made.settings.best_metric == f"validation/{best}"
  shapes = {name: leaf.shape[1:] for name, leaf in made.batches[0].items()}
  segments = {
    "panoptic": {"segments": (64, 64), "segment_labels": (8,)},
    "instance": {"masks": (8, 64, 8), "box_labels": (8,)},
    "semantic": {"map": (64, 64)},
  }
  assert segments[kind].items() <= shapes.items()


def test_an_unknown_kind_is_named():
  with pytest.raises(ConfigError, match="kind='panoptc'; one of panoptic, instance, semantic"):
    load_config(OWN, "kind=panoptc")
