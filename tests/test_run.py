"""What pictures are prepared by: the registry, the configuration, the weights, in this order."""

import dataclasses
from pathlib import Path

import jax
import pytest

from hybrid_vit import recipes, run, sharding
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing, model_entry

CONFIGS = Path(__file__).parent.parent / "configs"
OTHER = Preprocessing(48, 0.75, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def local(**transform):
  config = load_config(CONFIGS / "finetune.py", "runlocal")
  with config.unlocked():
    config.evaluation.sets.validation.update(transform)
  return Config(config)


def sets(config, preprocessing):
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  return run.evaluation_sets(config, mesh, 10, preprocessing)


def test_the_registrys_entry_where_the_configuration_says_nothing():
  config = load_config(CONFIGS / "finetune.py", "moat_2")
  assert run.preprocessing_of(Config(config)) == model_entry("moat_2").preprocessing
  config.data.image_size, config.data.mean = 160, (0.1, 0.1, 0.1)
  changed = run.preprocessing_of(Config(config))
  assert changed.image_size == 160 and changed.mean == (0.1, 0.1, 0.1)
  assert changed.resize == "squash" and changed.std == (0.5, 0.5, 0.5)


def test_an_export_decides_how_it_is_evaluated():
  stored = dataclasses.asdict(OTHER) | {"mean": [0.1, 0.2, 0.3]}  # as JSON has it
  expected, said_by = run.weights_preprocessing(local(), {"preprocessing": stored})
  assert expected == OTHER
  found = sets(local(), expected)
  assert found[0].transform == "decode|resize_center_crop(48, 0.75, 'bilinear')"
  assert next(iter(found[0].batches()))["image"].shape[1:] == (48, 48, 3)
  text = run.describe_preparation(expected, said_by, found)
  assert text.count("as the weights' metadata says") == 2
  task, spec = run.build_task(local(), 10, expected)
  assert task.mean == OTHER.mean and task.std == OTHER.std
  assert spec.preprocessing == dataclasses.asdict(OTHER)


def test_a_checkpoint_says_nothing_and_the_configuration_decides():
  expected, said_by = run.weights_preprocessing(local(), {"step": 3})
  assert expected == run.preprocessing_of(local()) and expected.image_size == 32
  assert "the registry's entry of tiny_moat_0 and config.data" in said_by


def test_a_transform_of_the_sets_own_goes_first_and_is_said():
  config = local(transform="decode|resize({image_size})")
  found = sets(config, OTHER)
  assert found[0].own_transform and found[0].transform == "decode|resize(48)"
  text = run.describe_preparation(OTHER, "as the weights' metadata says", found)
  assert "validation: decode|resize(48): by the configuration's own transform" in text


def test_evaluation_strings_are_what_they_are_named_for():
  squashed = dataclasses.replace(OTHER, resize="squash")
  assert recipes.eval_transform(squashed) == "decode|resize(48, 'bilinear')"
  for preprocessing in (OTHER, squashed):
    parse_transform(recipes.eval_transform(preprocessing))
  text = recipes.train_transform("randaugment(2, 9)", scale=(0.2, 1))
  parse_transform(run.fill_transform(text, OTHER))
  assert run.fill_transform(text, OTHER) == (
    "decode|random_resized_crop(48, (0.2, 1), interpolation='bilinear')|flip_lr|randaugment(2, 9)"
  )


def test_an_evaluation_set_with_other_classes_is_an_error():
  with pytest.raises(ConfigError, match="'validation' has 10 classes, the network 7"):
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    run.evaluation_sets(local(), mesh, 7)
