"""Weights of ours → one program of StableHLO that JAX runs without this package.

python -m hybrid_vit.tools.export_model runs/flowers flowers_program
python -m hybrid_vit.tools.export_model hf:owner/name OUT --platforms=cpu,tpu --no-normalize
python -m hybrid_vit.tools.export_model runs/flowers OUT --resize   # takes photos of any size

OUT/model.jax is read by `jax.export.deserialize`; OUT/metadata.json says what goes in and out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hybrid_vit.checkpoints import CheckpointError
from hybrid_vit.model_export import PLATFORMS, export_model
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.stored_tasks import StoredTask, load_task
from hybrid_vit.weights.stored import DenseWeightsError, StoredNetwork, load_network


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="export_model", description=__doc__.splitlines()[0])
  parser.add_argument("weights", help="a directory, a file or an address, see load_network")
  parser.add_argument("out", help="directory to write")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument(
    "--platforms", default="cpu,cuda,tpu", help=f"of {', '.join(PLATFORMS)}; default: %(default)s"
  )
  parser.add_argument(
    "--normalize",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="mean and deviation inside, so that it takes uint8 (the default), or float32 without",
  )
  parser.add_argument(
    "--resize",
    action=argparse.BooleanOptionalAction,
    default=False,
    help="resizing and cropping inside, too, so that it takes photos of any size; default: outside",
  )
  parser.add_argument("--image_size", type=int, help="default: what the weights expect")
  parser.add_argument("--batch_size", type=int, help="default: any")
  parser.add_argument("--precision", help="of products: highest, default, …; default: the device's")
  args = parser.parse_args(argv)
  try:
    network: StoredNetwork | StoredTask
    try:
      network = load_network(args.weights, args.arch)
    except DenseWeightsError:
      network = load_task(args.weights)
    metadata = export_model(
      network,
      args.out,
      platforms=args.platforms.split(","),
      normalize=args.normalize,
      resize=args.resize,
      image_size=args.image_size,
      batch_size=args.batch_size,
      precision=args.precision,
    )
  except (ValueError, OSError, RuntimeError, ModuleNotFoundError, CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  ends = (metadata["input"], metadata["output"])
  sides = (f"{end['dtype']} [{', '.join(end['shape'])}]" for end in ends)
  print(f"{metadata['network']} for {', '.join(metadata['platforms'])}: {' → '.join(sides)}")
  here = metadata["held_to_the_network_on"]
  print(f"held to the network on {here}" if here else "not run: this machine has none of these")
  print(f"written to {args.out}")
  return 0


if __name__ == "__main__":
  run_tool(main)
