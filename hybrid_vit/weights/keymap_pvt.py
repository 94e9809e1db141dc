"""PVT: names of the authors' PyTorch tensors (whai362/PVT), and of transformers' `PvtModel`."""

import re

from hybrid_vit.weights import convert, torch_keys

_OFFICIAL_BLOCK = {
  "norm1": "norm1",
  "norm2": "norm2",
  "attention/query": "attn.q",
  "attention/key_value": "attn.kv",
  "attention/reduction": "attn.sr",
  "attention/reduction_norm": "attn.norm",
  "attention/out": "attn.proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}

_TRANSFORMERS_BLOCK = {
  "norm1": "layer_norm_1",
  "norm2": "layer_norm_2",
  "attention/query": "attention.self.query",
  "attention/key_value": "attention.self",
  "attention/reduction": "attention.self.sequence_reduction",
  "attention/reduction_norm": "attention.self.layer_norm",
  "attention/out": "attention.output.dense",
  "fc1": "mlp.dense1",
  "fc2": "mlp.dense2",
}


def official_key(path: str) -> convert.OfficialKey:
  """The authors' tensor for one of ours, such as "params/stage1_block0/attention/query/kernel".

  Raises:
    ValueError: for a path that PVT does not have.
  """
  _, scope, *rest = path.split("/")
  if match := re.fullmatch(r"position_embedding(\d+)", scope):
    return torch_keys.same(f"pos_embed{match[1]}")
  if scope == "class_token":
    return torch_keys.same("cls_token")
  leaf = rest[-1]
  if scope == "norm":
    return torch_keys.norm("norm", leaf)
  if scope == "head":
    return torch_keys.dense("head", leaf)
  if scope == "stem" or scope.startswith("merge"):
    stage = 1 if scope == "stem" else int(scope.removeprefix("merge")) + 1
    if rest[0] == "norm":
      return torch_keys.norm(f"patch_embed{stage}.norm", leaf)
    return torch_keys.conv(f"patch_embed{stage}.proj", leaf)
  block, module = torch_keys.block_of(scope), "/".join(rest[:-1])
  if block is None or module not in _OFFICIAL_BLOCK:
    raise torch_keys.no_such_variable("PVT", path)
  name = f"block{block[0]}.{block[1]}.{_OFFICIAL_BLOCK[module]}"
  if "norm" in module:
    return torch_keys.norm(name, leaf)
  if module == "attention/reduction":
    return torch_keys.conv(name, leaf)
  return torch_keys.dense(name, leaf)


def transformers_key(path: str) -> convert.OfficialKey:
  """The same for `PvtForImageClassification` of transformers, where key and value lie apart.

  Raises:
    ValueError: for a path that PVT does not have.
  """
  _, scope, *rest = path.split("/")
  embeddings = "pvt.encoder.patch_embeddings"
  if match := re.fullmatch(r"position_embedding(\d+)", scope):
    return torch_keys.same(f"{embeddings}.{int(match[1]) - 1}.position_embeddings")
  if scope == "class_token":
    return torch_keys.same(f"{embeddings}.3.cls_token")
  leaf = rest[-1]
  if scope == "norm":
    return torch_keys.norm("pvt.encoder.layer_norm", leaf)
  if scope == "head":
    return torch_keys.dense("classifier", leaf)
  if scope == "stem" or scope.startswith("merge"):
    stage = 0 if scope == "stem" else int(scope.removeprefix("merge"))
    if rest[0] == "norm":
      return torch_keys.norm(f"{embeddings}.{stage}.layer_norm", leaf)
    return torch_keys.conv(f"{embeddings}.{stage}.projection", leaf)
  block, module = torch_keys.block_of(scope), "/".join(rest[:-1])
  if block is None or module not in _TRANSFORMERS_BLOCK:
    raise torch_keys.no_such_variable("PVT", path)
  prefix = f"pvt.encoder.block.{block[0] - 1}.{block[1]}"
  name = f"{prefix}.{_TRANSFORMERS_BLOCK[module]}"
  if module == "attention/key_value":
    return torch_keys.fused(torch_keys.dense, leaf, f"{name}.key", f"{name}.value")
  if "norm" in module:
    return torch_keys.norm(name, leaf)
  if module == "attention/reduction":
    return torch_keys.conv(name, leaf)
  return torch_keys.dense(name, leaf)


LAYOUTS = {
  "official": convert.Layout(lambda _: official_key),
  "transformers": convert.Layout(lambda _: transformers_key),
}
