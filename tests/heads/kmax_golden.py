"""kMaX's decoder and whole head with the weights of golden files."""

import functools

import jax

from hybrid_vit.heads.kmax import ClusterDecoder, KMaX
from hybrid_vit.heads.kmax_semantic import SemanticDecoder
from hybrid_vit.weights.keymap_kmax import head_key_map
from tests import golden
from tests.heads.pyramids import golden_inputs, levels, with_golden_weights

DECODER, HEAD = "kmax_decoder_5classes", "kmax_head_65x97"


@functools.cache
def run_decoder():
  """The decoder's answer to the maps of its golden file."""
  description, _ = golden.load("dense/kmax", DECODER)
  arguments = description["arguments"]
  decoder = ClusterDecoder(
    arguments["num_classes"],
    num_queries=arguments["num_queries"],
    decoder_layers=tuple(arguments["dec_layers"]),
  )
  maps = tuple(golden_inputs(description["input"]["features"]))

  def key_map(path):
    collection, _, rest = path.partition("/")
    key = head_key_map(f"{collection}/decoder/{rest}")
    return key.renamed(lambda name: name.removeprefix("sem_seg_head.predictor."))

  variables = with_golden_weights(decoder, key_map, golden.weights(description), maps)
  with jax.default_matmul_precision("float32"):
    return jax.jit(decoder.apply)(variables, maps)


@functools.cache
def run_head():
  """(head, weights, variables, (answer, pixel decoder's maps, semantic logits)) of the golden."""
  description, _ = golden.load("dense/kmax", HEAD)
  arguments = description["arguments"]
  head = KMaX(
    levels(arguments["widths"]),
    arguments["num_classes"],
    num_queries=arguments["num_queries"],
    decoder_layers=tuple(arguments["decoder_layers"]),
    **{k: tuple(arguments[k]) for k in ("pixel_channels", "pixel_depths", "pixel_blocks")},
  )
  inputs = golden_inputs(description["input"]["features"])
  endpoints = {f.name: x for f, x in zip(head.features, inputs)}
  weights = golden.weights(description)
  variables = with_golden_weights(head, head_key_map, weights, endpoints)
  semantic = SemanticDecoder((*head.features[:2], head.features[-1]), head.num_outputs + 1)

  def run(variables, endpoints):
    answer, inside = head.apply(
      variables,
      endpoints,
      capture_intermediates=lambda module, _: module.name == "pixel_decoder",
    )
    own = {collection: part["semantic_decoder"] for collection, part in variables.items()}
    pixels = inside["intermediates"]["pixel_decoder"]["__call__"][0]
    return answer, pixels, semantic.apply(own, endpoints)

  with jax.default_matmul_precision("float32"):
    return head, weights, variables, jax.jit(run)(variables, endpoints)
