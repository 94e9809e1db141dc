r"""Times on this machine: the forms of an operation side by side, or pictures read a second.

    python -m hybrid_vit.tools.benchmark depthwise_conv
    python -m hybrid_vit.tools.benchmark data --source=folder:/path/flowers --against=timm
    python -m hybrid_vit.tools.benchmark tokenizer
    python -m hybrid_vit.tools.benchmark networks moat_0 --against=timm
    python -m hybrid_vit.tools.benchmark page docs/results/speed

What is compared is measured in turn, round by round, and the median of the rounds is given: a
machine that slows down meanwhile slows all of it. Ratios are to the first row, the reference.

An operation is added by a function that gives its cases, registered here under its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit.data.ahead import available_cores
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.huge_pages import restart_with_huge_pages
from hybrid_vit.ops import depthwise_conv
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tools import benchmark_data, benchmark_networks, benchmark_page


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of an operation, in all its forms.

  Attributes:
    label: what it is, for people.
    forms: each form as a function of `arguments`; the first is the reference.
    arguments: arrays; gradients are taken with respect to all of them.
  """

  label: str
  forms: Mapping[str, Callable[..., jax.Array]]
  arguments: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Timing:
  """One row: medians in milliseconds and what they are of the reference's."""

  case: str
  form: str
  forward: float
  forward_ratio: float
  both: float
  both_ratio: float


_OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {}


def register_operation(name: str) -> Callable[[Callable[[], Iterator[Case]]], Any]:
  """Adds a function that gives an operation's cases, smallest first."""

  def add(cases: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    if name in _OPERATIONS:
      raise ValueError(f"the benchmark {name!r} is registered already")
    _OPERATIONS[name] = cases
    return cases

  return add


@register_operation("depthwise_conv")
def _depthwise_conv() -> Iterator[Case]:
  """The maps of a hybrid network's four stages at 224 x 224; kernels as they occur in them."""
  for kernel_size, stride, size, channels in (
    (3, 1, 7, 768),
    (5, 1, 14, 384),
    (3, 1, 14, 384),
    (7, 1, 28, 192),
    (3, 2, 56, 192),
    (3, 1, 56, 96),
  ):
    x = jax.random.normal(jax.random.key(0), (8, size, size, channels), jnp.float32)
    kernel = jax.random.normal(jax.random.key(1), (kernel_size, kernel_size, 1, channels))
    yield Case(
      f"{kernel_size}x{kernel_size} stride {stride}, [8, {size}, {size}, {channels}]",
      {
        form: functools.partial(depthwise_conv.depthwise_conv, stride=stride, form=form)
        for form in depthwise_conv.FORMS
        if form != "triton" or jax.default_backend() == "gpu"
      },
      (x, kernel),
    )


def time_case(case: Case, rounds: int) -> list[Timing]:
  """Times every form of a case, compiled, forward alone and with all gradients.

  Args:
    case: what to time.
    rounds: the forms take turns so many times.
  """
  runs: dict[tuple[str, bool], Callable[[], Any]] = {}
  for name, form in case.forms.items():
    runs[name, False] = functools.partial(jax.jit(form), *case.arguments)
    runs[name, True] = functools.partial(
      _with_gradients(form, len(case.arguments)), *case.arguments
    )
  medians = interleaved_medians({key: _blocking(run) for key, run in runs.items()}, rounds)
  reference = next(iter(case.forms))
  return [
    Timing(
      case.label,
      name,
      1e3 * medians[name, False],
      medians[name, False] / medians[reference, False],
      1e3 * medians[name, True],
      medians[name, True] / medians[reference, True],
    )
    for name in case.forms
  ]


def _with_gradients(form: Callable[..., jax.Array], count: int) -> Callable[..., Any]:
  def loss(*arguments: jax.Array) -> jax.Array:
    # Weights that differ, so that no form is helped by a constant gradient of the output.
    out = form(*arguments).astype(jnp.float32)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

  return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(count))))


def _blocking(run: Callable[[], Any]) -> Callable[[], Any]:
  return lambda: jax.block_until_ready(run())


def interleaved_medians(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
  """Median seconds of each run, after one untimed call of each; they take turns."""
  for run in runs.values():
    run()
  seconds: dict[Any, list[float]] = {key: [] for key in runs}
  for _ in range(rounds):
    for key, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[key].append(time.perf_counter() - start)
  return {key: statistics.median(values) for key, values in seconds.items()}


# Of captions made by rule: common letters of nine scripts.
_SCRIPTS = (
  "abcdefghijklmnopqrstuvwxyz",
  "абвгдежзиклмнопрстуфхцчшыюя",
  "αβγδεζηθικλμνξοπρστυφχψω",
  "אבגדהוזחטיכלמנסעפצקרשת",
  "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
  "कखगघचछजटठडतथदधनपफबभमयरलवशसह",
  "あいうえおかきくけこさしすせそ",
  "漢字日本語中文學習電腦網路",
  "가나다라마바사아자차카타파하",
)


def made_captions(count: int, seed: int, scripts: Sequence[str], words: int | None) -> list[str]:
  """Captions of ten words of 3 to 14 letters.

  Args:
    count: of captions.
    seed: others come of another one.
    scripts: letters; each word is of one of them.
    words: from a list of so many, the first ones much more often; None: each one is new.
  """
  rng = random.Random(seed if words is None else 0)

  def word() -> str:
    letters = rng.choice(scripts)
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 14)))

  if words is None:
    return [" ".join(word() for _ in range(10)) for _ in range(count)]
  listed = [word() for _ in range(words)]
  weights = [1 / (i + 1) for i in range(words)]
  drawn = random.Random(seed).choices(listed, weights, k=10 * count)
  return [" ".join(drawn[i : i + 10]) for i in range(0, len(drawn), 10)]


def captions_per_second(count: int, rounds: int) -> dict[str, dict[str, float]]:
  """Captions a second, "reference" and "fast", for each kind of text.

  Each round has other captions. Where all words are new, what a tokenizer remembers of earlier ones
  is no help; where they are few thousands, as in most captions, both remember nearly all.

  Args:
    count: of captions in a round.
    rounds: the two take turns so many times.

  Raises:
    ImportError: the library of the fast one is not installed.
  """
  tokenizers = {"reference": ClipTokenizer(fast=False), "fast": ClipTokenizer(fast=True)}
  kinds: dict[str, tuple[Sequence[str], int | None]] = {
    "new words, Latin": (_SCRIPTS[:1], None),
    "new words, nine scripts": (_SCRIPTS, None),
    "20,000 words, Latin": (_SCRIPTS[:1], 20_000),
  }
  found = {}
  for kind, (scripts, words) in kinds.items():
    # Cleaned beforehand where it is not plain ASCII: ftfy would be most of the time of both.
    texts = [made_captions(count, seed, scripts, words) for seed in range(rounds + 1)]

    def run(tokenizer: ClipTokenizer, texts: list[list[str]] = texts) -> Callable[[], Any]:
      turns = iter(texts)
      return lambda: tokenizer.rows_of(next(turns))

    medians = interleaved_medians({k: run(t) for k, t in tokenizers.items()}, rounds)
    found[kind] = {name: count / seconds for name, seconds in medians.items()}
  return found


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.benchmark",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="what", required=True)
  for name in _OPERATIONS:
    command = commands.add_parser(name, help="forward and backward time of each form")
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--cases", type=int, help="only the first so many")
  command = commands.add_parser("tokenizer", help="captions a second, reference and fast")
  command.add_argument("--captions", type=int, default=2000, help="in a round")
  command.add_argument("--rounds", type=int, default=5)
  commands.add_parser("networks", help="whole networks, see benchmark_networks", add_help=False)
  commands.add_parser("data", help="pictures a second, see benchmark_data", add_help=False)
  command = commands.add_parser("page", help="tables of a page anew, see benchmark_page")
  command.add_argument("directory", type=Path, help="of README.md and of the results beside it")
  given = list(sys.argv[1:] if arguments is None else arguments)
  if given[:1] == ["networks"]:
    return benchmark_networks.main(given[1:])
  if given[:1] == ["data"]:
    return benchmark_data.main(given[1:])
  options = parser.parse_args(given)
  try:
    if options.what == "tokenizer":
      _print_tokenizer(options)
    elif options.what == "page":
      benchmark_page.write_page(options.directory)
    else:
      _print_operation(options)
  except (OSError, ValueError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def _print_operation(options: argparse.Namespace) -> None:
  print(f"{options.what} on {jax.default_backend()}, median of {options.rounds} rounds")
  row = "{:36} {:12} {:>12} {:>8} {:>14} {:>8}"
  print(row.format("case", "form", "forward ms", "ratio", "+ backward ms", "ratio"))
  for number, case in enumerate(_OPERATIONS[options.what]()):
    if number == options.cases:
      break
    for t in time_case(case, options.rounds):
      figures = (
        f"{t.forward:.3f}",
        f"{t.forward_ratio:.2f}",
        f"{t.both:.3f}",
        f"{t.both_ratio:.2f}",
      )
      print(row.format(t.case, t.form, *figures), flush=True)


def _print_tokenizer(options: argparse.Namespace) -> None:
  row = "{:26} {:>14} {:>14} {:>8}"
  print(row.format("captions of ten words", "reference /s", "fast /s", "ratio"))
  for kind, rates in captions_per_second(options.captions, options.rounds).items():
    reference, fast = rates["reference"], rates["fast"]
    print(row.format(kind, f"{reference:,.0f}", f"{fast:,.0f}", f"{fast / reference:.1f}"))
  print(
    f"{options.captions} captions, median of {options.rounds} rounds, {available_cores()} cores; "
    "repair by ftfy is not counted"
  )


if __name__ == "__main__":
  restart_with_huge_pages()
  run_tool(main)
