"""CLIP: both towers' names in one checkpoint, and the scale's.

"official" is apple/ml-mobileclip (`mobileclip_s0.pt`, …), "open_clip" open_clip's plain ViT models
and OpenAI's own files, "timm" open_clip's copies of MobileCLIP, whose image tower is timm's, and
"transformers" `CLIPModel`.
"""

import numpy as np

from hybrid_vit.models.clip import CLIP
from hybrid_vit.models.mci import MCi
from hybrid_vit.models.vit import VisionTransformer
from hybrid_vit.weights import keymap_mci, keymap_text, keymap_vit, torch_keys
from hybrid_vit.weights.convert import KeyMap, Layout, OfficialKey


def _image_layout(model: CLIP, layout: str) -> Layout:
  if not isinstance(model.image, (MCi, VisionTransformer)):
    raise ValueError(
      f"no checkpoint of others has a CLIP with {type(model.image).__name__} for its pictures; "
      "MCi and VisionTransformer have one"
    )
  layouts = keymap_mci.LAYOUTS if isinstance(model.image, MCi) else keymap_vit.LAYOUTS
  return layouts["official" if layout == "open_clip" else layout]


def _key_map(model: CLIP, layout: str, image_prefix: str, text_prefix: str) -> KeyMap:
  image = _image_layout(model, layout).key_map(model.image)
  text = keymap_text.LAYOUTS["open_clip" if layout == "timm" else layout].key_map(model.text)

  def key_map(path: str) -> OfficialKey:
    collection, tower, *rest = path.split("/")
    below = "/".join((collection, *rest))
    if tower == "image":
      return image(below).below(image_prefix)
    if tower == "text":
      return text(below).below(text_prefix)
    if path == "params/logit_scale":
      return torch_keys.same("logit_scale")
    raise torch_keys.no_such_variable("CLIP", path)

  return key_map


def _official(model: CLIP) -> KeyMap:
  return _key_map(model, "official", "image_encoder.model.", "text_encoder.")


def _timm(model: CLIP) -> KeyMap:
  if getattr(model.image, "pre_norm", False):
    raise ValueError("open_clip's plain ViT has the layout open_clip")
  return _key_map(model, "timm", "visual.trunk.", "text.")


def _timm_constants(model: CLIP) -> dict[str, np.ndarray]:
  """The bias of zeros beside timm's projection."""
  constants = _image_layout(model, "timm").constants(model.image)
  return {f"visual.trunk.{name}": value for name, value in constants.items()}


def _open_clip(model: CLIP) -> KeyMap:
  if not getattr(model.image, "pre_norm", False):
    raise ValueError("open_clip's own layout is that of its plain ViT image tower")
  return _key_map(model, "open_clip", "", "")


def _transformers(model: CLIP) -> KeyMap:
  if isinstance(model.image, MCi):
    raise ValueError("transformers has no MCi")
  return _key_map(model, "transformers", "", "")


LAYOUTS = {
  "official": Layout(
    _official, not_weights=torch_keys.BATCH_NORM_COUNTER, arguments=keymap_mci.merged_arguments
  ),
  "open_clip": Layout(
    _open_clip,
    # The last three are OpenAI's, numbers of its program.
    not_weights=r"^attn_mask$|^(input_resolution|context_length|vocab_size)$",
  ),
  "timm": Layout(
    _timm,
    not_weights=rf"{torch_keys.BATCH_NORM_COUNTER}|(^|\.)attn_mask$",
    constants=_timm_constants,
    arguments=keymap_mci.merged_arguments,
  ),
  "transformers": Layout(_transformers, not_weights=r"\.position_ids$"),
}
