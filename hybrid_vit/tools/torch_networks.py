"""The same networks in PyTorch, as calls to time: timm's and transformers'.

Where neither has the very network, one of the same kind and size stands beside it; the form's name
says which.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hybrid_vit.data.ahead import available_cores
from hybrid_vit.models.registry import model_entry
from hybrid_vit.tools.torch_process import PeerError, serve, served

PEERS = ("timm", "transformers")
# Names there, by ours.
_TIMM: Mapping[str, str] = {
  "convnext_tiny": "convnext_tiny", "convnext_small": "convnext_small",
  "convnext_base": "convnext_base", "deit_tiny_patch16_224": "deit_tiny_patch16_224",
  "deit_small_patch16_224": "deit_small_patch16_224",
  "deit_base_patch16_224": "deit_base_patch16_224",
  "focalnet_base_lrf": "focalnet_base_lrf", "focalnet_base_srf": "focalnet_base_srf",
  "focalnet_small_lrf": "focalnet_small_lrf", "focalnet_small_srf": "focalnet_small_srf",
  "focalnet_tiny_lrf": "focalnet_tiny_lrf", "focalnet_tiny_srf": "focalnet_tiny_srf",
  "mci0": "fastvit_mci0", "mci1": "fastvit_mci1", "mci2": "fastvit_mci2",
  "resnet50": "resnet50", "resnet101": "resnet101",
  "swin_base": "swin_base_patch4_window7_224", "swin_small": "swin_small_patch4_window7_224",
  "swin_tiny": "swin_tiny_patch4_window7_224", "vit_b16": "vit_base_patch16_224",
  "vit_base_patch16_224": "vit_base_patch16_224",
  "moat_0": "coatnet_0_rw_224", "moat_1": "coatnet_1_rw_224",
}  # fmt: skip
# MBConv and attention of about the size.
_STAND_INS = ("moat_0", "moat_1")
_TRANSFORMERS: Mapping[str, tuple[str, dict[str, Any]]] = {
  "convnext_tiny": ("ConvNext", {}),
  "cvt_13": ("Cvt", {}),
  "cvt_21": ("Cvt", {"depth": [1, 4, 16]}),
  "deit_small_patch16_224": (
    "DeiT",
    {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
  ),
  "focalnet_tiny_srf": ("FocalNet", {"depths": [2, 2, 6, 2]}),
  "pvt_tiny": ("Pvt", {"depths": [2, 2, 2, 2]}),
  "resnet50": ("ResNet", {}),
  "swin_tiny": ("Swin", {}),
  "vit_b16": ("ViT", {}),
}  # fmt: skip


def stand_ins() -> set[str]:
  """Names in timm of what stands beside a network that it has not."""
  return {_TIMM[name] for name in _STAND_INS}


@contextlib.contextmanager
def calls(
  peer: str, network: str, size: int, batch: int, dtype: str, training: bool
) -> Iterator[tuple[dict[str, Callable[[], str]], dict[str, str]]]:
  """One call of each form, by its name: a forward pass, or a training step with AdamW.

  Args:
    peer: one of `PEERS`.
    network: our name of it.
    size: side of the pictures.
    batch: of how many.
    dtype: "float32", or "bfloat16" by autocast.
    training: cross entropy, backward pass and update, drop path as our registry has it.

  Yields:
    (the calls; versions of the libraries).

  Raises:
    PeerError: the library is not installed, has nothing to stand beside the network, or failed.
  """
  table: Any = _TIMM if peer == "timm" else _TRANSFORMERS
  if network not in table:
    raise PeerError(f"{peer} has nothing beside {network}; it has: {', '.join(sorted(table))}")
  arguments = (peer, network, str(size), str(batch), dtype, str(int(training)))
  with served(__name__, peer, arguments) as found:
    yield found


def _serve(peer: str, network: str, size: int, batch: int, dtype: str, training: bool) -> None:
  import torch

  def made() -> dict[str, Callable[[], Any]]:
    torch.set_num_threads(available_cores())
    torch.manual_seed(0)
    rate = float(dict(model_entry(network).arguments).get("drop_path_rate", 0.0))
    label = _TIMM[network] if peer == "timm" and network in _STAND_INS else peer
    layouts = {"eager": torch.contiguous_format, "channels_last": torch.channels_last}
    forms = {
      f"{label}, {name}": _call(_made(peer, network, rate), layout, size, batch, dtype, training)
      for name, layout in layouts.items()
    }
    if shutil.which("g++") or shutil.which("clang++"):
      model = torch.compile(_made(peer, network, rate))
      forms[f"{label}, compiled"] = _call(model, torch.channels_last, size, batch, dtype, training)
    return forms

  serve({"torch": torch.__version__, peer: importlib.import_module(peer).__version__}, made)


def _made(peer: str, network: str, drop_path_rate: float) -> Any:
  if peer == "timm":
    import timm

    rates = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    return timm.create_model(_TIMM[network], num_classes=1000, **rates)
  import transformers

  name, fields = _TRANSFORMERS[network]
  config = getattr(transformers, f"{name}Config")(num_labels=1000, **fields)
  return _logits_of(getattr(transformers, f"{name}ForImageClassification")(config))


def _logits_of(model: Any) -> Any:
  """Of a model of transformers the logits alone."""
  import torch

  class Logits(torch.nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.model = model

    def forward(self, images: Any) -> Any:
      return self.model(pixel_values=images).logits

  return Logits()


def _call(
  model: Any, layout: Any, size: int, batch: int, dtype: str, training: bool
) -> Callable[[], None]:
  import torch

  model = model.to(memory_format=layout)
  images = torch.randn(batch, 3, size, size).to(memory_format=layout)
  labels = torch.randint(0, 1000, (batch,))
  half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
  if not training:
    model.eval()

    def predict() -> None:
      with torch.inference_mode(), half:
        model(images)

    return predict
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    with half:
      loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    loss.item()

  return step


if __name__ == "__main__":
  _peer, _network, _size, _batch, _dtype, _training = sys.argv[1:]
  _serve(_peer, _network, int(_size), int(_batch), _dtype, _training == "1")
