"""How deep in its network a parameter lies: for rates that decay layer by layer.

Every family here names its parts alike: "stem", "stage2_block0", what begins a stage
("stage2_downsample", "merge1"), "head". One block is one layer, as in BEiT and MAE
(arXiv:2106.08254, arXiv:2111.06377); the blocks of RevCol lie on a grid of columns and blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"stage(\d+)_block(\d+)/")
# Stands before a stage's blocks, and belongs to its first.
_BEGINS = re.compile(r"stage(\d+)_(?:downsample|embed|embedding|merging|position)/")
# The same under a number counted from the first passage between stages.
_MERGES = re.compile(r"merge(\d+)/")
_POSITIONS = re.compile(r"position_embedding(\d+)$")
# Stands behind a stage's blocks, and belongs to its last.
_ENDS = re.compile(r"stage(\d+)_norm/")
_FIRST = re.compile(r"(?:stem/|pre_norm/|position_(?:embedding|sequence)$|distillation_token$)")
# Of a network with a decoder, see `heads.dense_model`.
_BACKBONE = "backbone/"
_LAST = re.compile(r"(?:(?:auxiliary_)?head\w*|norm|decoder\d+)/")

_COLUMN = re.compile(r"column(\d+)/")
_COLUMN_BLOCK = re.compile(r"column(\d+)/level(\d+)/block(\d+)/")
_GAIN = re.compile(r"column(\d+)/alpha\d+$")
_FUSION = re.compile(r"column(\d+)/level(\d+)/")


def layer_depths(paths: Iterable[str]) -> dict[str, int]:
  """The layer of each parameter of a network: 0 for the stem, the largest for the head.

  Block number b (counted through all stages) has 1 + b. What leads into a stage goes with its first
  block, a stage's closing norm with its last; position tables and class tokens go with what they
  are added to. Of RevCol, block b of column c has 1 + b + c, a fusion goes with its level's first
  block, a gain with its column's, decoders with the heads. Where a decoder stands on a
  "backbone", all that is not of the backbone lies as deep as its head would.

  Args:
    paths: of all parameters, "stage1_block0/attention/out/kernel".

  Raises:
    ValueError: a part whose place is not known, as in a network that names its parts otherwise.
  """
  paths = list(paths)
  if any(path.startswith(_BACKBONE) for path in paths):
    return _with_decoder(paths)
  if any(_COLUMN.match(path) for path in paths):
    return _on_grid(paths)
  found = (_BLOCK.match(path) for path in paths)
  blocks = sorted({(int(m[1]), int(m[2])) for m in found if m})
  layer = {block: number for number, block in enumerate(blocks, start=1)}
  first = {stage: layer[stage, block] for stage, block in reversed(blocks)}
  last = {stage: layer[stage, block] for stage, block in blocks}
  # A class token beside numbered tables enters with the last of them.
  tables = [int(m[1]) for m in map(_POSITIONS.match, paths) if m]

  def depth(path: str) -> int | None:
    if m := _BLOCK.match(path):
      return layer[int(m[1]), int(m[2])]
    if m := _BEGINS.match(path) or _POSITIONS.match(path):
      return 0 if m[1] == "1" else first.get(int(m[1]))
    if m := _MERGES.match(path):
      return first.get(int(m[1]) + 1)
    if m := _ENDS.match(path):
      return last.get(int(m[1]))
    if path == "class_token":
      return first.get(max(tables)) if tables else 0
    if _FIRST.match(path):
      return 0
    return len(blocks) + 1 if _LAST.match(path) else None

  return _all_known({path: depth(path) for path in paths})


def _with_decoder(paths: list[str]) -> dict[str, int]:
  """Of a backbone under a decoder: the decoder is as deep as a head would be."""
  own = [path.removeprefix(_BACKBONE) for path in paths if path.startswith(_BACKBONE)]
  depths = layer_depths([*own, "head/kernel"])
  last = depths["head/kernel"]
  return {
    path: depths[path.removeprefix(_BACKBONE)] if path.startswith(_BACKBONE) else last
    for path in paths
  }


def _on_grid(paths: list[str]) -> dict[str, int]:
  """RevCol's: see `layer_depths`."""
  found = [m for m in map(_COLUMN_BLOCK.match, paths) if m]
  blocks = sorted({(int(m[2]), int(m[3])) for m in found})
  number = {block: b for b, block in enumerate(blocks)}
  columns = 1 + max(int(m[1]) for m in map(_COLUMN.match, paths) if m)

  def depth(path: str) -> int | None:
    if m := _COLUMN_BLOCK.match(path):
      return 1 + int(m[1]) + number[int(m[2]), int(m[3])]
    if m := _GAIN.match(path):
      return 1 + int(m[1])
    if m := _FUSION.match(path):
      return 1 + int(m[1]) + number[int(m[2]), 0]
    if _FIRST.match(path):
      return 0
    return len(blocks) + columns if _LAST.match(path) else None

  return _all_known({path: depth(path) for path in paths})


def _all_known(depths: dict[str, int | None]) -> dict[str, int]:
  known = {path: depth for path, depth in depths.items() if depth is not None}
  for path in depths:
    if path not in known:
      raise ValueError(
        f"how deep parameter {path!r} lies is not known: name the layers yourself, "
        "config.optimizer.layer_decay.layers = (('^stem/', 0), …, ('^head', 13))"
      )
  return known
