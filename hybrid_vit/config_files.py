"""Where the recipes are: in a checkout beside the package, in an installation within it."""

from __future__ import annotations

import difflib
from pathlib import Path

from hybrid_vit.config import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def config_directory() -> Path:
  """Where the recipes lie."""
  installed = _PACKAGE / "configs"
  # Beside an installed package lie other people's packages, of which one may have this name.
  return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def find_config(text: str) -> Path:
  """A path as it is, else a shipped file: "configs/moat.py", "moat.py" or "moat".

  Raises:
    ConfigError: neither is there; the message gives the nearest names.
  """
  path = Path(text).expanduser()
  if path.is_file():
    return path
  name = path.name.removesuffix(".py")
  if len(path.parts) == 1 or path.parts[:-1] == ("configs",):
    found = config_directory() / f"{name}.py"
    if found.is_file():
      return found
  shipped = sorted(item.stem for item in config_directory().glob("[a-z]*.py"))
  near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
  hint = f"; did you mean {near[0]!r}?" if near else f"; shipped are: {', '.join(shipped)}"
  raise ConfigError(f"no configuration file {text!r}{hint}")
