"""Time of the crop within a training step of DeiT-T on this machine: with it, and without.

python docs/results/efficienttrain/crop_time.py --size 96 --batch 16
"""

import argparse
import time

import jax
import jax.numpy as jnp

from hybrid_vit.models.registry import create_model
from hybrid_vit.ops.low_frequency_crop import lanczos_resize, low_frequency_crop


def main() -> None:
  """Prints the shortest of interleaved steps, in milliseconds: other work only adds to a time."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", type=int, default=96)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=15)
  args = parser.parse_args()
  model = create_model("deit_tiny_patch16_224", position_size=args.size // 16)
  large = jax.random.normal(jax.random.key(0), (args.batch, 224, 224, 3))
  small = large[:, : args.size, : args.size]
  params = jax.jit(model.init)(jax.random.key(1), small[:1])["params"]

  def loss(params, images):
    logits, _ = model.apply({"params": params}, images, train=True)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

  gradient = jax.value_and_grad(loss)
  forms = {
    "without a crop": (jax.jit(gradient), small),
    "low_frequency_crop": (
      jax.jit(lambda p, x: gradient(p, low_frequency_crop(x, args.size))),
      large,
    ),
    "lanczos_resize": (jax.jit(lambda p, x: gradient(p, lanczos_resize(x, args.size))), large),
  }
  times = {name: [] for name in forms}
  for _ in range(args.repeats + 1):
    for name, (step, images) in forms.items():
      begin = time.perf_counter()
      jax.block_until_ready(step(params, images))
      times[name].append(1e3 * (time.perf_counter() - begin))
  plain = min(times["without a crop"][1:])
  for name, found in times.items():
    shortest = min(found[1:])
    print(f"{name}: {shortest:.1f} ms ({(shortest - plain) / shortest:+.1%})")


if __name__ == "__main__":
  main()
