"""Memory, arithmetic and exactness of RevCol's backward pass: plain, recomputed, reversible.

    python docs/results/reversible/measure.py --out=docs/results/reversible

compiles one gradient of RevCol for each form, number of columns and batch, and writes what XLA says
of it (bytes besides arguments and results; floating-point operations) and how far its gradient is
from the plain one, as figures.csv, figures.md and memory.png. `--topology=v5e:2x2` compiles for a
TPU that need not be there (libtpu is needed), without running anything.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from hybrid_vit import create_model
from hybrid_vit.tables import write_table

FORMS = {
  "plain": {},
  "remat": {"remat": True},
  "reversible, every third column kept": {"reversible": True},
  "reversible, last column kept": {"reversible": True, "keep_every": 0},
}
FIELDS = (
  "form", "columns", "batch", "temporary_mib", "gflop", "seconds_a_step", "largest_deviation"
)  # fmt: skip
# Of RevCol-T in little, so that many compilations take minutes.
NETWORK = {"widths": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "drop_path_rate": 0.0}


def gradient_of(model):
  """(params, images) → gradients of the params."""

  def loss(params, images):
    logits, _ = model.apply({"params": params}, images, train=True)
    return jnp.mean(jnp.square(logits))

  return jax.grad(loss)


def measure(form, columns, batch, size, device, exact, repeats):
  """One row of the table."""
  model = create_model("revcol_tiny", 10, num_columns=columns, **NETWORK, **FORMS[form])
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32, sharding=device)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  params = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params
  )
  compiled = jax.jit(gradient_of(model)).lower(params, images).compile()
  row = {"form": form, "columns": columns, "batch": batch}
  row["temporary_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
  row["gflop"] = compiled.cost_analysis()["flops"] / 1e9
  if repeats:
    x = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    start = exact["start"].setdefault(columns, _initial(model, x))
    found = jax.device_get(compiled(start, x))
    times = []
    for _ in range(repeats):
      begin = time.perf_counter()
      jax.block_until_ready(compiled(start, x))
      times.append(time.perf_counter() - begin)
    row["seconds_a_step"] = min(times)
    expected = exact["gradient"].setdefault((columns, batch), found)
    row["largest_deviation"] = _deviation(found, expected)
  return row


def _initial(model, x):
  return jax.jit(lambda key: model.init(key, x[:1])["params"])(jax.random.key(0))


def _deviation(found, expected):
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected))
  return max(
    float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs if np.linalg.norm(b) > 0
  )


def draw(rows, path):
  """Bytes over columns, a panel for each batch."""
  batches = sorted({row["batch"] for row in rows})
  figure = Figure(figsize=(5 * len(batches), 4), layout="constrained")
  for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches):
    for form in FORMS:
      own = [row for row in rows if row["form"] == form and row["batch"] == batch]
      axes.plot([r["columns"] for r in own], [r["temporary_mib"] for r in own], "o-", label=form)
    axes.set(title=f"batch {batch}", xlabel="columns", ylabel="XLA's temporary bytes (MiB)")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--columns", type=int, nargs="+", default=[4, 8, 16])
  parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
  parser.add_argument("--size", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=3, help="timed steps; 0 to compile only")
  parser.add_argument("--topology", help="of TPUs to compile for, e.g. v5e:2x2")
  options = parser.parse_args()
  device, where, repeats = None, jax.devices()[0].device_kind, options.repeats
  if options.topology:
    from jax.experimental import topologies

    found = topologies.get_topology_desc(options.topology, platform="tpu").devices
    device, where, repeats = jax.sharding.SingleDeviceSharding(found[0]), options.topology, 0
  options.out.mkdir(parents=True, exist_ok=True)
  print(
    f"gradient of RevCol {NETWORK}, pictures of {options.size} px, compiled for {where} by JAX "
    f"{jax.__version__}"
  )
  exact, rows = {"start": {}, "gradient": {}}, []
  for batch in options.batch:
    for columns in options.columns:
      for form in FORMS:
        rows.append(measure(form, columns, batch, options.size, device, exact, repeats))
        print(rows[-1], flush=True)
        # Also what an interrupted call leaves is whole.
        write_table(options.out / "figures", rows, FIELDS)
        draw(rows, options.out / "memory.png")


if __name__ == "__main__":
  main()
