"""`configs/finetune.py`: its keys, sizes and windows, the linear probe, what is taken over."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import build, main, recipes
from hybrid_vit.build import DataFacts
from hybrid_vit.checkpoints import export, load_weights
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.models.sizes import arguments_for_size
from tests import small

FILE = Path(__file__).parent.parent / "configs" / "finetune.py"
FACTS = DataFacts({"class_names": ("ant", "bee"), "class_counts": np.array([30, 10])}, 6000)


def built(argument):
  config = Config(load_config(FILE, argument))
  run = build.build(config, FACTS)
  config.assert_all_read()
  return run


@pytest.mark.parametrize(
  ("name", "size", "published"),
  [
    ("swin_base", 384, "swin_base_384"),
    ("cswin_base", 384, "cswin_base_384"),
    ("l2vit_base_22kto1k", 384, "l2vit_base_384_22kto1k"),
    ("deit_base_patch16_224", 384, "deit_base_patch16_384"),
  ],
)
def test_windows_grow_as_the_authors_have_it(name, size, published):
  def built(name, **arguments):
    module = create_model(name, **arguments)
    return {
      f: v for f, v in vars(module).items() if f not in ("drop_path_rate", "name", "parent", "_id")
    }

  assert built(name, **arguments_for_size(name, size)) == built(published)
  assert arguments_for_size(name, model_entry(name).preprocessing.image_size) == {}


def test_every_network_takes_the_arguments_of_another_size():
  for name in list_models():
    create_model(name, **arguments_for_size(name, 288))


def test_keys_reach_the_run():
  run = built(
    "arch=swin_tiny,data=folder:/pictures,res=384,init=/weights,epochs=5,lr=1e-3,decay=0.5,"
    "balance=0.5,weights=balanced,patience=4,carry=names"
  )
  assert run.network == "swin_tiny" and run.data.source == "folder:/pictures"
  assert run.data.balance == 0.5 and run.settings.init_from == "/weights"
  assert run.settings.early_stop.patience == 4 and run.settings.carry_head == "names"
  assert run.task.class_weights == pytest.approx((40 / 60, 40 / 20))
  assert run.metadata["arguments"]["window_size"] == 12 and run.preprocessing.crop_ratio == 1.0
  assert run.batches[0]["image"].shape[1:] == (384, 384, 3)
  assert run.config["optimizer"]["layer_decay"] == {"rate": 0.5}
  table = run.params["stage1_block0"]["attention"]["position_bias"]
  assert table.shape == (3, 23, 23)
  with pytest.raises(ConfigError, match="key `probe` is 'lineer'; 'linear' was expected"):
    load_config(FILE, "moat_1,probe=lineer")


OWN = {"depths": (1, 1, 1, 1), "window_size": 4, "width": 24, "num_heads": (1, 2, 2, 4)}


def exported(place, name, own, size):
  """An export that says of which network it is; its one array nobody reads."""
  fields = dataclasses.asdict(model_entry(name).preprocessing)
  fields |= {"image_size": size, "mean": [0.5, 0.5, 0.25]}
  about = {"name": name, "arguments": own, "preprocessing": fields}
  export(place, {"params": {"any": np.zeros(1, np.float32)}, "batch_stats": {}}, about)
  return place


def as_lists(arguments):
  return {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}


def test_the_network_of_the_weights_is_taken_as_it_is(tmp_path):
  exported(tmp_path, "swin_tiny", OWN, size=128)
  given = f"arch=same,data=folder:/pictures,init={tmp_path}"
  run = built(given)
  assert run.network == "swin_tiny" and run.settings.init_from == str(tmp_path)
  found = as_lists(run.metadata["arguments"])
  assert {k: found[k] for k in OWN} == as_lists(OWN)
  assert run.preprocessing.image_size == 128 and run.preprocessing.mean == (0.5, 0.5, 0.25)
  # Another size is in proportion to the weights' own.
  run = built(f"{given},res=192")
  assert run.metadata["arguments"]["window_size"] == 6 and run.preprocessing.image_size == 192


@pytest.mark.parametrize("task", ["segmentation", "depth", "detection", "panoptic"])
def test_it_becomes_a_backbone(task, tmp_path):
  """Of three stages, where its entry has four."""
  exported(tmp_path, "tiny_moat_0", recipes.TINY_MOAT, size=224)
  file = FILE.with_name(f"finetune_{task}.py")
  config = load_config(file, f"arch=same,res=1024,init={tmp_path}")
  assert config.model.name == "tiny_moat_0" and tuple(config.data.mean) == (0.5, 0.5, 0.25)
  model = create_model(config.model.name, num_classes=0, **config.model.arguments)
  assert model.widths == recipes.TINY_MOAT["widths"] and len(model.features) == 3
  # The dense form's own arguments are over the weights'.
  assert model.pool_size == 3 and model.window_sizes == (None, None, 14)
  named = load_config(file, f"arch=tiny_moat_0,res=1024,init={tmp_path}")
  assert named.data.mean is None and named.model.arguments.window_sizes == (None, None, 14, 14)


def test_same_as_nothing_is_told(tmp_path):
  for argument, told in (
    ("arch=same", "no `init` is given"),
    (f"arch=same,init={tmp_path}/none", "no weights"),
  ):
    with pytest.raises(ConfigError, match=told):
      load_config(FILE, argument)


def test_a_linear_probe_trains_the_head_alone():
  run = built("arch=mci0,probe=linear")
  trained = {
    "/".join(key.key for key in path)
    for path, frozen in jax.tree_util.tree_leaves_with_path(run.frozen)
    if not frozen
  }
  assert trained == {"head/kernel"}  # this head has no bias, and the expansion before it stays
  assert run.metadata["arguments"]["drop_path_rate"] == 0.0


def test_weights_of_classes_scale_their_rows():
  task = dataclasses.replace(small.make_task(), class_weights=tuple(np.arange(10.0)))
  variables = task.init(jax.random.key(0), small.make_batch())
  batch = task.augment(small.make_batch(), jax.random.key(1), jnp.zeros((), jnp.int32))
  weighted, aux = task.loss(variables, batch, jax.random.key(2))
  (logits, _), _ = task._apply(variables, batch, jax.random.key(2))
  rows = -np.asarray(jax.nn.log_softmax(logits))[np.arange(16), small.make_batch()["label"]]
  expected = np.mean(rows * small.make_batch()["label"])
  np.testing.assert_allclose(weighted, expected, rtol=1e-5)
  # What is reported stays the plain loss.
  np.testing.assert_allclose(aux["metrics"]["loss"][0] / 16, rows.mean(), rtol=1e-5)


def test_weights_of_data_whose_counts_are_not_known():
  task = dataclasses.replace(small.make_task(), class_weights="balanced")
  with pytest.raises(ValueError, match=r"how many examples each class has is not known"):
    task.row_weights(jnp.zeros((2, 10)))
  with pytest.raises(ValueError, match=r"class_weights is 'balance'; 'balanced' was expected"):
    type(built("moat_0").task)  # registers the task
    from hybrid_vit.tasks.classification import ClassificationSettings

    ClassificationSettings(class_weights="balance")


def probe(**changes):
  config = load_config(FILE, "runlocal,probe=linear")
  config.total_epochs = 1
  with config.unlocked(), config.ignore_type():
    config.update(changes)
  return config


def test_a_probe_leaves_the_body_and_its_statistics_as_they_came(tmp_path):
  config = probe(sinks=())
  run = build.build(Config(config), DataFacts({}, 1437))
  model = run.task.model
  drawn = model.init(jax.random.key(5), jnp.zeros((1, 32, 32, 3)), train=False)
  # Statistics that no training here would give.
  statistics = jax.tree.map(lambda x: x + 0.25, drawn["batch_stats"])
  names = ["nine", "two", *"cdefghij"]
  first = {"params": jax.device_get(drawn["params"]), "batch_stats": jax.device_get(statistics)}
  about = {"name": run.network, "arguments": run.metadata["arguments"], "class_names": names}
  export(tmp_path / "first", first, about)
  config.init_from, config.carry_head = str(tmp_path / "first"), "names"
  config.optimizer.learning_rate, config.optimizer.schedule.end_learning_rate = 0.0, 0.0
  main.train(config, tmp_path / "run")
  weights, metadata = load_weights(tmp_path / "run")
  body = lambda tree: {k: v for k, v in tree.items() if k != "head"}  # noqa: E731
  jax.tree.map(np.testing.assert_array_equal, body(weights["params"]), body(first["params"]))
  jax.tree.map(np.testing.assert_array_equal, weights["batch_stats"], first["batch_stats"])
  # Two classes go on with their rows, the others begin anew.
  kernel, old = weights["params"]["head"]["kernel"], first["params"]["head"]["kernel"]
  order = metadata["class_names"]
  np.testing.assert_array_equal(kernel[:, order.index("nine")], old[:, 0])
  np.testing.assert_array_equal(kernel[:, order.index("two")], old[:, 1])
  assert not np.array_equal(kernel[:, 0], old[:, 0])


def test_a_file_of_the_authors_is_begun_from(tmp_path, capsys):
  from hybrid_vit.weights.families import export_checkpoint
  from hybrid_vit.weights.readers import write_safetensors

  name = "deit_tiny_patch16_224"
  model = create_model(name, 1000)
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)), train=False), jax.random.key(0)
  )
  drawn = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), shapes)
  official = export_checkpoint({"batch_stats": {}, **drawn}, name, model)
  write_safetensors(tmp_path / "deit.safetensors", official, {})
  from hybrid_vit.starting import _initial_weights

  run = built(f"arch={name},res=256,init={tmp_path / 'deit.safetensors'}")
  weights, metadata = _initial_weights(run, run.settings.init_from)
  assert metadata == {"num_classes": 1000}
  from hybrid_vit.weights.transfer import transfer

  variables, report = transfer(weights, {"params": run.params}, reinitialize_head=True)
  assert variables["params"]["position_embedding"].shape == (16 * 16 + 1, 192)
  assert "position_embedding (resized" in str(report) and len(report.initialised) == 2
