"""CLIP's text towers: names of the authors' tensors, open_clip's and transformers'.

"official" is apple/ml-mobileclip (`mobileclip/text_encoder.py`). "open_clip" is `ViT-B-16` of
open_clip (also a MobileCLIP tower of blocks of attention alone, there below `text.`), and
"transformers" `CLIPTextModelWithProjection`.
"""

from hybrid_vit.models.text import TextTransformer
from hybrid_vit.weights import keymap_vit, torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey
from hybrid_vit.weights.keymap_mci import repmixer_key

_HEAD = "params/head/kernel"


def official_key_map(model: TextTransformer) -> KeyMap:
  """Names of apple/ml-mobileclip."""
  last = model.depth + 1

  def key_map(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, modules, leaf = parts[0], parts[1:-1], parts[-1]
    if scope.startswith("block"):
      index = int(scope.removeprefix("block"))
      if model.mixer_blocks and index in (0, last):
        return repmixer_key("official", f"transformer.{index}", modules, leaf)
      return keymap_vit.MOBILECLIP_BLOCK.key(f"transformer.{index}", modules[0], leaf)
    if scope == "final_norm":
      return torch_keys.norm("final_layer_norm", leaf)
    known = {
      "params/token_embedding": torch_keys.same("embedding_layer.weight"),
      "params/position_sequence": keymap_vit.with_leading_ones(
        "positional_embedding.pos_embed.pos_embed", 2, 1
      ),
      _HEAD: torch_keys.same("projection_layer"),
    }
    return _known(known, path)

  return key_map


def open_clip_key_map(model: TextTransformer) -> KeyMap:
  """Names of open_clip."""

  def key_map(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, modules, leaf = parts[0], parts[1:-1], parts[-1]
    if scope.startswith("block"):
      prefix = f"transformer.resblocks.{scope.removeprefix('block')}"
      return keymap_vit.OPEN_CLIP_BLOCK.key(prefix, modules[0], leaf)
    if scope == "final_norm":
      return torch_keys.norm("ln_final", leaf)
    known = {
      "params/token_embedding": torch_keys.same("token_embedding.weight"),
      "params/position_sequence": torch_keys.same("positional_embedding"),
      _HEAD: torch_keys.same("text_projection"),
    }
    return _known(known, path)

  return _of_attention_alone(model, key_map)


def transformers_key_map(model: TextTransformer) -> KeyMap:
  """Names of transformers."""

  def key_map(path: str) -> OfficialKey:
    parts = path.split("/")[1:]
    scope, modules, leaf = parts[0], parts[1:-1], parts[-1]
    if scope.startswith("block"):
      prefix = f"text_model.encoder.layers.{scope.removeprefix('block')}"
      return keymap_vit.TRANSFORMERS_CLIP_BLOCK.key(prefix, modules[0], leaf)
    if scope == "final_norm":
      return torch_keys.norm("text_model.final_layer_norm", leaf)
    embeddings = "text_model.embeddings"
    known = {
      "params/token_embedding": torch_keys.same(f"{embeddings}.token_embedding.weight"),
      "params/position_sequence": torch_keys.same(f"{embeddings}.position_embedding.weight"),
      _HEAD: torch_keys.dense("text_projection", "kernel"),
    }
    return _known(known, path)

  return _of_attention_alone(model, key_map)


def _known(keys: dict[str, OfficialKey], path: str) -> OfficialKey:
  if path not in keys:
    raise torch_keys.no_such_variable("TextTransformer", path)
  return keys[path]


def _of_attention_alone(model: TextTransformer, key_map: KeyMap) -> KeyMap:
  if model.mixer_blocks:
    raise ValueError("only the authors' layout has a text tower with convolutional blocks")
  return key_map


# A file of a whole CLIP holds the image tower and the scale too.
LAYOUTS = {
  "official": Layout(
    official_key_map,
    not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|^image_encoder\.|^logit_scale$",
    rename=lambda name: name.removeprefix("text_encoder."),
  ),
  "open_clip": Layout(
    open_clip_key_map,
    not_weights=r"^visual\.|^logit_scale$|^attn_mask$",
    rename=lambda name: name.removeprefix("text."),
  ),
  "transformers": Layout(
    transformers_key_map,
    not_weights=r"^vision_model\.|^visual_projection\.|^logit_scale$|\.position_ids$",
  ),
}
