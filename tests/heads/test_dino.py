"""DINO against the authors' answers and losses, its published sizes, and what holds in general."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_swin
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_dino import dino_layouts, head_key_map
from tests import golden
from tests.heads.detectors import Blank, maps_of, padded
from tests.heads.pyramids import levels

# Rows and columns of padding in the second picture of every golden file.
_PADDING = (9, 14)
_ROOM = 4


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
  sizes = np.array([canvas, np.subtract(canvas, _PADDING)])
  template = jax.eval_shape(lambda: head.init(jax.random.key(0), maps, sizes, canvas))
  weights = golden.weights(description)
  key_map = head_key_map(head)
  variables, report = import_weights(weights, template, key_map)
  assert not report.initialised and not report.unused
  exported = export_weights(variables, key_map)
  assert set(exported) == set(weights) | set(description["aliases"])
  for key, value in exported.items():
    np.testing.assert_array_equal(value, weights[description["aliases"].get(key, key)])
  boxes, valid = padded([expected[f"gt_boxes_{i}"] for i in range(2)], _ROOM)
  labels, _ = padded([expected[f"gt_labels_{i}"].astype(np.int32) for i in range(2)], _ROOM)
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
