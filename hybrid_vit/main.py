"""`python -m hybrid_vit.main --config=configs/moat.py --workdir=…`: flags, devices, directory."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from hybrid_vit import sharding
from hybrid_vit.config import Config, ConfigError, load_config, set_field
from hybrid_vit.config_files import find_config
from hybrid_vit.huge_pages import restart_with_huge_pages
from hybrid_vit.paths import as_path
from hybrid_vit.standard_streams import outlive_readers
from hybrid_vit.timing import parse_steps
from hybrid_vit.workdir import WorkdirError, explain, lock, new_workdir

_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Configuration file, or the name of a shipped one, with variant and keys: "
  "FILE.py[:variant,key=value,…]. Fields are set by --config.NAME=value.",
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
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "For --mode=dry_run: TPUs such as v5e:16x16, by whose own compiler each step is compiled; "
  "needs pip install 'jax[tpu]', and no TPU.",
)
_TRY_TO_FIT = flags.DEFINE_bool(
  "try_to_fit", False,
  "With --topology: compile what may make a step fit that does not, until one does.",
)  # fmt: skip
_BEGIN_ANEW = flags.DEFINE_bool(
  "begin_anew", False, "Begin at step 0 in a --workdir whose checkpoints were set aside as damaged."
)
_PROFILE = flags.DEFINE_string(
  "profile", None, "FIRST:LAST: write a trace of these steps to the work directory's profile/."
)
_SMOKE = flags.DEFINE_integer(
  "smoke", None, "Shorten every phase to so many steps and every evaluation to so many batches.",
  lower_bound=1,
)  # fmt: skip
# Set to anything: errors come with their traceback.
_TRACEBACK = "HYBRID_VIT_TRACEBACK"

# The configuration's flags, taken out of the command line before absl reads it: its fields are
# those that a run reads, whether the file spells them or not.
_overrides: list[tuple[str, str]] = []


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR where that is set."""
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  try:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "hybrid_vit" / "xla"
    directory.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError) as error:
    print(f"note: compiled programs are not kept: {error}", file=sys.stderr)
    return
  jax.config.update("jax_compilation_cache_dir", str(directory))


def train(
  config: ConfigDict | Config,
  workdir: Any,
  *,
  begin_anew: bool = False,
  profile: tuple[int, int] | None = None,
) -> dict[str, float]:
  """Trains as a configuration says; what the command does, for notebooks and programs.

  Args:
    config: of the run.
    workdir: its directory, gone on with where it holds a checkpoint.
    begin_anew: see `trainer.train`.
    profile: see `trainer.train`.

  Returns:
    The last evaluation's measures, "<set>/<measure>".
  """
  from hybrid_vit import trainer
  from hybrid_vit.build import DataFacts, build
  from hybrid_vit.data.pipeline import TrainingSettings, open_source, readable_example, source_info

  config = config if isinstance(config, Config) else Config(config)
  source = open_source(config.data.as_dataclass(TrainingSettings))
  run = build(
    config, DataFacts(source_info(source), len(source), example=lambda: readable_example(source))
  )
  config.assert_all_read()
  with lock(workdir, process_index=jax.process_index()):
    return trainer.train(run, source, workdir, begin_anew=begin_anew, profile=profile)


def main(arguments: list[str]) -> int:
  """Runs one mode; errors a user can mend are one paragraph, without a traceback."""
  # Orbax and JAX narrate at the level of information; warnings stay.
  logging.set_verbosity(logging.WARNING)
  try:
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected argument {arguments[1]!r}; options begin with --")
    if _CONFIG.value is None:
      raise app.UsageError("--config is needed, e.g. --config=configs/quickstart.py")
    path, config = _read_config(_CONFIG.value)
    return _run(Config(config), path.stem)
  except user_errors() as error:
    from hybrid_vit.checkpoints import CheckpointError

    if os.environ.get(_TRACEBACK):
      raise
    # The cause is the last line of all.
    print(f"\n(with {_TRACEBACK}=1 the place in the code is shown)", end="", file=sys.stderr)
    # These say the cause themselves, and what cannot be done for it.
    told = isinstance(error, CheckpointError | WorkdirError)
    return _tell(str(error) if told else explain(error) or str(error))
  except jax.errors.JaxRuntimeError as error:
    said = explain(error)
    if said is None or os.environ.get(_TRACEBACK):
      raise
    return _tell(said)


def _read_config(text: str) -> tuple[Path, ConfigDict]:
  name, _, argument = text.partition(":")
  path = find_config(name)
  config = load_config(path, argument or None)
  for field, value in _overrides:
    set_field(config, field, value)
  if _SMOKE.value is not None:
    set_field(config, "smoke_steps", str(_SMOKE.value))
  return path, config


def _tell(message: str) -> int:
  print(f"\nerror: {message}", file=sys.stderr)
  return 1


def _parse_flags(arguments: list[str]) -> list[str]:
  """absl's parsing of all but the configuration's fields."""
  left, rest = arguments[:1], list(arguments[1:])
  while rest:
    argument = rest.pop(0)
    field = re.fullmatch(r"--?config\.([A-Za-z_][\w.]*)(?:=(.*))?", argument, re.S)
    if not field:
      left.append(argument)
    elif field[2] is not None:
      _overrides.append((field[1], field[2]))
    elif rest and not rest[0].startswith("--"):
      _overrides.append((field[1], rest.pop(0)))
    else:
      sys.exit(_tell(f"{argument} needs a value: {argument}=VALUE"))
  try:
    return flags.FLAGS(left)
  except flags.Error as error:
    if os.environ.get(_TRACEBACK):
      raise
    sys.exit(_tell(str(error)))


def user_errors() -> tuple[type[BaseException], ...]:
  """What is told in one paragraph: errors that a user can mend."""
  from hybrid_vit.checkpoints import CheckpointError
  from hybrid_vit.tpu_topology import TopologyError

  return (ValueError, OSError, FloatingPointError, CheckpointError, WorkdirError, TopologyError)


def _run(config: Config, name: str) -> int:
  profile = parse_steps(_PROFILE.value) if _PROFILE.value else None
  if _MODE.value == "dry_run":
    from hybrid_vit import dry_run

    return dry_run.main(
      config, _DEVICES.value, topology=_TOPOLOGY.value, try_to_fit=_TRY_TO_FIT.value
    )
  use_compilation_cache()
  if _DISTRIBUTED.value:
    sharding.initialize_distributed()
  workdir = as_path(_WORKDIR.value) if _WORKDIR.value else None
  if _MODE.value == "evaluate":
    from hybrid_vit import evaluate

    evaluate.evaluate(config, workdir)
    return 0
  if workdir is None:
    workdir = _new_workdir(name)
  train(config, workdir, begin_anew=_BEGIN_ANEW.value, profile=profile)
  return 0


def _new_workdir(name: str) -> Any:
  """A new directory: a run never goes on with an older one unasked.

  Raises:
    ConfigError: several processes must be told, since their clocks may differ.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      "with several processes give --workdir, on a file system that all of them see"
    )
  path = new_workdir(name)
  print(f"work directory {path} (give --workdir={path} to go on with it later)", flush=True)
  return path


def entry_point() -> Any:
  """What the console script calls."""
  outlive_readers()
  return app.run(_main_to_the_end, flags_parser=_parse_flags)


def _main_to_the_end(arguments: list[str]) -> int:
  """`main`; after a save that failed it does not wait for orbax's threads.

  They wait for signals of one another for five minutes, and a process for all its threads.
  """
  status = main(arguments)
  waiting = any(type(t).__module__.startswith("orbax.") for t in threading.enumerate())
  if status and waiting and jax.process_count() == 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  return status


if __name__ == "__main__":
  restart_with_huge_pages()
  entry_point()
