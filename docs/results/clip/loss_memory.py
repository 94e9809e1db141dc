"""Memory of the losses of image–text pairs: the plain B x B forms against the chunked ones.

    python docs/results/clip/loss_memory.py --out=docs/results/clip

compiles loss and gradient for 8 devices that split the batch (simulated ones on a CPU) and writes
what XLA says of each (temporary bytes on one device, besides arguments and results), and how far
the chunked gradient is from the plain one, as loss_memory.csv and loss_memory.md. The plain forms
are compiled with the same split rows, by XLA's own partitioning.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hybrid_vit import sharding
from hybrid_vit.ops import contrastive
from hybrid_vit.tables import write_table

FORMS = {
  "softmax": (contrastive.softmax_loss_plain, contrastive.softmax_loss),
  "sigmoid": (contrastive.sigmoid_loss_plain, contrastive.sigmoid_loss),
  "distillation": (contrastive.distillation_loss_plain, contrastive.distillation_loss),
}
FIELDS = ("loss", "form", "devices", "batch", "width", "temporary_mib", "largest_deviation")
# Two teachers of this width.
TEACHERS = (2, 768)


def given(loss, batch, width):
  """Arguments of a loss, as NumPy arrays, and how many of them are learnt."""
  rng = np.random.default_rng(0)

  def unit(*shape):
    values = rng.normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)

  image, text = unit(batch, width), unit(batch, width)
  if loss == "softmax":
    return (image, text, np.float32(100.0)), 3
  if loss == "sigmoid":
    return (image, text, np.float32(10.0), np.float32(-10.0)), 4
  return (image, text, np.float32(100.0), unit(batch, *TEACHERS), unit(batch, *TEACHERS)), 3


def compiled_gradient(form, arguments, learnt, mesh):
  """The program of loss and gradients, rows split over the devices."""
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def shape(argument):
    where: NamedSharding = rows if np.ndim(argument) else whole
    return jax.ShapeDtypeStruct(np.shape(argument), jnp.float32, sharding=where)

  shapes = tuple(map(shape, arguments))
  places = tuple(s.sharding for s in shapes)
  step = jax.jit(
    jax.value_and_grad(form, tuple(range(learnt))),
    in_shardings=places,
    out_shardings=(whole, places[:learnt]),
  )
  with jax.set_mesh(mesh):
    return step.lower(*shapes).compile(), places


def deviation(found, expected):
  """The largest difference of a gradient, in parts of its largest number."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected))
  return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--batch", type=int, default=4096)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
  options = parser.parse_args()
  # Of a CPU alone; other devices are as many as there are.
  jax.config.update("jax_num_cpu_devices", max(options.devices))
  rows = []
  for devices in options.devices:
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    for loss, forms in FORMS.items():
      arguments, learnt = given(loss, options.batch, options.width)
      expected = None
      for name, form in zip(("plain", "chunked"), forms):
        program, places = compiled_gradient(form, arguments, learnt, mesh)
        found = jax.device_get(program(*map(jax.device_put, arguments, places)))
        expected = expected or found
        row = {
          "loss": loss,
          "form": name,
          "devices": devices,
          "batch": options.batch,
          "width": options.width,
          "temporary_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
          "largest_deviation": deviation(found, expected),
        }
        rows.append(row)
        print(row, flush=True)
        write_table(options.out / "loss_memory", rows, FIELDS)


if __name__ == "__main__":
  main()
