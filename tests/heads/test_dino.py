"""DINO against the authors' answers and losses, its published sizes, and what holds in general."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit.heads.dino import DINO, DINOSettings, create_dino, dino_losses, relative_targets
from hybrid_vit.heads.dino_denoising import (
  DenoisingDraws,
  blocked_queries,
  denoising_queries,
  draw_denoising,
  num_denoising_slots,
)
from hybrid_vit.heads.dino_layers import filled_cells
from hybrid_vit.heads.dino_losses import BoxTargets, SetLossSettings, set_losses
from hybrid_vit.heads.dino_network import DINONetwork
from hybrid_vit.heads.sine_positions import padded_sine_positions, sine_positions
from hybrid_vit.models.swin import Swin
from hybrid_vit.ops.boxes import centres_to_corners
from hybrid_vit.sharding import make_mesh
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_swin
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_dino import dino_layouts, head_key_map
from tests import golden
from tests.heads.detectors import Blank, maps_of, padded
from tests.heads.pyramids import levels


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


@functools.cache
def _golden(name):
  """(model, variables, maps, sizes, canvas, targets) of a golden file."""
  description, expected = golden.load("dense/dino", name)
  a = description["arguments"]
  canvas = tuple(a["image"])
  given = description["input"]["features"]
  strides = [round(canvas[0] / one["shape"][1]) for one in given]
  features = levels([one["shape"][-1] for one in given], strides)
  head = DINONetwork(
    features,
    a["num_classes"],
    num_levels=a["levels"],
    channels=a["hidden_dim"],
    num_queries=a["num_queries"],
    num_heads=a["heads"],
    num_points=a["points"],
    encoder_layers=a["enc_layers"],
    decoder_layers=a["dec_layers"],
    hidden=a["ffn"],
    num_labels=a["dn_labelbook_size"] + 1,
    position_temperature=a["position_temperature"],
  )
  settings = DINOSettings(a["dn_number"], a["label_noise_ratio"], a["box_noise_scale"])
  model = DINO(Blank(features), head, settings)
  maps = maps_of(description, features)
  # "image 1: the last 9 rows and the last 14 columns are padding"
  padding = [int(n) for n in re.findall(r"\d+", description["extra_inputs"]["mask"])[1:]]
  sizes = np.array([canvas, np.subtract(canvas, padding)])
  template = jax.eval_shape(lambda: head.init(jax.random.key(0), maps, sizes, canvas))
  weights = golden.weights(description)
  key_map = head_key_map(head)
  variables, report = import_weights(weights, template, key_map)
  assert not report.initialised and not report.unused
  exported = export_weights(variables, key_map)
  assert set(exported) == set(weights) | set(description["aliases"])
  for key, value in exported.items():
    np.testing.assert_array_equal(value, weights[description["aliases"].get(key, key)])
  room = 1 + max(len(expected[f"gt_labels_{i}"]) for i in range(2))
  boxes, valid = padded([expected[f"gt_boxes_{i}"] for i in range(2)], room)
  labels, _ = padded([expected[f"gt_labels_{i}"].astype(np.int32) for i in range(2)], room)
  pixels = centres_to_corners(boxes) * sizes[:, None, [1, 0, 1, 0]]
  targets = {"boxes": pixels, "labels": labels, "valid": valid}
  return model, variables, maps, sizes, canvas, targets


@pytest.mark.parametrize("name", golden.names("dense/dino"))
def test_answers_as_the_authors(name):
  _, expected = golden.load("dense/dino", name)
  model, variables, maps, sizes, canvas, _ = _golden(name)
  head = model.head
  wanted = ("decoder_norm", f"encoder{head.encoder_layers - 1}")

  @jax.jit
  def run(variables, maps):
    found, inside = head.apply(
      variables, maps, sizes, canvas, capture_intermediates=lambda m, _: m.name in wanted
    )
    detections = DINO(model.backbone, head).apply(
      {"params": {"head": variables["params"]}}, maps, sizes, canvas, method=DINO.detect
    )
    return found, inside["intermediates"], detections

  found, inside, detections = run(variables, maps)
  answers = {"memory": inside[wanted[1]]["__call__"][0]}
  answers |= {f"decoder{i}": x for i, x in enumerate(inside["decoder_norm"]["__call__"])}
  answers |= {f"reference{i}": x for i, x in enumerate(found.references)}
  answers |= {f"aux{i}_boxes": x for i, x in enumerate(found.boxes[:-1])}
  answers |= {"logits": found.logits[-1], "pred_boxes": found.boxes[-1]}
  answers |= {"interm_logits": found.encoder_logits, "interm_boxes": found.encoder_boxes}
  corner = {}
  for key, value in answers.items():
    if f"{key}_corner" in expected:  # of tokens
      stats = expected[f"{key}_stats"]
      value = np.asarray(value, np.float64)
      first = value[0, :8, :8]
      corner[key] = np.abs(first - expected[f"{key}_corner"]).max() / stats[1]
      own = [value.mean(), value.std(), np.abs(value).max()]
      corner[f"{key} stats"] = np.abs(np.array(own) - stats).max() / stats[1]
    else:
      corner[key] = np.abs(value - expected[key]).max() / expected[key].std()
  assert max(corner.values()) < 2e-5, corner
  for i in range(2):
    best = np.concatenate(
      [detections["boxes"][i, :8], detections["scores"][i, :8, None],
       detections["labels"][i, :8, None]], axis=-1
    )  # fmt: skip
    np.testing.assert_allclose(best, expected[f"det_{i}"], rtol=2e-5, atol=5e-4)


@pytest.mark.parametrize("name", golden.names("dense/dino"))
def test_losses_and_gradients_as_the_authors(name):
  description, expected = golden.load("dense/dino", name)
  model, variables, maps, sizes, canvas, targets = _golden(name)
  draws = _recorded_draws(model, expected, targets["valid"])
  slots, groups = expected["dn_meta"]

  def total(variables):
    wanted = relative_targets(targets, sizes)
    noised = model.noised(wanted, None, draws)
    found = model.head.apply(variables, maps, sizes, canvas, noised)
    losses = dino_losses(found, wanted, noised, model.settings.losses)
    return sum(losses.values()), (losses, found, noised)

  (loss, (losses, found, noised)), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(
    variables
  )
  assert int(noised.num_groups) == groups and int(noised.counted.sum()) == slots
  room = noised.labels.shape[1]
  for key, value in (
    ("train_logits", found.logits[-1][:, room:]),
    ("dn_logits", found.logits[-1][:, :slots]),
    ("dn_boxes", found.boxes[-1][:, :slots]),
  ):
    assert np.abs(value - expected[key]).max() / expected[key].std() < 2e-5, key
  last = model.head.decoder_layers - 1
  weights = model.settings.losses
  for key, value in zip(description["loss_names"], expected["losses"], strict=True):
    ours = float(losses[_our_name(key, last)])
    kind = key.split("_")[1]
    weight = {"ce": weights.class_weight, "bbox": weights.l1_weight, "giou": weights.giou_weight}
    np.testing.assert_allclose(ours / weight[kind], value, rtol=2e-5, err_msg=key)
  assert len(losses) == len(description["loss_names"])
  np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
  theirs = export_weights(gradients, head_key_map(model.head))
  for key in description["gradient_names"]:
    value = theirs[key].astype(np.float64)
    own = np.array([value.mean(), value.std(), np.abs(value).max()])
    reference = expected[f"grad_{key}"]
    assert np.abs(own - reference).max() / reference[1] < 1e-4, (key, own, reference)


def _our_name(key, last):
  """ "loss_bbox_dn_0" → "denoising_l1_0"."""
  _, kind, *rest = key.split("_")
  kind = {"ce": "class", "bbox": "l1", "giou": "giou"}[kind]
  if rest == ["interm"]:
    return f"encoder_{kind}"
  prefix = "denoising_" if "dn" in rest else ""
  layer = int(rest[-1]) if rest and rest[-1].isdigit() else last
  return f"{prefix}{kind}{'_' if kind == 'l1' else ''}{layer}"


def _recorded_draws(model, expected, valid):
  """The authors' draws, in rows of all objects of the batch over and over, in our slots."""
  p, labels, signs, parts = (expected[f"draw_{i}"] for i in range(4))
  noise, number = model.settings.label_noise, model.settings.denoising_number
  slots = num_denoising_slots(number, valid.shape[1])
  flipped = np.zeros(len(p), np.int32)
  flipped[p < 0.5 * noise] = labels
  counts = valid.sum(1)
  most, total = counts.max(), counts.sum()
  out = [np.ones((2, slots), np.float32), np.zeros((2, slots), np.int32),
         np.zeros((2, slots, 4), bool), np.zeros((2, slots, 4), np.float32)]  # fmt: skip
  for block in range(len(p) // total):
    for i, count in enumerate(counts):
      rows = block * total + counts[:i].sum() + np.arange(count)
      place = block * most + np.arange(count)
      for mine, theirs in zip(out, (p, flipped, signs > 0, parts)):
        mine[i, place] = theirs[rows]
  return DenoisingDraws(*out)


_SMALL = {
  "channels": 16,
  "num_queries": 10,
  "num_heads": 2,
  "num_points": 2,
  "encoder_layers": 1,
  "decoder_layers": 2,
  "hidden": 16,
  "norm_groups": 4,
}


def _small(num_levels=4, dtype=jnp.float32, settings=None, **head):
  features = levels((4, 6, 8, 10)[: num_levels - 1], (4, 8, 16, 32)[5 - num_levels :])
  return create_dino(
    Blank(features), 3, num_levels=num_levels, head={**_SMALL, "dtype": dtype, **head},
    settings=settings,
  )  # fmt: skip


def _images(batch=2, size=(64, 96)):
  return np.random.default_rng(0).standard_normal((batch, *size, 3)).astype(np.float32)


def _targets(batch=2):
  boxes = np.array([[0, 0, 0, 0], [10, 5, 40, 30], [20, 30, 90, 60]], np.float32)
  valid = np.array([[False, True, True], [False, True, False]])
  return {
    "boxes": np.broadcast_to(boxes, (batch, 3, 4)).copy(),
    "labels": np.broadcast_to(np.array([0, 2, 1], np.int32), (batch, 3)).copy(),
    "valid": np.resize(valid, (batch, 3)),
  }


@functools.cache
def _variables():
  model = _small()
  return model, jax.jit(lambda x: model.init(jax.random.key(0), x))(_images())


@functools.partial(jax.jit, static_argnums=0)
def _losses(model, variables, images, targets, sizes=None):
  return model.apply(variables, images, True, targets, jax.random.key(1), sizes)


def _shapes(model, size=64):
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)


@pytest.mark.parametrize(
  ("widths", "expected"),
  [((512, 1024, 2048), 23_438_270), ((192, 384, 768), 19_915_710)],
)
def test_counts_as_the_authors(widths, expected):
  model = create_dino(Blank(levels(widths, (8, 16, 32))), 91)
  assert count_parameters(_shapes(model, 256)["params"]) == expected


@pytest.mark.parametrize(
  ("num_levels", "head"),
  [
    (5, {"remat": True}),
    (4, {"shared_heads": False, "position_offset": -0.5, "position_temperature": 1e4}),
    (4, {"dtype": jnp.bfloat16, "sampling_method": "product"}),
  ],
)
def test_other_forms(num_levels, head):
  model, targets, images = _small(num_levels, **head), _targets(), _images()
  variables = jax.jit(lambda x: model.init(jax.random.key(0), x))(images)
  names = variables["params"]["head"]
  assert ("classifier1" in names) == ("shared_heads" in head)
  assert f"projection{num_levels - 1}" in names
  assert names["projection3"]["kernel"].shape[0] == (3 if num_levels == 4 else 1)

  def total(params):
    return sum(_losses(model, {"params": params}, images, targets).values())

  loss, gradient = jax.jit(jax.value_and_grad(total))(variables["params"])
  assert loss.dtype == jnp.float32 and np.isfinite(loss)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
  key_map = head_key_map(model.head)
  exported = export_weights({"params": names}, key_map)
  again, _ = import_weights(exported, {"params": names}, key_map)
  jax.tree.map(np.testing.assert_array_equal, again["params"], dict(names))


def test_detections_of_whole_pictures():
  model, variables = _variables()
  found = jax.jit(model.apply)(variables, _images())
  assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
    "boxes": ((2, 30, 4), jnp.float32),
    "scores": ((2, 30), jnp.float32),
    "labels": ((2, 30), jnp.int32),
    "valid": ((2, 30), jnp.bool_),
  }
  assert (np.diff(found["scores"]) <= 0).all() and found["valid"].all()
  # What is there without the noise does not depend on it.
  losses = _losses(model, variables, _images(), _targets())
  assert len(losses) == 3 * (2 + 1 + 2)
  quiet = model.clone(settings=DINOSettings(denoising_number=0))
  without = _losses(quiet, variables, _images(), _targets())
  for name, value in without.items():
    np.testing.assert_allclose(losses[name], value, rtol=1e-4, err_msg=name)
  assert set(losses) - set(without) == {k for k in losses if k.startswith("denoising")}


def test_pictures_that_are_mostly_padding_or_have_no_objects():
  model, variables = _variables()
  targets = _targets()
  targets["valid"] = np.zeros_like(targets["valid"])
  sizes = jnp.array([[1, 3], [64, 96]])

  def total(params):
    found = _losses(model, {"params": params}, _images(), targets, sizes)
    return sum(found.values()), found

  gradient, losses = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
  for name, value in losses.items():
    assert np.isfinite(value), name
    assert (value > 0) == ("class" in name and "denoising" not in name), name
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path


def test_sharded_as_unsharded():
  model, variables = _variables()
  images, targets = _images(4), _targets(4)
  expected = _losses(model, variables, images, targets)
  sharding = NamedSharding(make_mesh({"data": 4}, jax.devices()[:4]), PartitionSpec("data"))
  images, targets = jax.device_put((images, targets), sharding)
  found = _losses(model, variables, images, targets)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
  program = _losses.lower(model, variables, images, targets).compile().as_text()
  assert not re.findall(r"= \S+ all-gather\(", program)


@pytest.mark.parametrize(
  ("counts", "number"),
  [((3, 1), 100), ((0, 2), 100), ((5, 5), 7), ((4, 0), 1), ((6, 2), 50), ((0, 0), 100)],
)
def test_denoising_by_its_definition(counts, number):
  rng, room = np.random.default_rng(sum(counts)), 6
  slots = num_denoising_slots(number, room)
  valid = np.zeros((2, room), bool)
  for i, count in enumerate(counts):
    valid[i, rng.permutation(room)[:count]] = True  # in no order
  boxes = rng.uniform(0.2, 0.8, (2, room, 4)).astype(np.float32)
  labels = rng.integers(0, 5, (2, room)).astype(np.int32)
  draws = draw_denoising(jax.random.key(number), 2, slots, 5)
  found = denoising_queries(
    boxes, labels, valid, draws, number=number, label_noise=0.5, box_noise=1.0
  )
  most = max(counts)
  groups = 2 * number if 2 * number < 100 else max(2 * number // (2 * max(most, 1)), 1)
  assert found.num_groups == groups and found.counted.sum() == 2 * groups * most
  flip, drawn, signs, distances = map(np.asarray, draws)
  filled = np.zeros((2, slots), bool)
  for i in range(2):
    for block in range(2 * groups):
      for j, own in enumerate(np.flatnonzero(valid[i])):
        slot = block * most + j
        filled[i, slot] = True
        assert found.target[i, slot] == own
        assert found.positive[i, slot] == (block % 2 == 0)
        assert found.group[slot] == block // 2
        label = drawn[i, slot] if flip[i, slot] < 0.25 else labels[i, own]
        assert found.labels[i, slot] == label
        x, y, w, h = boxes[i, own]
        reach = np.where(signs[i, slot], 1, -1) * (distances[i, slot] + block % 2)
        corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        corners = np.clip(corners + reach * np.array([w, h, w, h]) / 2, 0, 1)
        moved = np.concatenate([(corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]])
        np.testing.assert_allclose(found.boxes[i, slot], moved, atol=1e-6)
  np.testing.assert_array_equal(found.filled, filled)
  assert not (np.asarray(found.positive) & ~filled).any()


def test_who_sees_whom():
  blocked = blocked_queries(jnp.array([0, 0, 1, 2]), 2)
  seen = ["110011", "110011", "001011", "000111", "000011", "000011"]
  np.testing.assert_array_equal(~blocked, np.array([[c == "1" for c in row] for row in seen]))


def test_cells_and_positions_of_padded_pictures():
  canvas, sizes = (33, 40), jnp.array([[33, 40], [17, 1], [32, 39]])
  counts = filled_cells((5, 5), sizes, canvas)
  # Cell i begins at pixel floor(i 33 / 5): 0, 6, 13, 19, 26.
  np.testing.assert_array_equal(counts, [[5, 5], [3, 1], [5, 5]])
  table = padded_sine_positions((5, 5), counts, 8, temperature=20.0, offset=-0.5)
  whole = sine_positions((5, 5), 8, temperature=20.0, offset=-0.5)
  part = sine_positions((3, 1), 8, temperature=20.0, offset=-0.5)
  np.testing.assert_allclose(table[0], whole, atol=1e-5)
  np.testing.assert_allclose(table[1, :3, :1], part, atol=1e-5)


def test_matching_takes_the_least_cost():
  true = np.array([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.4], [0, 0, 0, 0]]], np.float32)
  targets = BoxTargets(jnp.array(true), jnp.array([[1, 0, 0]]), jnp.array([[True, True, False]]))
  boxes = jnp.array([[true[0, 1], [0.5, 0.5, 0.1, 0.1], true[0, 0]]])
  logits = jnp.array([[[20.0, -20], [-20, -20], [-20, 20]]])
  found = set_losses(logits, boxes, targets, SetLossSettings())
  np.testing.assert_allclose([found["class"], found["l1"]], 0, atol=1e-6)
  np.testing.assert_allclose(found["giou"], 0, atol=1e-4)  # of the authors' epsilon
  # Sure classes count more than boxes.
  crossed = set_losses(logits[:, ::-1], boxes, targets, SetLossSettings())
  np.testing.assert_allclose([crossed["class"], crossed["l1"]], [0, 1], atol=1e-6)


def test_names_of_whole_checkpoints():
  backbone = Swin(num_classes=0, output_norms=(2, 3, 4))
  model = create_dino(backbone, 91)
  layout = dino_layouts(model, keymap_swin.LAYOUTS)["official"]
  key_map = layout.key_map(model)
  paths = traverse_util.flatten_dict(dict(_shapes(model, 256)), sep="/")
  keys = [key_map(path) for path in paths]
  names = [name for key in keys for name in (*key.names, *key.aliases)]
  assert len(set(names)) == len(names)
  assert {
    "backbone.0.layers.0.blocks.0.attn.qkv.weight",
    "backbone.0.norm3.bias",
    "bbox_embed.5.layers.2.bias",
    "class_embed.0.weight",
    "input_proj.3.0.weight",
    "label_enc.weight",
    "transformer.decoder.bbox_embed.5.layers.0.weight",
    "transformer.decoder.layers.5.cross_attn.sampling_offsets.weight",
    "transformer.decoder.ref_point_head.layers.1.weight",
    "transformer.enc_out_bbox_embed.layers.2.weight",
    "transformer.tgt_embed.weight",
  } <= set(names)
  assert [layout.rename(name) for name in names] == names
  assert layout.rename("module.label_enc.weight") == "label_enc.weight"
  assert not [name for name in names if re.search(layout.not_weights, name)]
  assert re.search(layout.not_weights, "backbone.0.layers.0.blocks.1.attn_mask")
  with pytest.raises(ValueError, match="DINO has no variable 'neck/fc/kernel'"):
    head_key_map(model.head)("params/neck/fc/kernel")


def test_bad_input_is_told():
  model, variables = _variables()
  with pytest.raises(ValueError, match="losses need a key"):
    model.apply(variables, _images(), True, _targets())
  with pytest.raises(
    ValueError, match=r"10 queries are chosen among 7 cells \(maps of 2 x 2, 1 x 1"
  ):
    model.apply(variables, _images(size=(16, 16)))
  with pytest.raises(ValueError, match="2 rows of noised labels for 3 classes"):
    _shapes(_small(num_labels=2))
  with pytest.raises(ValueError, match="6 levels reads 5 maps; the backbone gives 3"):
    create_dino(model.backbone, 3, num_levels=6)
  draws = draw_denoising(jax.random.key(0), 2, 200, 3)
  with pytest.raises(ValueError, match=r"\[2, 200\]; \[2, 12\] was expected: number 1 and 3"):
    denoising_queries(
      *relative_targets(_targets(), jnp.full((2, 2), 64)), draws, number=1, label_noise=0.5,
      box_noise=0.4,
    )  # fmt: skip
  head = {"params": variables["params"]["head"]}
  weights = export_weights(head, head_key_map(model.head))
  weights["class_embed.1.bias"] = weights["class_embed.1.bias"] + 1
  with pytest.raises(ValueError, match=r"class_embed.1.bias is another tensor than transformer"):
    import_weights(weights, head, head_key_map(model.head))


def test_groups_reach_the_backbone():
  model = _small().with_batch_norm_groups(2)
  assert model.batch_norm_groups == model.backbone.batch_norm_groups == 2
