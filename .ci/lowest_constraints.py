"""Prints a constraint for each requirement of setup.cfg: the lowest version that it allows.

python .ci/lowest_constraints.py >lowest.txt && pip install -e ".[dev]" -c lowest.txt
"""

import configparser
import re
import sys
from pathlib import Path

# What CI installs; the other extras need an accelerator, or gigabytes.
EXTRAS = ("dev",)


def lowest(setup_file: Path) -> list[str]:
  """Lines "name==version" for the package's own requirements and those of `EXTRAS`.

  Raises:
    ValueError: a requirement without a lower bound.
  """
  setup = configparser.ConfigParser()
  setup.read(setup_file)
  texts = [setup["options"]["install_requires"]]
  texts += [setup["options.extras_require"][extra] for extra in EXTRAS]
  found = set()
  for line in "\n".join(texts).splitlines():
    if not line or line.startswith("#"):
      continue
    match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)(?:,|$)", line)
    if match is None:
      raise ValueError(f"setup.cfg: {line!r} has no lower bound: NAME>=VERSION is needed")
    found.add(f"{match[1]}=={match[2]}")
  return sorted(found, key=str.lower)


if __name__ == "__main__":
  print("\n".join(lowest(Path(__file__).parent.parent / "setup.cfg")))
  sys.exit(0)
