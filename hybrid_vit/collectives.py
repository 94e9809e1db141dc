"""The communication of a compiled program, read from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re

from hybrid_vit.tpu_topology import loop_rounds

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
# "%name = TYPE all-reduce(" and its asynchronous first half.
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind.

  Attributes:
    kind: one of `KINDS`.
    in_loop: they stand in the body of a loop and run in each of its rounds.
    count: of operations in the program.
    bytes: of their results on one device, together; of one round.
    rounds: of the loop and of those around it; None where the data say.
  """

  kind: str
  in_loop: bool
  count: int
  bytes: int
  rounds: int | None = 1

  def __str__(self) -> str:
    often = "" if self.rounds is None else f" of {self.rounds}"
    where = f" in a loop, each round{often}" if self.in_loop else ""
    return f"{self.count:>4} {self.kind:<18}  {self.bytes / 2**20:>10,.2f} MiB{where}"


def collectives_of(hlo: str) -> list[Collective]:
  """Counts the collectives of a compiled program.

  Args:
    hlo: its text, as `compiled.as_text()` gives it.

  Returns:
    One entry for each kind, those in loops apart by their rounds; the largest first.
  """
  bodies = loop_rounds(hlo)
  counts: dict[tuple[str, bool, int | None], list[int]] = {}
  computation = ""
  for line in hlo.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      computation = header[1]
      continue
    found = _OPERATION.search(line)
    if found:
      types, kind, started = found.groups()
      shapes = _SHAPE.findall(types)
      if started and kind != "all-reduce":
        # The first half of an asynchronous one returns its operands beside its results.
        shapes = shapes[len(shapes) // 2 :]
      key = (kind, computation in bodies, bodies.get(computation, 1))
      entry = counts.setdefault(key, [0, 0])
      entry[0] += 1
      entry[1] += sum(_size(dtype, dimensions) for dtype, dimensions in shapes)
  found_all = [
    Collective(kind, in_loop, count, size, rounds)
    for (kind, in_loop, rounds), (count, size) in counts.items()
  ]
  return sorted(found_all, key=lambda item: -item.bytes * (item.rounds or 1))


def _size(dtype: str, dimensions: str) -> int:
  return _BYTES.get(dtype, 4) * math.prod(int(d) for d in dimensions.split(",") if d)
