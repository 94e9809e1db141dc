"""Looks whether this machine can run the package, part by part, and says what would mend it.

python -m hybrid_vit.tools.doctor
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from hybrid_vit.standard_streams import run_tool


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the report.

  Attributes:
    part: what was looked at.
    good: False where a run would fail.
    text: what was found, and where it is not good what would mend it.
  """

  part: str
  good: bool
  text: str


def examine() -> Iterator[Finding]:
  """Every finding, in the order in which a run would stumble; one broken part hides no other."""
  yield _python()
  yield from _packages()
  for part, look in _LOOKS.items():
    try:
      yield Finding(part, *look())
    except Exception as error:  # whatever is broken here is what the user wants to read
      yield Finding(part, False, f"{type(error).__name__}: {error}")


def _python() -> Finding:
  return Finding(
    "Python",
    sys.version_info >= (3, 11),
    f"{platform.python_version()} on {platform.system()} {platform.machine()} (3.11 or newer)",
  )


def _packages() -> Iterator[Finding]:
  """The package's own requirements against what is installed; extras only where they are there."""
  for text in importlib.metadata.requires("hybrid_vit") or ():
    requirement = Requirement(text)
    extra = requirement.marker is not None and "extra" in str(requirement.marker)
    name, wanted = requirement.name, requirement.specifier
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      if not extra:
        yield Finding(name, False, f"not installed: pip install '{name}{wanted}'")
      continue
    good = wanted.contains(version, prereleases=True)
    if extra and not wanted:
      continue
    mend = "" if good else f"; {wanted} is needed: pip install '{name}{wanted}'"
    yield Finding(name, good, version + mend)


def _devices() -> tuple[bool, str]:
  """What JAX runs on, and an accelerator that it does not see."""
  import jax

  devices = jax.devices()
  text = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
  if devices[0].platform == "cpu":
    if shutil.which("nvidia-smi") is not None:
      return False, f"{text}, though there is an NVIDIA driver: pip install 'hybrid_vit[cuda]'"
    if list(Path("/dev").glob("accel*")):
      return False, f"{text}, though there is a TPU: pip install 'hybrid_vit[tpu]'"
  return True, text


def _computation() -> tuple[bool, str]:
  """A gradient through a small network, in both precisions."""
  import jax
  import jax.numpy as jnp

  from hybrid_vit.models.registry import create_model

  for dtype in (jnp.float32, jnp.bfloat16):
    model = create_model("tiny_moat_0", 4, depths=(1, 0, 1, 0), widths=(8, 8, 32, 32), dtype=dtype)
    images = jnp.ones((1, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    gradient = jax.jit(jax.grad(lambda v, m=model, x=images: m.apply(v, x)[0].sum()))(variables)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient)):
      return (
        False,
        f"a gradient in {jnp.dtype(dtype).name} is not finite: the installation is broken",
      )
  return True, "compiles and differentiates a network in float32 and bfloat16"


def _pictures() -> tuple[bool, str]:
  """A JPEG made here, through both decoders."""
  import io

  import numpy as np
  from PIL import Image

  from hybrid_vit.data.resizing import can_be_compiled, resizer
  from hybrid_vit.data.transforms import parse_transform

  ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (1, 32, 3))
  encoded = io.BytesIO()
  Image.fromarray(ramp).save(encoded, format="JPEG", quality=95)
  decoded = [
    parse_transform("decode", decoder)({"image": encoded.getvalue()}, np.random.default_rng(0))
    for decoder in ("opencv", "pil")
  ]
  far = max(np.abs(d["image"].astype(int) - ramp).max() for d in decoded)
  by = f"{resizer()} resizes"
  if resizer() == "Pillow" and can_be_compiled():
    by += " (faster with pip install 'hybrid_vit[fast]')"
  return bool(far < 16), f"OpenCV and PIL decode a JPEG (at most {far} of 255 away); {by}"


def _checkpoints() -> tuple[bool, str]:
  """A tree written and read by the package's own checkpoints."""
  import jax.numpy as jnp

  from hybrid_vit.checkpoints import export, load_weights

  with tempfile.TemporaryDirectory() as directory:
    tree = {"params": {"x": jnp.arange(5.0)}, "batch_stats": {}}
    export(Path(directory) / "export", tree, {"name": "doctor"})
    found, _ = load_weights(Path(directory) / "export")
  good = found["params"]["x"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
  return good, "weights are written and read back" if good else "weights read back differ"


def _data() -> tuple[bool, str]:
  """The embedded digits."""
  from hybrid_vit.data.sources import create_source

  length = len(create_source("digits", "train"))
  return length > 0, f"{length} embedded digits to train on"


def _machine() -> tuple[bool, str]:
  """Cores and memory, which decide how fast pictures come."""
  pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
  return True, f"{os.cpu_count()} cores, {pages * size / 2**30:.0f} GiB of memory"


_LOOKS: dict[str, Callable[[], tuple[bool, str]]] = {
  "machine": _machine,
  "devices": _devices,
  "computation": _computation,
  "pictures": _pictures,
  "checkpoints": _checkpoints,
  "data": _data,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the findings; 1 where one is not good."""
  if argv:
    print(f"doctor takes no arguments, got {' '.join(argv)!r}", file=sys.stderr)
    return 2
  bad = 0
  for finding in examine():
    bad += not finding.good
    print(f"{'ok ' if finding.good else 'BAD'} {finding.part}: {finding.text}", flush=True)
  print(f"\n{bad} part(s) need mending" if bad else "\nall is well")
  return int(bad > 0)


if __name__ == "__main__":
  run_tool(main)
