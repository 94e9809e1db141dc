"""Mask2Former over a Swin with the weights of a golden file."""

import functools
import re

import jax

from hybrid_vit.heads.mask2former import Mask2Former
from hybrid_vit.models.swin import Swin
from hybrid_vit.weights import keymap_swin
from hybrid_vit.weights.convert import import_weights
from hybrid_vit.weights.keymap_mask2former import mask2former_layouts
from tests import golden


@functools.cache
def run_golden(name):
  """(backbone, key map, weights, variables, (endpoints, pixel decoder's maps, head's answer))."""
  description, _ = golden.load("dense/mask2former", name)
  backbone, head = _parts(description["arguments"])
  images = golden.image(description)

  def run(variables, images):
    _, endpoints = backbone.apply({"params": variables["params"]["backbone"]}, images)
    answer, inside = head.apply(
      {"params": variables["params"]["head"]},
      endpoints,
      capture_intermediates=lambda module, _: module.name == "pixel_decoder",
    )
    pixels = inside["intermediates"]["pixel_decoder"]["__call__"][0]
    return endpoints, pixels, answer

  layout = mask2former_layouts(backbone, keymap_swin.LAYOUTS)["transformers"]
  weights = {layout.rename(k): v for k, v in golden.weights(description).items()}
  weights = {k: v for k, v in weights.items() if not re.search(layout.not_weights, k)}
  template = {"params": dict(zip(("backbone", "head"), shapes_of(backbone, head, images)))}
  variables, report = import_weights(weights, template, layout.key_map(None))
  assert not report.initialised and not report.unused
  with jax.default_matmul_precision("float32"):
    return backbone, layout.key_map(None), weights, variables, jax.jit(run)(variables, images)


def shapes_of(backbone, head, images):
  """Shapes of both networks' parameters."""

  def init(images):
    (_, endpoints), variables = backbone.init_with_output(jax.random.key(0), images)
    return variables["params"], head.init(jax.random.key(0), endpoints)["params"]

  return jax.eval_shape(init, images)


def _parts(arguments):
  swin = arguments["swin"]
  backbone = Swin(
    width=swin["embed_dim"],
    depths=tuple(swin["depths"]),
    num_heads=tuple(swin["num_heads"]),
    num_classes=0,
    window_size=swin["window_size"],
    mlp_ratio=swin["mlp_ratio"],
    qkv_bias=swin["qkv_bias"],
    shrink_windows=False,
    output_norms=(1, 2, 3, 4),
  )
  head = Mask2Former(
    backbone.features,
    arguments["num_labels"],
    channels=arguments["feature_size"],
    mask_channels=arguments["feature_size"],
    num_queries=arguments["num_queries"],
    num_heads=arguments["num_attention_heads"],
    encoder_layers=arguments["encoder_layers"],
    encoder_hidden=arguments["encoder_feedforward_dim"],
    decoder_layers=arguments["decoder_layers"] - 1,
    decoder_hidden=arguments["dim_feedforward"],
  )
  return backbone, head
