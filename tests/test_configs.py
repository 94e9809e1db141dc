"""Every file in `configs/`: each variant builds, its default and its local try pass the dry run."""

import configparser
import functools
import importlib.util
import re
from pathlib import Path

import pytest

from hybrid_vit import build, config_files, dry_run, mask_recipes
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.example_reading import read_transform
from hybrid_vit.tasks.base import evaluation_kind

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
FACTS = DataFacts(num_classes=10)
DEFAULTS = [(path, None) for path in FILES]
LOCAL = [(path, v) for path, v in EVERY if v == "runlocal"]


def ids(value):
  return value.stem if isinstance(value, Path) else str(value)


# One of each kind of recipe, the smallest: a whole run of it is built, its network traced.
WHOLE = {
  "convnext": ("convnext_tiny_22k", "convnext_tiny_22kto1k", "convnext_base_384"),
  "cswin": ("cswin_base_384", "cswin_large"),
  "cvt": ("cvt_13_22k", "cvt_13_384"),
  "focalnet": ("focalnet_base_srf_22k", "focalnet_base_srf_finetune_384"),
  "l2vit": ("l2vit_base_22k", "l2vit_base_22kto1k"),
  "mci": ("mci0_finetune",),
  "moat": ("moat_0_22k", "moat_0_finetune_384"),
  "revcol": ("revcol_base", "revcol_base_22k", "revcol_base_22kto1k"),
  "smt": ("smt_l_22k", "smt_l_22k_ft_224"),
  "swin": ("swin_tiny_22k", "swin_tiny_22kto1k"),
  "vit": ("deit_base_patch16_384",),
}


@pytest.mark.parametrize(("path", "variant"), EVERY, ids=ids)
def test_every_variant_builds_its_network_and_transforms(path, variant):
  config = load(path, variant)
  preprocessing = build.preprocessing_of(config)
  curriculum = build.read_curriculum(config, 1_000_000, preprocessing)
  tasks, metadata = build.build_tasks(config, FACTS, preprocessing, curriculum)
  assert metadata["name"] == config.model.name
  # Of two towers the image network has a projection in the place of classes; of a backbone with a
  # decoder the decoder has them, and depth is one number.
  network = getattr(tasks[-1].model, "image", tasks[-1].model)
  if metadata["task"] == "detection":
    head = network.stages[0] if hasattr(network, "stages") else network.head
    found = getattr(head, "num_outputs", None) or head.num_classes
    assert found == metadata["num_classes"]
    assert network.backbone.num_classes == 0
  elif metadata["task"] in ("segmentation", "depth", *mask_recipes.TASKS.values()):
    assert network.head.num_outputs == metadata.get("num_classes", 1)
    assert network.backbone.num_classes == 0
  else:
    assert network.num_classes == metadata.get("num_classes", metadata.get("embedding_size"))
  decoder = config.data.as_dataclass(build.TrainingSettings).decoder
  for phase, task in zip(curriculum.phases, tasks):
    read_transform(phase.transform, decoder, task.spec.train, None)
  evaluation = build.read_evaluation(config, preprocessing, tasks[-1])
  assert evaluation
  for item in evaluation:
    read_transform(item.transform, item.decoder, evaluation_kind(tasks[-1], item.kind).fields, None)


@pytest.mark.parametrize(
  ("path", "variant"),
  [(CONFIGS / f"{name}.py", variant) for name, listed in WHOLE.items() for variant in listed],
  ids=ids,
)
def test_a_whole_run_of_each_kind_of_recipe_builds(path, variant):
  config = load(path, variant)
  made = build.build(config, FACTS)
  config.assert_all_read()
  assert made.optimizer is not None and made.settings.best_metric == "validation/top1"


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


def test_an_installation_carries_every_package_and_the_recipes():
  """setup.cfg names packages one by one, and takes the recipes from beside the package."""
  setup = configparser.ConfigParser()
  setup.read(CONFIGS.parent / "setup.cfg")
  listed = set(setup["options"]["packages"].split())
  there = (CONFIGS.parent / "hybrid_vit").rglob("__init__.py")
  names = {".".join(path.parent.relative_to(CONFIGS.parent).parts) for path in there}
  assert listed == names | {"hybrid_vit.configs"}
  assert setup["options"]["package_dir"].split() == ["hybrid_vit.configs", "=", "configs"]


def test_recipes_are_found_by_name_within_an_installed_package_first(tmp_path, monkeypatch):
  for text in ("moat", "moat.py", "configs/moat.py", str(CONFIGS / "moat.py")):
    assert config_files.find_config(text).samefile(CONFIGS / "moat.py")
  for folder in ("configs", "hybrid_vit/configs"):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "own.py").write_text("")
  monkeypatch.setattr(config_files, "_PACKAGE", tmp_path / "hybrid_vit")
  assert config_files.find_config("own") == tmp_path / "hybrid_vit" / "configs" / "own.py"
  with pytest.raises(ConfigError, match="no configuration file 'owm'; did you mean 'own'"):
    config_files.find_config("owm")


def test_local_tries_run_on_what_comes_with_the_package_in_minutes():
  assert LOCAL
  for path, variant in LOCAL:
    config = load(path, variant)
    length = build.read_curriculum(config, 1437, build.preprocessing_of(config))
    if config.data.source.startswith("scenes"):
      # Two towers from nothing: 256,000 pairs of 48 px.
      assert length.total_examples < 260_000, path
      continue
    assert config.data.source == "digits", path
    # Swin learns slowest: its 17,000 pictures took 30 s on two cores.
    assert length.total_examples < 17_500, path


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
    assert "random_resized_crop(512" in training_transform(tuning)


def training_transform(config):
  config = Config(config)
  return build.read_curriculum(config, 10_000, build.preprocessing_of(config)).phases[0].transform


def test_fine_tuning_follows_the_network_that_is_named():
  config = load_config(CONFIGS / "finetune.py")
  config.model.name = "moat_2"
  expected = build.preprocessing_of(Config(config))
  assert expected.resize == "squash" and "random_resized_crop(384" in training_transform(config)
  config.data.image_size = 160
  assert "random_resized_crop(160" in training_transform(config)
  (validation,) = build.read_evaluation(Config(config), build.preprocessing_of(Config(config)))
  assert "resize(160" in validation.transform


def test_an_unknown_brace_in_a_transform_is_named():
  config = load_config(CONFIGS / "finetune.py")
  config.data.transform = "decode|resize({imagesize})"
  with pytest.raises(ConfigError, match=r"'imagesize'.*there are: image_size, crop_ratio"):
    training_transform(config)
