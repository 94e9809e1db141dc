"""`python -m hybrid_vit.main --config=configs/moat.py --workdir=…`: flags, devices, directory."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from hybrid_vit import sharding
from hybrid_vit.config import Config, ConfigError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, with variant and keys: FILE.py[:variant,key=value,…]."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; one that holds a checkpoint is gone on with."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "dry_run"], "What to do.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes (jax.distributed)."
)
_DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "For --mode=dry_run: how many devices there will be; else the product of config.mesh, or 8.",
  lower_bound=1,
)
# Set to anything: errors come with their traceback.
_TRACEBACK = "HYBRID_VIT_TRACEBACK"


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR where that is set."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "hybrid_vit" / "xla"))


def _workdir(config_name: str) -> Path:
  """The directory given, or a new one: a run never goes on with an older one unasked.

  Raises:
    ConfigError: several processes must be told, since their clocks may differ.
  """
  if _WORKDIR.value:
    return Path(_WORKDIR.value).expanduser().absolute()
  if jax.process_count() > 1:
    raise ConfigError(
      "with several processes give --workdir, on a file system that all of them see"
    )
  path = Path("runs", f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
  print(f"work directory {path} (give --workdir={path} to go on with it later)", flush=True)
  return path


def main(arguments: list[str]) -> int:
  """Runs one mode; errors a user can mend are one paragraph, without a traceback."""
  if len(arguments) > 1:
    raise app.UsageError(f"unexpected argument {arguments[1]!r}; options begin with --")
  if _CONFIG.value is None:
    raise app.UsageError("--config is needed, e.g. --config=configs/quickstart.py")
  path = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
  if not path.is_file():
    return _tell(f"no configuration file {str(path)!r}")
  config = Config(_CONFIG.value)
  # Orbax and JAX narrate at the level of information; warnings stay.
  logging.set_verbosity(logging.WARNING)
  try:
    return _run(config, path.stem)
  except _user_errors() as error:
    if os.environ.get(_TRACEBACK):
      raise
    return _tell(f"{error}\n(with {_TRACEBACK}=1 the place in the code is shown)")


def _tell(message: str) -> int:
  print(f"\nerror: {message}", file=sys.stderr)
  return 1


def _parse_flags(arguments: list[str]) -> list[str]:
  """absl's parsing; mistakes in a configuration are told without the traces wrapped around them."""
  try:
    return flags.FLAGS(arguments)
  except (flags.Error, AttributeError, KeyError) as error:
    first: BaseException = error
    while first.__context__ is not None:
      first = first.__context__
    if os.environ.get(_TRACEBACK):
      raise
    if "get_config() takes 0 positional arguments" in str(first):
      message = "this configuration takes nothing after the colon of --config"
    elif isinstance(first, ConfigError):
      message = str(first)
    elif isinstance(error, flags.Error):
      message = str(error)
    else:
      text: Any = error
      while isinstance(text, BaseException):
        text = text.args[0]
      message = f"the configuration has no field {' '.join(text.split())}"
    sys.exit(_tell(message))


def _user_errors() -> tuple[type[BaseException], ...]:
  from hybrid_vit.checkpoints import CheckpointError

  return (ValueError, OSError, FloatingPointError, CheckpointError)


def _run(config: Config, name: str) -> int:
  if _MODE.value == "dry_run":
    from hybrid_vit import dry_run

    return dry_run.main(config, _DEVICES.value)
  from hybrid_vit import trainer

  use_compilation_cache()
  if _DISTRIBUTED.value:
    sharding.initialize_distributed()
  if _MODE.value == "evaluate":
    trainer.evaluate(config, Path(_WORKDIR.value).absolute() if _WORKDIR.value else None)
    return 0
  trainer.train(config, _workdir(name))
  return 0


def entry_point() -> Any:
  """What the console script calls."""
  return app.run(main, flags_parser=_parse_flags)


def _restart_with_huge_pages() -> None:
  """Starts this command anew with huge pages for large buffers, which glibc decides at start only.

  XLA takes its buffers from glibc anew in each step; with small pages a step on a CPU spends up to
  half of its time in page faults. A GLIBC_TUNABLES of one's own is left as it is.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
  _restart_with_huge_pages()
  entry_point()
