"""Memory of the contrastive losses, in one piece and around the ring, by XLA's own count.

    python docs/results/clip/loss_memory.py

compiles loss and gradient of features `[B, 512]` for 8 simulated CPU devices and writes the
temporary bytes of one device as `loss_memory.csv` and `loss_memory.md` beside this file. Nothing is
run, so that the machine does not matter.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit import sharding
from hybrid_vit.ops import contrastive
from hybrid_vit.tables import write_table

LOSSES = {
  "softmax": (contrastive.softmax_loss, contrastive.plain_softmax_loss),
  "teachers": (contrastive.softmax_loss, contrastive.plain_softmax_loss),
  "sigmoid": (contrastive.sigmoid_loss, contrastive.plain_sigmoid_loss),
}


def temporary_bytes(function, name: str, batch: int, width: int, mesh) -> int:
  """Of loss and gradient on one device."""
  rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))

  def shape(*dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.float32, sharding=rows)

  scalars = [jnp.float32(10.0)] * (2 if name == "sigmoid" else 1)
  theirs = (shape(batch, 2, 768), shape(batch, 2, 768)) if name == "teachers" else ()

  def step(images, texts, theirs):
    extra = (contrastive.Teachers(*theirs),) if theirs else ()
    return jax.value_and_grad(lambda i, t: function(i, t, *scalars, *extra), (0, 1))(images, texts)

  features = shape(batch, width)
  with jax.set_mesh(mesh):
    step = jax.jit(step, out_shardings=(NamedSharding(mesh, PartitionSpec()), (rows, rows)))
    compiled = step.lower(features, features, theirs).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
  """Compiles them all."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, nargs="+", default=[4096, 16384])
  parser.add_argument("--chunk", type=int, nargs="+", default=[1024, 128])
  parser.add_argument("--width", type=int, default=512)
  options = parser.parse_args()
  mesh = sharding.make_mesh({"data": 8})
  rows = []
  for name, (ring, plain) in LOSSES.items():
    for batch in options.batch:
      forms = {"plain": plain}
      # A device has no more columns of a block than rows.
      for chunk in sorted({min(c, batch // 8) for c in options.chunk}, reverse=True):
        forms[f"ring, {chunk} columns at once"] = functools.partial(ring, chunk=chunk)
      for form, function in forms.items():
        found = temporary_bytes(function, name, batch, options.width, mesh)
        row = {"loss": name, "batch": batch, "form": form, "temporary_mib": found / 2**20}
        rows.append(row)
        print(row, flush=True)
  write_table(Path(__file__).parent / "loss_memory", rows)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  main()
