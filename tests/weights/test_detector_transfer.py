"""A detector's weights for other classes: what begins anew, and the command that says how."""

import types

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import finishing
from hybrid_vit.heads.detectors import create_detector
from hybrid_vit.models.registry import create_model
from hybrid_vit.weights.dense_checkpoints import export_dense, import_as_large
from hybrid_vit.weights.transfer import transfer
from tests import dense
from tests.heads.test_detector_imports import ANEW, DETECTORS


def detector(name, classes):
  """(model, variables of noise)."""
  backbone = create_model(dense.NETWORK, num_classes=0, **dense.ARGUMENTS)
  kind = name.partition("_detrex")[0]
  model = create_detector(kind, backbone, classes, masks="mask" in name, **DETECTORS[name])
  images = jnp.zeros((1, 64, 64, 3))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
  rng = np.random.default_rng(classes)
  made = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), dict(shapes))
  return model, {"batch_stats": {}, **made}


@pytest.mark.parametrize("name", DETECTORS)
def test_only_what_goes_by_the_classes_begins_anew(name):
  (_, source), (_, target) = detector(name, 3), detector(name, 2)
  with pytest.raises(ValueError, match=r"another width: .*reinitialize_head=True"):
    transfer(source, target)
  variables, report = transfer(source, target, reinitialize_head=True)
  anew = {line.partition(" ")[0].removeprefix("params/") for line in report.initialised}
  assert {path.rpartition("/")[0] for path in anew} == ANEW[name]
  old, new, fresh = (
    flax.traverse_util.flatten_dict(tree["params"], sep="/") for tree in (source, variables, target)
  )
  for path, value in new.items():
    np.testing.assert_array_equal(value, (fresh if path in anew else old)[path])
  assert not report.unused


@pytest.mark.parametrize("name", DETECTORS)
def test_a_file_of_more_classes_is_read_as_large(name):
  (model, variables), (other, _) = detector(name, 4), detector(name, 2)
  layout = "detrex" if name == "dino_detrex" else None
  weights, _ = export_dense(variables, model, dense.NETWORK, layout)
  found, classes = import_as_large(weights, other, dense.NETWORK, image_size=64)
  assert classes == 4 and not found.report.unused
  jax.tree.map(np.testing.assert_array_equal, found.variables, variables)


@pytest.mark.parametrize(
  ("metadata", "expected"),
  [
    (
      {"arguments": {}, "task_settings": {"detector": {"name": "retinanet"}, "mask_size": 0}},
      "configs/finetune_detection.py:arch=net,detector=retinanet,masks=False,init=runs/x,"
      "data=coco:/path/to/pictures",
    ),
    (
      {"arguments": {}, "task_settings": {"detector": {"name": "mask_rcnn"}, "mask_size": 56}},
      ":arch=net,detector=mask_rcnn,init=runs/x,data=coco:",
    ),
    (
      {"arguments": {}, "task_settings": {"detector": {"name": "dino", "num_levels": 5}}},
      "--config.reinitialize_head=True --config.data.source=coco:/path/to/pictures",
    ),
    (
      {"arguments": {"depths": (1, 1)}, "task_settings": {"detector": {"name": "atss"}}},
      "add --config.init_from=runs/x --config.reinitialize_head=True",
    ),
  ],
)
def test_what_is_said_after_a_training(metadata, expected):
  run = types.SimpleNamespace(network="net", metadata={"task": "detection", **metadata})
  assert expected in finishing._fine_tuning(run, "runs/x")
