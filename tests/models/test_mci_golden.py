"""MCi against the authors' own code, layer by layer, in the form of training and merged."""

import functools

import jax
import numpy as np
import pytest

from hybrid_vit.models import mci, mobileone
from hybrid_vit.models.registry import create_model
from hybrid_vit.weights import convert, keymap_mci
from tests import golden

OFFICIAL = keymap_mci.LAYOUTS["official"]


def network(description) -> mci.MCi:
  """Our network for the authors' arguments."""
  a = description["arguments"]
  return mci.MCi(
    depths=tuple(a["layers"]),
    widths=tuple(a["embed_dims"]),
    num_classes=a["projection_dim"],
    mlp_ratios=tuple(a["mlp_ratios"]),
    token_mixers=tuple(a["token_mixers"]),
    downsamples=tuple(a["downsamples"]),
    se_downsamples=tuple(a["se_downsamples"]),
  )


def load(model, weights, x):
  """Our variables from the authors' tensors; every name is used once."""
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  return convert.import_weights(
    weights, template, OFFICIAL.key_map(model), may_ignore=OFFICIAL.not_weights
  )[0]


def answers(model, variables, x):
  """Our maps under the authors' names, in the order of computation, and the embedding."""
  embedding, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  names = ["stage1"]
  for stage in range(2, len(model.depths) + 1):
    names.append(f"stage{stage}_downsample")
    if model.position_kernel_sizes[stage - 1] is not None:
      names.append(f"stage{stage}_position")
    names.append(f"stage{stage}")
  maps = {f"network.{i}": endpoints[name] for i, name in enumerate(names)}
  return {"patch_embed": endpoints["stem"], **maps, "conv_exp": endpoints["head_conv"]}, embedding


@pytest.mark.parametrize("name", golden.names("mobileclip", "mci_small*"))
@pytest.mark.parametrize("merged", [False, True])
def test_small(name, merged):
  description, expected = golden.load("mobileclip", name)
  model, x = network(description), golden.image(description)
  variables = load(model, golden.weights(description), x)
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["trainable_count"]
  if merged:
    model, variables = model.clone(reparameterized=True), mobileone.reparameterize(variables)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), variables, dict(shapes))
    exported = convert.export_weights(variables, OFFICIAL.key_map(model))
    theirs = description["reparameterized_parameters"]
    assert {k: list(v.shape) for k, v in exported.items()} == {
      k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")
    }
  maps, embedding = answers(model, variables, x)
  golden.assert_matches(expected, {**maps, "output": embedding})


def test_mci0():
  description, expected = golden.load("mobileclip", "mobileclip_s0_256")
  description["parameters"] = {
    k: v for k, v in description["parameters"].items() if k.startswith("image_encoder.")
  }
  model, x = create_model("mci0"), golden.image(description)
  weights = {OFFICIAL.rename(k): v for k, v in golden.weights(description).items()}
  maps, embedding = answers(model, load(model, weights, x), x)
  actual = {f"image.{k}": v for k, v in maps.items()}
  expected = {k: v for k, v in expected.items() if k.startswith("image.") or k == "image_embedding"}
  # A map's largest number is 30 of its deviations: three roundings of it are 1.1e-5.
  golden.assert_matches(expected, {**actual, "image_embedding": embedding}, 2e-5)
