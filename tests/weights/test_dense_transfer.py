"""Weights from classifiers, CLIPs and other decoders in the places of a backbone with a decoder."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_vit import build
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config
from hybrid_vit.heads.dense_model import create_dense_model
from hybrid_vit.models.registry import create_model
from hybrid_vit.starting import _initial_weights
from hybrid_vit.weights import families, readers
from hybrid_vit.weights.dense_checkpoints import export_dense
from hybrid_vit.weights.transfer import is_clip, is_dense, transfer
from tests import dense

BARE = {name: value for name, value in dense.ARGUMENTS.items() if name != "output_norms"}
UPERNET = {"name": "upernet", "channels": 8}


def variables_of(model, seed):
  """Variables of noise."""
  images = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
  rng = np.random.default_rng(seed)
  made = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), dict(shapes))
  return {"batch_stats": {}, **made}


def classifier(seed=0, classes=10):
  return variables_of(create_model(dense.NETWORK, classes, **BARE), seed)


@functools.cache
def segmenter(seed=0, classes=4, head="upernet", auxiliary=True):
  backbone = create_model(dense.NETWORK, 0, **dense.ARGUMENTS)
  heads = {"upernet": UPERNET, "dpt_segmentation": {"name": head, "channels": 8, "auxiliary": True}}
  model = create_dense_model(
    backbone,
    classes,
    head=heads[head],
    auxiliary=dense.AUXILIARY if auxiliary else None,
  )
  return variables_of(model, seed)


def flat(tree):
  return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def test_a_classifier_becomes_the_backbone():
  source, target = classifier(1), segmenter(2)
  variables, report = transfer(source, target)
  new, old, fresh = flat(variables), flat(source), flat(target)
  assert new.keys() == fresh.keys()
  for name, value in new.items():
    collection, part, rest = name.split("/", 2)
    if part == "backbone" and "_norm/" not in f"{rest.split('/')[0]}/":
      np.testing.assert_array_equal(value, old[f"{collection}/{rest}"], err_msg=name)
    else:
      np.testing.assert_array_equal(value, fresh[name], err_msg=name)
  begun = dict(line.split(" (", 1) for line in report.initialised)
  norms = {f"params/backbone/stage{i}_norm/{leaf}" for i in (1, 2) for leaf in ("scale", "bias")}
  assert norms < begun.keys()
  assert begun["params/head/classifier/kernel"] == "no decoder in the source)"
  # The classifier's own are left.
  assert {name.removeprefix("params/backbone/") for name in report.unused} == {
    "head/bias", "head/kernel", "head_norm/bias", "head_norm/scale",
  }  # fmt: skip


def test_the_image_tower_of_two_becomes_the_backbone():
  image = classifier(3, 6)
  text = {"words": {"embedding": np.zeros((5, 6))}, "projection": {"kernel": np.zeros((6, 6))}}
  source = {
    "params": {"image": image["params"], "text": text, "logit_scale": np.zeros(())},
    "batch_stats": {"image": image["batch_stats"]},
  }
  assert is_clip(source) and not is_dense(source)
  variables, report = transfer(source, segmenter(2))
  found, old = variables["params"]["backbone"], source["params"]["image"]
  jax.tree.map(np.testing.assert_array_equal, found["stem"], old["stem"])
  jax.tree.map(np.testing.assert_array_equal, found["stage2_block0"], old["stage2_block0"])
  assert any(name.startswith("params/text/") for name in report.unused)


@pytest.mark.parametrize("head", ["upernet", "dpt_segmentation"])
def test_other_classes_keep_the_decoder_but_for_the_classifiers(head):
  auxiliary = head == "upernet"
  source, target = (segmenter(s, c, head, auxiliary) for s, c in ((1, 4), (2, 7)))
  with pytest.raises(ValueError, match=r"another width: .*classifier.*reinitialize_head=True"):
    transfer(source, target)
  variables, report = transfer(source, target, reinitialize_head=True)
  new, old, fresh = flat(variables), flat(source), flat(target)
  begun = {name for name in new if "classifier/" in name}
  assert {line.split(" (")[0] for line in report.initialised} == begun and len(begun) == 4
  for name, value in new.items():
    np.testing.assert_array_equal(value, (fresh if name in begun else old)[name], err_msg=name)
  assert report.unused == ()


def test_a_network_alone_leaves_the_decoder():
  source, target = segmenter(1), classifier(2)
  with pytest.raises(ValueError, match="leaves are missing"):
    transfer(source, target)
  # Without what only a classifier reads, the backbone is whole.
  bare = {n: t for n, t in target["params"].items() if n not in ("head", "head_norm")}
  variables, report = transfer(source, {"params": bare, "batch_stats": {}})
  for name in bare:
    jax.tree.map(
      np.testing.assert_array_equal, variables["params"][name], source["params"]["backbone"][name]
    )
  assert any(name.startswith("params/head/") for name in report.unused)
  assert any(name.startswith("params/auxiliary_head/") for name in report.unused)
  assert "params/stage1_norm/scale" in report.unused


def test_a_decoder_of_another_kind_is_refused():
  with pytest.raises(ValueError, match="these weights are of another network"):
    transfer(segmenter(1), segmenter(2, 4, "dpt_segmentation", False), reinitialize_head=True)


def start(tmp_path, weights, classes=4, arguments=dense.ARGUMENTS):
  """(variables, report) of a training that begins with a file of these names."""
  file = tmp_path / "authors.safetensors"
  readers.write_safetensors(file, weights, {})
  config = dense.config(init_from=str(file))
  config.model = ConfigDict(dict(name=dense.NETWORK, arguments=arguments))
  config.task.head, config.data.transform = UPERNET, "decode|random_crop(32)"
  names = tuple(map(str, range(classes)))
  run = build.build(Config(config), DataFacts({"map_class_names": names}, 64))
  found, metadata = _initial_weights(run, run.settings.init_from)
  target = jax.eval_shape(lambda key: run.task.init(key, run.batches[0]), jax.random.key(0))
  return found, metadata, transfer(found, target, reinitialize_head=classes != 4)[1]


def test_a_training_begins_with_an_authors_file_of_either_kind(tmp_path):
  """A segmenter, of other classes too, and a classifier."""
  source = segmenter(1)
  backbone = create_model(dense.NETWORK, 0, **dense.ARGUMENTS)
  model = create_dense_model(backbone, 4, head=UPERNET, auxiliary=dense.AUXILIARY)
  exported, _ = export_dense(source, model, dense.NETWORK, "openmmlab")
  found, metadata, report = start(tmp_path, exported)
  jax.tree.map(np.testing.assert_array_equal, found, source)
  assert metadata == {"num_classes": 4} and not report.initialised
  _, _, report = start(tmp_path, exported, classes=6)
  assert len(report.initialised) == 4 and all("classifier" in n for n in report.initialised)
  # A classifier's file of the registry's size, under the same decoder.
  classes = create_model(dense.NETWORK, 5)
  shapes = jax.eval_shape(lambda: classes.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
  whole = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), dict(shapes))
  weights = families.export_checkpoint(whole, dense.NETWORK, classes)
  found, _, report = start(tmp_path, weights, arguments={"output_norms": (1, 2, 3, 4)})
  assert "head" in found["params"] and "backbone" not in found["params"]
  assert any("no decoder in the source" in name for name in report.initialised)
