"""Whole detectors by command: read, written back name by name, begun anew for other classes."""

import pickle

import jax
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.checkpoints import load_weights
from hybrid_vit.heads.detectors import create_detector
from hybrid_vit.models.registry import create_model
from hybrid_vit.stored_tasks import load_task
from hybrid_vit.tools import export_weights, import_weights
from hybrid_vit.weights import dense_checkpoints, readers
from tests import dense
from tests.models.contract import drawn_variables

NECK = {"name": "fpn", "channels": 8, "extra": "none", "num_extra": 0}
_RCNN = {
  "neck": NECK,
  "box_head": {"fc_channels": 6},
  "mask_head": {"channels": 4, "num_convs": 1},
  "settings": {"num_roi_levels": 2, "rpn_before": (20, 20), "rpn_after": (8, 8), "candidates": 20,
               "detections": 5},
}  # fmt: skip
_CONVS = {"num_convs": 1, "num_fcs": 1, "conv_channels": 4, "fc_channels": 6, "norm": "batch"}
_DINO = {"channels": 16, "num_heads": 2, "num_queries": 6, "encoder_layers": 1,
         "decoder_layers": 2, "hidden": 8, "norm_groups": 4}  # fmt: skip
DETECTORS = {
  "mask_rcnn": _RCNN,
  "cascade_mask_rcnn": {
    **_RCNN,
    "box_head": {**_CONVS, "class_agnostic": True},
  },
  "retinanet": {"neck": NECK, "head": {"channels": 8, "num_convs": 1}},
  "atss": {"neck": NECK, "head": {"channels": 8, "num_convs": 1, "norm_groups": 4}},
  "dino": {"num_levels": 3, "head": _DINO},
  "dino_detrex": {"num_levels": 3, "head": {**_DINO, "shared_heads": False, "num_labels": 4}},
}
NAMES = ("cat", "dog", "owl")
# What no classifier is, of each detector: layers that begin anew for other classes.
ANEW = {
  "mask_rcnn": {"box_head0/classifier", "box_head0/deltas", "mask_head0/classifier"},
  "cascade_mask_rcnn": {f"{kind}_head{i}/classifier" for kind in ("box", "mask") for i in range(3)},
  "retinanet": {"head/classifier"},
  "atss": {"head/classifier"},
  "dino": {"head/classifier0", "head/encoder_classifier", "head"},
  "dino_detrex": {"head/classifier0", "head/classifier1", "head/encoder_classifier", "head"},
}


def recipe(path, name):
  """A recipe of a tiny detector, as a file."""
  kind = name.partition("_detrex")[0]
  detector = {"name": kind, **DETECTORS[name]}
  path.write_text(
    "from hybrid_vit.config import load_config\n"
    "from hybrid_vit.config_files import find_config\n\n\n"
    "def get_config():\n"
    "  config = load_config(find_config('finetune_detection'), 'runlocal')\n"
    f"  config.model = dict(name={dense.NETWORK!r}, arguments={dense.ARGUMENTS!r})\n"
    f"  config.task.detector = {detector!r}\n"
    f"  config.task.mask_size = {28 if 'mask' in name else 0}\n"
    "  return config\n"
  )
  return path


def made(name, classes=3):
  """(model, drawn variables)."""
  kind = name.partition("_detrex")[0]
  backbone = create_model(dense.NETWORK, num_classes=0, **dense.ARGUMENTS)
  model = create_detector(kind, backbone, classes, masks="mask" in name, **DETECTORS[name])
  variables = dict(drawn_variables(model, (64, 64)))
  variables.setdefault("batch_stats", {})
  return model, variables


LAYOUTS = [
  ("mask_rcnn", "mmdetection", "roi_head.bbox_head.fc_cls.weight"),
  ("mask_rcnn", "torchvision", "roi_heads.box_predictor.cls_score.bias"),
  ("mask_rcnn", "detectron2", "proposal_generator.rpn_head.anchor_deltas.weight"),
  ("cascade_mask_rcnn", "mmdetection", "roi_head.mask_head.2.conv_logits.bias"),
  ("retinanet", "mmdetection", "bbox_head.retina_cls.weight"),
  ("atss", "mmdetection", "bbox_head.atss_centerness.weight"),
  ("dino", "official", "backbone.0.downsample_layers.0.0.weight"),
  ("dino_detrex", "detrex", "transformer.decoder.layers.1.attentions.0.attn.in_proj_weight"),
]


@pytest.mark.parametrize(("name", "layout", "some"), LAYOUTS)
def test_in_and_out_again(tmp_path, capsys, name, layout, some):
  model, variables = made(name)
  weights, _ = dense_checkpoints.export_dense(variables, model, dense.NETWORK, layout)
  assert some in weights
  file, out, back = tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "back.safetensors"
  readers.write_safetensors(file, weights, {"format": "pt"})
  config = recipe(tmp_path / "r.py", name)
  base = [f"--config={config}", f"--from={file}"]
  assert import_weights.main([*base, f"--to={out}"]) == 0
  said = capsys.readouterr().out
  assert "initialised anew: 0" in said and "unused in the checkpoint: 0" in said
  kind = name.partition("_detrex")[0]
  assert f"{dense.NETWORK} under {kind}, 3 classes, layout {layout}" in said
  jax.tree.map(np.testing.assert_array_equal, load_weights(out)[0], variables)
  assert export_weights.main([f"--from={out}", f"--to={back}"]) == 0
  again = readers.read_checkpoint(back).weights
  assert set(again) == set(weights)
  for key, value in weights.items():
    # torchvision's boxes of background are read by nobody, and written as zeros.
    np.testing.assert_array_equal(again[key], value, err_msg=key)


@pytest.mark.parametrize("name", DETECTORS)
def test_other_classes_begin_the_classifiers_anew(tmp_path, name):
  model, variables = made(name)
  layout = "detrex" if name == "dino_detrex" else None
  weights, _ = dense_checkpoints.export_dense(variables, model, dense.NETWORK, layout)
  readers.write_safetensors(tmp_path / "x.safetensors", weights, {})
  config = recipe(tmp_path / "r.py", name)
  base = [f"--config={config}", f"--from={tmp_path / 'x.safetensors'}", f"--to={tmp_path / 'o'}"]
  assert import_weights.main([*base, "--num_classes=2"]) == 0
  found, metadata = load_weights(tmp_path / "o")
  anew = {path.removeprefix("params/") for path in metadata["initialised_anew"]}
  assert {path.rpartition("/")[0] for path in anew} == ANEW[name]
  old, new = (traverse_util.flatten_dict(v["params"], sep="/") for v in (variables, found))
  for path, value in new.items():
    if path not in anew:
      np.testing.assert_array_equal(value, old[path])
  assert load_task(tmp_path / "o").task.num_classes == 2


def test_names_of_classes_come_from_the_file(tmp_path):
  model, variables = made("mask_rcnn")
  weights, _ = dense_checkpoints.export_dense(variables, model, dense.NETWORK)
  file = tmp_path / "epoch_12.pth"
  file.write_bytes(pickle.dumps({"meta": {"CLASSES": NAMES}, "state_dict": weights}))
  config = recipe(tmp_path / "r.py", "mask_rcnn")
  assert (
    import_weights.main([f"--config={config}", f"--from={file}", f"--to={tmp_path / 'o'}"]) == 0
  )
  stored = load_task(tmp_path / "o")
  assert stored.task.object_class_names == NAMES
  photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  found = stored.objects(photo)
  assert len(found.boxes) == len(found.masks) and np.isfinite(found.scores).all()


def test_what_does_not_fit_is_told(tmp_path, capsys):
  model, variables = made("mask_rcnn")
  weights, _ = dense_checkpoints.export_dense(variables, model, dense.NETWORK)
  weights["roi_head.more"] = np.zeros(2, np.float32)
  del weights["neck.fpn_convs.0.conv.bias"]
  readers.write_safetensors(tmp_path / "x.safetensors", weights, {})
  for name, message in (
    ("mask_rcnn", "roi_head.more: no variable takes it"),
    ("mask_rcnn", "the checkpoint has no neck.fpn_convs.0.conv.bias"),
    ("dino", "none of the checkpoint's names is one of a decoder of convnext_tiny under DINO"),
  ):
    config = recipe(tmp_path / "r.py", name)
    arguments = [f"--config={config}", f"--from={tmp_path / 'x.safetensors'}"]
    assert import_weights.main([*arguments, f"--to={tmp_path / 'o'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_detrexs_resnet_has_detectron2s_names():
  model = create_detector("dino", create_model("resnet50", num_classes=0), 3, head=_DINO)
  key_map = dense_checkpoints.layouts_of(model, "resnet50")["detrex"].key_map(model)
  for path, name in {
    "backbone/stem/conv/kernel": "stem.conv1.weight",
    "backbone/stem/norm/scale": "stem.conv1.norm.weight",
    "backbone/stage1_block0/conv1/kernel": "res2.0.conv1.weight",
    "backbone/stage4_block2/norm3/bias": "res5.2.conv3.norm.bias",
    "backbone/stage2_block0/shortcut_conv/kernel": "res3.0.shortcut.weight",
    "backbone/stage2_block0/shortcut_norm/bias": "res3.0.shortcut.norm.bias",
  }.items():
    assert key_map(f"params/{path}").name == f"backbone.{name}"
  assert key_map("params/head/projection3/kernel").name == "neck.extra_convs.0.conv.weight"
  of_encoder = key_map("params/head/encoder_classifier/bias")
  assert of_encoder.names == ("transformer.decoder.class_embed.2.bias",)
  assert of_encoder.aliases == ("class_embed.2.bias",)
