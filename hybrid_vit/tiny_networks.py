"""Arguments that make a network of each family tiny, as the backbone of local tries of dense tasks.

On pictures of 64 x 64 they give maps of stride 4, 8 and 16 (RevCol: 4 to 32), each trained for
minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_vit.recipes import TINY_MOAT

FOCALNET: Mapping[str, Any] = dict(
  embed_dim=32,
  depths=(1, 1, 2),
  focal_levels=(2, 2, 2),
  focal_windows=(3, 3, 3),
  patch_size=4,
  pad_maps=True,
  output_norms=(1, 2, 3),
  drop_path_rate=0.0,
)
L2VIT: Mapping[str, Any] = dict(
  widths=(16, 32, 48),
  depths=(2, 2, 2),
  num_heads=(1, 2, 3),
  mlp_ratios=(2, 2, 2),
  window_size=4,
  output_norms=(1, 2, 3),
  drop_path_rate=0.0,
)
MCI: Mapping[str, Any] = dict(
  depths=(1, 1, 1),
  widths=(32, 64, 64),
  mlp_ratios=(3, 3, 3),
  mlp_kernel_size=3,
  token_mixers=("repmixer", "repmixer", "attention"),
  downsamples=(True, False, True),
  se_downsamples=(False, False, True),
  position_kernel_sizes=(None, None, 3),
  layer_scale=0.1,
  head_expansion=None,
  drop_path_rate=0.0,
)
MOAT: Mapping[str, Any] = dict(TINY_MOAT, strides=(2, 2, 2), pool_size=3)
REVCOL: Mapping[str, Any] = dict(
  widths=(16, 24, 32, 48),
  depths=(1, 1, 1, 1),
  layer_scale_init=1.0,
  drop_path_rate=0.0,
  intermediate_supervision=False,
  reversible=False,
)
SMT: Mapping[str, Any] = dict(
  depths=(1, 2, 1),
  widths=(16, 32, 48),
  block_types=("modulation", "hybrid", "attention"),
  modulation_heads=(4, 4, None),
  attention_heads=(None, 4, 6),
  mlp_ratios=(4.0, 4.0, 2.0),
  drop_path_rate=0.0,
)
SWIN: Mapping[str, Any] = dict(
  width=24,
  depths=(1, 1, 2),
  num_heads=(1, 2, 4),
  patch_size=4,
  window_size=4,
  output_norms=(1, 2, 3),
  shrink_windows=False,
  drop_path_rate=0.0,
)
