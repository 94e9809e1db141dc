"""CLIP: both towers' names in one checkpoint, and the scale's.

"official" is apple/ml-mobileclip (`mobileclip_s0.pt`, …), "open_clip" its plain ViT models, and
"transformers" `CLIPModel`.
"""

import dataclasses

from hybrid_vit.models.clip import CLIP
from hybrid_vit.models.mci import MCi
from hybrid_vit.weights import keymap_mci, keymap_text, keymap_vit, torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey


def _key_map(model: CLIP, layout: str, image_prefix: str, text_prefix: str) -> KeyMap:
  image_layouts = keymap_mci.LAYOUTS if isinstance(model.image, MCi) else keymap_vit.LAYOUTS
  image = image_layouts["official" if layout == "open_clip" else layout].key_map(model.image)
  text = keymap_text.LAYOUTS[layout].key_map(model.text)

  def key_map(path: str) -> OfficialKey:
    collection, tower, *rest = path.split("/")
    below = "/".join((collection, *rest))
    if tower == "image":
      return _below(image_prefix, image(below))
    if tower == "text":
      return _below(text_prefix, text(below))
    if path == "params/logit_scale":
      return torch_keys.same("logit_scale")
    raise torch_keys.no_such_variable("CLIP", path)

  return key_map


def _below(prefix: str, key: OfficialKey) -> OfficialKey:
  name, *further = (f"{prefix}{name}" for name in key.names)
  return dataclasses.replace(key, name=name, further=tuple(further))


def _official(model: CLIP) -> KeyMap:
  return _key_map(model, "official", "image_encoder.model.", "text_encoder.")


def _open_clip(model: CLIP) -> KeyMap:
  if not getattr(model.image, "pre_norm", False):
    raise ValueError("open_clip's own layout is that of its plain ViT image tower")
  return _key_map(model, "open_clip", "", "")


def _transformers(model: CLIP) -> KeyMap:
  if isinstance(model.image, MCi):
    raise ValueError("transformers has no MCi")
  return _key_map(model, "transformers", "", "")


LAYOUTS = {
  "official": Layout(_official, not_weights=torch_keys.BATCH_NORM_COUNTER),
  "open_clip": Layout(_open_clip, not_weights=r"^attn_mask$"),
  "transformers": Layout(_transformers, not_weights=r"\.position_ids$"),
}
