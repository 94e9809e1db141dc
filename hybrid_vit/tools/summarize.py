"""Parameters, multiply-adds and activations of named models, beside the published figures.

python -m hybrid_vit.tools.summarize 'tiny_moat*' --format markdown

With `--docs=docs` every network is counted, and `networks.md` and `networks.csv` are written there.
"""

import argparse
import csv
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from hybrid_vit.models import registry
from hybrid_vit.models.initialization import variable_shapes
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Summary:
  """One row of the table; the published figures are None where there are none.

  Attributes:
    name: of the model.
    image_size: side of the square input.
    parameters: trainable ones, counted.
    multiply_adds: of a forward pass of one picture, counted.
    activations: numbers that its convolutions and matrix products give, counted.
    published_parameters: as the authors give it.
    published_multiply_adds: as the authors give it, at the entry's own size; None at another size.
    published_top1: in percent.
  """

  name: str
  image_size: int
  parameters: int
  multiply_adds: int
  activations: int
  published_parameters: float | None
  published_multiply_adds: float | None
  published_top1: float | None


def summarize(name: str, image_size: int | None = None) -> Summary:
  """Counts one model, without weights and without computing anything.

  Args:
    name: of the model.
    image_size: side of the input; None for the entry's own.
  """
  entry = registry.model_entry(name)
  size = image_size or entry.preprocessing.image_size
  model = registry.create_model(name)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = variable_shapes(model, images)
  program = jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, images).jaxpr
  same_size = size == entry.preprocessing.image_size
  return Summary(
    name=name,
    image_size=size,
    parameters=count_parameters(variables["params"]),
    multiply_adds=_count(program, _multiply_adds_of),
    activations=_count(program, _activations_of),
    published_parameters=entry.published.parameters,
    published_multiply_adds=entry.published.multiply_adds if same_size else None,
    published_top1=entry.published.top1,
  )


def count_parameters(params: Any) -> int:
  """The number of numbers in a tree of arrays or of their shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_multiply_adds(fn: Callable[..., Any], *abstract_args: Any) -> int:
  """Counts the multiply-adds of the convolutions and matrix products of `fn`.

  The count is exact and the same on every backend: the traced program is read, loops included, and
  fast forms of operations count as what they compute. Zeros of padding count as the field counts
  them, as numbers; element-wise work, norms and pooling do not count.

  Args:
    fn: a function of arrays.
    *abstract_args: trees of arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: for a loop whose length is not known before it runs.
  """
  return _count(jax.make_jaxpr(fn)(*abstract_args).jaxpr, _multiply_adds_of)


def count_activations(fn: Callable[..., Any], *abstract_args: Any) -> int:
  """Counts the numbers that the convolutions and matrix products of `fn` give.

  The field's measure of what a network writes to memory (Radosavovic et al., 2020, section 3.1, as
  fvcore counts it): the products of queries and keys, and of their weights and values, count too.

  Args:
    fn: a function of arrays.
    *abstract_args: trees of arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: for a loop whose length is not known before it runs.
  """
  return _count(jax.make_jaxpr(fn)(*abstract_args).jaxpr, _activations_of)


def parameters_by_module(params: Any, depth: int = 1) -> dict[str, int]:
  """Parameters below each module name of `depth` parts, in the order of the tree."""
  counts: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(str(part.key) for part in path[:depth])
    counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
  return counts


def format_table(rows: Sequence[Summary], style: str) -> str:
  """The rows as "text", "csv" (plain numbers) or "markdown".

  Raises:
    ValueError: for another style.
  """
  names = [f.name for f in dataclasses.fields(Summary)]
  if style == "csv":
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
      writer.writerow(["" if v is None else v for v in dataclasses.astuple(row)])
    return out.getvalue().rstrip("\n")
  if style not in ("text", "markdown"):
    raise ValueError(f"style is text, csv or markdown, not {style!r}")

  header = [
    "model",
    "size",
    "parameters",
    "published",
    "mult-adds",
    "published",
    "activations",
    "top-1 %",
  ]
  table = [header]
  for r in rows:
    table.append(
      [
        r.name,
        str(r.image_size),
        f"{r.parameters:,}",
        "" if r.published_parameters is None else f"{r.published_parameters:,.0f}",
        f"{r.multiply_adds / 1e9:.2f} G",
        "" if r.published_multiply_adds is None else f"{r.published_multiply_adds / 1e9:.1f} G",
        f"{r.activations / 1e6:.1f} M",
        "" if r.published_top1 is None else f"{r.published_top1:.1f}",
      ]
    )
  widths = [max(len(line[i]) for line in table) for i in range(len(header))]
  if style == "markdown":
    return markdown_table(header, table[1:])
  return "\n".join(
    "  ".join(
      cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
    )
    for line in table
  )


def write_docs(rows: Sequence[Summary], directory: Path) -> None:
  """Writes `networks.csv` (plain numbers) and `networks.md` (a table for each family)."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "networks.csv").write_text(format_table(rows, "csv") + "\n", encoding="utf-8")
  families: dict[str, list[Summary]] = {}
  for row in rows:
    module = registry.model_entry(row.name).module_class.__module__
    families.setdefault(module.rsplit(".", 1)[1], []).append(row)
  parts = [_PAGE_HEAD]
  for family, members in families.items():
    parts.append(f"## [{family}](../hybrid_vit/models/{family}.py)\n")
    parts.append(format_table(members, "markdown") + "\n")
  (directory / "networks.md").write_text("\n".join(parts), encoding="utf-8")


_PAGE_HEAD = """# Networks

Every network that `hybrid_vit.list_models()` names. Parameters, multiply-adds and activations are
counted here, at the size that stands beside them and with the network's own number of classes;
"published" and top-1 (ImageNet-1K validation) are the authors' figures, not ours: nothing was
trained to them here. Activations are the numbers that convolutions and matrix products give, those
of attention included. The same as plain numbers: [networks.csv](networks.csv).

Written by `python -m hybrid_vit.tools.summarize --docs=docs`.
"""


# How many multiply-adds the jitted pieces of fast forms stand for, from their operands' shapes.
def _depthwise_conv(eqn: Any) -> int:
  return math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[1].aval.shape[:2])


def _pointwise_conv(eqn: Any) -> int:
  return math.prod(eqn.outvars[0].aval.shape) * eqn.invars[1].aval.shape[0]


# Resizing and averaging, by products or not: counted by nobody.
_NOT_COUNTED = ("resized_bilinear", "averaged_bins")

_FAST_FORMS: dict[str, Callable[[Any], int]] = {
  "depthwise_conv_shift_add": _depthwise_conv,
  "depthwise_conv_triton": _depthwise_conv,
  "mixed_depthwise_conv_merged": lambda eqn: (
    math.prod(eqn.outvars[0].aval.shape)
    * sum(math.prod(kernel.aval.shape[:2]) for kernel in eqn.invars[1:])
    // len(eqn.invars[1:])
  ),
  "grouped_product_dense": _pointwise_conv,
  "normalised_product": _pointwise_conv,
  "depthwise_conv_kernel_gradient": lambda eqn: (
    math.prod(eqn.invars[1].aval.shape) * math.prod(eqn.outvars[0].aval.shape[:2])
  ),
}


def _multiply_adds_of(eqn: Any) -> int | None:
  """Of one equation; None where it is none of the counted operations."""
  primitive = eqn.primitive.name
  if primitive == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
  if primitive == "conv_general_dilated":
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return math.prod(eqn.outvars[0].aval.shape) * (math.prod(kernel) // out_features)
  if eqn.params.get("name") in _FAST_FORMS:
    return _FAST_FORMS[eqn.params["name"]](eqn)
  return 0 if eqn.params.get("name") in _NOT_COUNTED else None


def _activations_of(eqn: Any) -> int | None:
  """Of one equation; None where it is none of the counted operations."""
  counted = eqn.primitive.name in ("dot_general", "conv_general_dilated")
  if counted or eqn.params.get("name") in _FAST_FORMS:
    return math.prod(eqn.outvars[0].aval.shape)
  return 0 if eqn.params.get("name") in _NOT_COUNTED else None


def _count(jaxpr: core.Jaxpr, measure: Callable[[Any], int | None]) -> int:
  return sum(_count_equation(eqn, measure) for eqn in jaxpr.eqns)


def _count_equation(eqn: Any, measure: Callable[[Any], int | None]) -> int:
  found = measure(eqn)
  if found is not None:
    return found
  inner = [_count(j, measure) for j in _inner_jaxprs(eqn.params.values())]
  if not any(inner):
    return 0
  primitive = eqn.primitive.name
  if primitive == "while":
    raise ValueError("products cannot be counted in a loop of unknown length")
  if primitive == "cond":
    return max(inner)
  return sum(inner) * eqn.params.get("length", 1) if primitive == "scan" else sum(inner)


def _inner_jaxprs(values: Iterable[Any]) -> Iterable[core.Jaxpr]:
  for value in values:
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _inner_jaxprs(value)


def main(argv: Sequence[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(prog="summarize", description=__doc__.splitlines()[0])
  parser.add_argument("patterns", nargs="*", default=["*"], help="names or patterns of models")
  parser.add_argument("--format", choices=("text", "csv", "markdown"), default="text")
  parser.add_argument("--image_size", type=int, help="input side; default: each model's own")
  parser.add_argument("--docs", type=Path, help="directory to write networks.md and .csv into")
  args = parser.parse_args(argv)
  if args.docs is not None:
    write_docs([summarize(name) for name in registry.list_models()], args.docs)
    return
  names: dict[str, None] = {}
  for pattern in args.patterns:
    found = registry.list_models(pattern)
    # A name that matches nothing gets the registry's error, which gives the closest.
    names |= dict.fromkeys(found or [registry.model_entry(pattern).name])
  print(format_table([summarize(name, args.image_size) for name in names], args.format))


if __name__ == "__main__":
  run_tool(main)
