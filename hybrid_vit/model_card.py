"""The page of a repository of weights: what they are, what they expect, how they are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import yaml

from hybrid_vit.data.classes import CLASS_NAMES
from hybrid_vit.stored_tasks import DENSE_TASKS
from hybrid_vit.weights.stored import described_network, is_two_towers, task_of

# The hub's names of the tasks, by which it sorts repositories.
_PIPELINES = {
  "classification": "image-classification",
  "intermediate_supervision": "image-classification",
  "distillation": "image-classification",
  "masked_autoencoding": "image-feature-extraction",
  "contrastive": "zero-shot-image-classification",
  "segmentation": "image-segmentation",
  "mask_segmentation": "image-segmentation",
  "instance_segmentation": "image-segmentation",
  "panoptic_segmentation": "image-segmentation",
  "depth": "depth-estimation",
  "detection": "object-detection",
}
# What `hybrid_vit.load_task` answers of a photo.
_METHODS = {
  "segmentation": "classes",
  "mask_segmentation": "classes",
  "depth": "depth",
  "detection": "objects",
  "instance_segmentation": "objects",
  "panoptic_segmentation": "panoptic",
}
_SHOWN_CLASSES = 20


def model_card(
  address: str, variables: Mapping[str, Any], metadata: Mapping[str, Any], licence: str
) -> str:
  """Markdown with the hub's front matter.

  Args:
    address: by which the weights are loaded, "hf:owner/name".
    variables: {"params", "batch_stats"}.
    metadata: what lies beside the weights.
    licence: one of the hub's identifiers ("apache-2.0"), or the name of another licence.
  """
  task = task_of(metadata)
  network = described_network(metadata)
  header: dict[str, Any] = {"library_name": "hybrid_vit", "tags": ["jax", "flax", network["name"]]}
  if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
    header["license"] = licence
  else:
    header |= {"license": "other", "license_name": licence}
  if task in _PIPELINES:
    header["pipeline_tag"] = _PIPELINES[task]
  parts = [
    f"---\n{yaml.safe_dump(header, sort_keys=True)}---",
    f"# {_title(metadata, network)}",
    _table(_facts(variables, metadata, network, task, licence)),
    "## Pictures\n\nThe weights expect photos prepared so:",
    _table({k: _cell(v) for k, v in (metadata.get("preprocessing") or {}).items()}),
    "## Measured",
    _measured(metadata),
    "## Use",
    _use(address, metadata, task),
  ]
  return "\n\n".join(parts) + "\n"


def _title(metadata: Mapping[str, Any], network: Mapping[str, Any]) -> str:
  if metadata.get("system"):
    return str(metadata["system"])
  text = metadata.get("text_tower")
  settings = metadata.get("task_settings") or {}
  under = (settings.get("detector") or settings.get("head") or {}).get("name")
  return network["name"] + (f" and {text}" if text else "") + (f" under {under}" if under else "")


def _facts(
  variables: Mapping[str, Any],
  metadata: Mapping[str, Any],
  network: Mapping[str, Any],
  task: str,
  licence: str,
) -> dict[str, str]:
  facts = {"network": f"`{network['name']}`"}
  if network.get("arguments"):
    facts["with"] = ", ".join(f"`{k}={v!r}`" for k, v in network["arguments"].items())
  parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  facts["parameters"] = f"{parameters:,}"
  facts["task"] = task
  names = next((metadata[key] for key in CLASS_NAMES if metadata.get(key)), ())
  if metadata.get("num_classes"):
    shown = ", ".join(map(str, names[:_SHOWN_CLASSES])) + ("…" if names[_SHOWN_CLASSES:] else "")
    facts["classes"] = f"{metadata['num_classes']}" + (f": {shown}" if shown else "")
  step = metadata.get("step")
  facts["weights"] = str(metadata.get("weights") or "not said") + (
    f", step {step}" if step is not None else ""
  )
  source = metadata.get("source") or {}
  if source.get("repository"):
    facts["from"] = f"hf:{source['repository']}@{source['commit']}"
  for name, digest in (source.get("files") or {}).items():
    facts[f"file {name}"] = f"SHA-256 {digest}"
  facts["licence"] = licence
  return facts


def _measured(metadata: Mapping[str, Any]) -> str:
  results = metadata.get("results") or {}
  if not results:
    return "No figures lie beside these weights."
  return _table({name: f"{float(value):.5g}" for name, value in results.items()})


def _use(address: str, metadata: Mapping[str, Any], task: str) -> str:
  if is_two_towers(metadata):
    code = (
      f'model = hybrid_vit.load_clip("{address}")\n'
      'images, texts = model.encode_image(["cat.jpg"]), model.encode_text(["a cat", "a dog"])\n'
      "probabilities = model.probabilities(images, texts)"
    )
  elif task in DENSE_TASKS:
    code = (
      f'stored = hybrid_vit.load_task("{address}")\n'
      f"answer = stored.{_METHODS[task]}(photo)  # uint8 [H, W, 3]"
    )
  else:
    code = (
      f'network = hybrid_vit.load_network("{address}")\n'
      "# images: float32 [B, S, S, 3], prepared as network.preprocessing says.\n"
      "logits, endpoints = network.model.apply(network.variables, images, train=False)"
    )
  return (
    f"```python\nimport hybrid_vit\n\n{code}\n```\n\n```bash\n"
    f"python -m hybrid_vit.tools.predict --weights={address} photo.jpg\n```\n\n"
    f"`--config.init_from={address}` begins a training with them. All of it needs the package's "
    "extra `hub`."
  )


def _cell(value: Any) -> str:
  return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(rows: Mapping[str, str]) -> str:
  cells = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows.items()]
  return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
