"""Every file in `configs/`: each variant builds, its default and its local try pass the dry run."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

from hybrid_vit import dry_run, run
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.data.transforms import parse_transform

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.py"))


@functools.cache
def variants(path):
  """What the file offers after the colon; (None,) where it takes nothing."""
  spec = importlib.util.spec_from_file_location(f"variants_of_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return tuple(getattr(module, "VARIANTS", (None,)))


def load(path, variant=None):
  return Config(load_config(path, variant))


EVERY = [(path, variant) for path in FILES for variant in variants(path)]
DEFAULTS = [(path, None) for path in FILES]
LOCAL = [(path, v) for path, v in EVERY if v == "runlocal"]


def ids(value):
  return value.stem if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("path", "variant"), EVERY, ids=ids)
def test_every_variant_builds_its_network_and_transforms(path, variant):
  config = load(path, variant)
  classes = None if config.model.get("num_classes") else 10
  task, spec = run.build_task(config, classes)
  assert spec.name == config.model.name and task.model.num_classes == spec.num_classes
  for data in (
    run.data_settings(config),
    *(
      run.evaluation_settings(name, config, run.preprocessing_of(config))[0]
      for name in config.evaluation.sets.names()
    ),
  ):
    parse_transform(data.transform, data.decoder)


@pytest.mark.parametrize(("path", "variant"), DEFAULTS + LOCAL, ids=ids)
def test_the_default_and_the_local_try_pass_the_dry_run(path, variant):
  plan = dry_run.examine(load(path, variant), devices=8)
  assert plan.problems == []
  assert plan.activation_bytes and plan.multiply_adds and plan.state_bytes["params"]


def test_a_file_with_variants_says_what_it_offers():
  """A `get_config` that takes an argument has `VARIANTS`, with a local try among them."""
  for path in FILES:
    takes_argument = re.search(r"def get_config\(\w", path.read_text())
    assert bool(takes_argument) == (variants(path) != (None,)), path
    if takes_argument:
      assert "runlocal" in variants(path), path
      with pytest.raises(ConfigError, match="unknown variant"):
        load_config(path, "no_such_variant")


def test_local_tries_run_on_the_embedded_digits_in_about_a_minute():
  assert LOCAL
  for path, variant in LOCAL:
    config = load(path, variant)
    assert config.data.source == "digits", path
    length = run.training_length(config, 1437)
    # Swin learns slowest: its 16,896 pictures took 30 s on two cores.
    assert length.total_steps * config.data.batch_size < 17_000, path


def test_the_recipe_of_moat_follows_its_arguments():
  path = CONFIGS / "moat.py"
  config = load_config(path, "moat_2,batch_size=1024,position_bias=False")
  assert config.model.name == "moat_2_no_pe" and config.data.batch_size == 1024
  assert config.model.arguments.drop_path_rate == 0.5
  assert config.optimizer.learning_rate_batch_size == 4096
  pretraining = load_config(path, "moat_3_22k")
  assert pretraining.model.num_classes == 21841 and pretraining.data.mean == (0.5, 0.5, 0.5)
  for from_22k, mean in ((True, 0.5), (False, 0.485)):
    tuning = load_config(path, f"moat_3_finetune_512,from_22k={from_22k}")
    assert tuning.data.image_size == 512 and tuning.data.mean[0] == mean
    assert tuning.reinitialize_head == from_22k
    transform = run.data_settings(Config(tuning)).transform
    assert "random_resized_crop(512" in transform


def test_fine_tuning_follows_the_network_that_is_named():
  config = load_config(CONFIGS / "finetune.py")
  config.model.name = "moat_2"
  assert run.preprocessing_of(Config(config)).resize == "squash"
  assert "random_resized_crop(384" in run.data_settings(Config(config)).transform
  config.data.image_size = 160
  assert "random_resized_crop(160" in run.data_settings(Config(config)).transform
  expected = run.preprocessing_of(Config(config))
  assert (
    "resize(160" in run.evaluation_settings("validation", Config(config), expected)[0].transform
  )


def test_an_unknown_brace_in_a_transform_is_named():
  config = load_config(CONFIGS / "finetune.py")
  config.data.transform = "decode|resize({imagesize})"
  with pytest.raises(ConfigError, match=r"'imagesize'.*there are: image_size, crop_ratio"):
    run.data_settings(Config(config))
