"""Where configuration files are: in the checkout, or shipped with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from hybrid_vit.config import ConfigError

# The checkout's directory; where the package is installed, the copy that it carries.
_CHECKOUT = Path(__file__).resolve().parent.parent / "configs"
_SHIPPED = Path(__file__).resolve().parent / "configs"


def find_config(text: str) -> Path:
  """A path as it is, else a shipped file: "configs/moat.py", "moat.py" or "moat".

  Raises:
    ConfigError: neither is there; the message gives the nearest names.
  """
  path = Path(text).expanduser()
  if path.is_file():
    return path
  name = path.name.removesuffix(".py")
  directories = [folder for folder in (_CHECKOUT, _SHIPPED) if folder.is_dir()]
  if len(path.parts) == 1 or path.parts[:-1] == ("configs",):
    for directory in directories:
      found = directory / f"{name}.py"
      if found.is_file():
        return found
  shipped = sorted({item.stem for folder in directories for item in folder.glob("[a-z]*.py")})
  near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
  hint = f"; did you mean {near[0]!r}?" if near else f"; shipped are: {', '.join(shipped)}"
  raise ConfigError(f"no configuration file {text!r}{hint}")
