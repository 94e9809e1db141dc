"""Authors' checkpoint → a directory of weights that training, evaluation and prediction take.

python -m hybrid_vit.tools.import_weights --arch=tiny_moat_0 --from=FILE --to=DIR
python -m hybrid_vit.tools.import_weights --config=configs/swin_ade20k.py --from=FILE --to=DIR
python -m hybrid_vit.tools.import_weights --from=hf:owner/name --to=DIR

FILE may lie in a repository of the Hugging Face hub, hf:owner/name[@revision][/FILE]; an export of
this package that was pushed there is copied. With --config, a recipe of segmentation, depth or
detection (FILE or FILE:variant), a backbone with its decoder or detector is read. Strict: every
tensor of the file and every variable of the network is used exactly once, or the difference is an
error. What was loaded, what begins anew and why, and what was not used is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from hybrid_vit import checkpoints, dense_imports, hub
from hybrid_vit.literals import named_literal
from hybrid_vit.models.registry import as_preprocessing
from hybrid_vit.paths import as_path
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.weights import architectures, dense_checkpoints, families, importing, readers
from hybrid_vit.weights.stated_preprocessing import described_difference


def import_weights(
  source: str | Path | hub.Fetched,
  directory: str | Path,
  architecture: str | None = None,
  *,
  num_classes: int | None = None,
  layout: str | None = None,
  average: bool | None = None,
  arguments: dict[str, Any] | None = None,
) -> families.Imported:
  """Reads `source` and writes `directory`, whole or not at all.

  Args:
    source: see `readers.read_checkpoint`.
    directory: where to; one that holds weights already is replaced.
    architecture: name in the registry, or of a CLIP; None for the one whose names and shapes the
      file has.
    num_classes: see `families.import_checkpoint`.
    layout: see `families.import_checkpoint`.
    average: see `readers.read_checkpoint`.
    arguments: attributes of the network that replace the registry's.

  Raises:
    ValueError: the file cannot be read, is of another network, or of several where `architecture`
      is None; or `directory` holds something else.
    ModuleNotFoundError: a library that is needed to read it is not installed.
  """
  target = _free(directory)
  imported, metadata = importing.import_network(
    source,
    architecture,
    num_classes=num_classes,
    layout=layout,
    average=average,
    arguments=arguments,
  )
  checkpoints.export(target, imported.variables, metadata)
  return imported


def import_dense_weights(
  source: str | Path | hub.Fetched,
  directory: str | Path,
  recipe: ConfigDict,
  *,
  num_classes: int | None = None,
  layout: str | None = None,
  average: bool | None = None,
) -> dense_checkpoints.ImportedDense:
  """Reads a backbone with its decoder and writes `directory`, whole or not at all.

  Args:
    source: see `readers.read_checkpoint`.
    directory: where to; one that holds weights already is replaced.
    recipe: a configuration of a dense task, whose model it is.
    num_classes: see `dense_imports.import_dense_task`.
    layout: see there.
    average: see `readers.read_checkpoint`.

  Raises:
    ValueError: the file cannot be read or does not fit; or `directory` holds something else.
    ModuleNotFoundError: the library that reads such files is not installed.
  """
  target = _free(directory)
  file = readers.read_checkpoint(source, average=average)
  imported, metadata = dense_imports.import_dense_task(
    file, recipe, num_classes=num_classes, layout=layout
  )
  checkpoints.export(target, imported.variables, {**metadata, **importing.origin(file, imported)})
  return imported


def copy_export(
  fetched: hub.Fetched, directory: str | Path, architecture: str | None = None
) -> dict[str, Any]:
  """Writes an export that the hub gave to `directory`, whole or not at all.

  Args:
    fetched: what `hub.fetch` gave, a directory.
    directory: where to; one that holds weights already is replaced.
    architecture: name in the registry, or of a CLIP, that it has to be of; None for any.

  Returns:
    Its metadata, with where it comes from.

  Raises:
    ValueError: it is of another network, or `directory` holds something else.
    CheckpointError: it is damaged.
  """
  target = _free(directory)
  weights, metadata = checkpoints.load_weights(fetched)
  names = [metadata[key] for key in ("name", "system") if metadata.get(key)]
  if architecture is not None and architecture not in names:
    raise ValueError(
      f"{fetched.repository} holds weights of {' or '.join(names)}, not of {architecture}"
    )
  checkpoints.export(target, weights, metadata)
  return metadata


def _free(directory: str | Path) -> epath.Path:
  """A place to write weights to.

  Raises:
    ValueError: it holds something else.
  """
  target = as_path(directory)
  if target.exists() and not (target / "metadata.json").is_file() and _any_in(target):
    raise ValueError(f"{target} holds something that is no weights; give another --to")
  return target


def _any_in(directory: epath.Path) -> bool:
  """Whether `directory` is a file or holds anything."""
  return not directory.is_dir() or any(directory.iterdir())


def _recipe(args: argparse.Namespace) -> ConfigDict:
  """The recipe that --config names, with what --argument changes.

  Raises:
    ValueError: --arch is another network.
  """
  recipe = dense_imports.read_recipe(args.config)
  if args.arch is not None and args.arch != recipe.model.name:
    raise ValueError(
      f"--arch={args.arch}, and --config={args.config} is a recipe of {recipe.model.name}: leave "
      "--arch out, or name another recipe or variant"
    )
  with recipe.unlocked():
    recipe.model.arguments = {**(recipe.model.get("arguments") or {}), **dict(args.argument)}
  return recipe


def _copy(fetched: hub.Fetched, args: argparse.Namespace) -> int:
  """The command for an export of this package, which says itself what it is.

  Raises:
    ValueError: an option that would make something else of it.
  """
  options = ("config", "num_classes", "layout", "average", "argument")
  if given := [f"--{name}" for name in options if getattr(args, name) not in (None, [])]:
    raise ValueError(
      f"{', '.join(given)}: {args.source} is an export of this package and copied as it is; a "
      "training that begins with `init_from` changes it"
    )
  metadata = copy_export(fetched, args.to, args.arch)
  print(f"{metadata.get('system') or metadata['name']}, {metadata['task']}, as it was exported")
  print(f"written to {args.to}")
  return 0


def _preparation(metadata: dict[str, Any]) -> str:
  """How pictures are prepared where a file beside the weights says it."""
  usual = architectures.preprocessing_of(metadata.get("system") or metadata["name"])
  differs = described_difference(usual, as_preprocessing(metadata["preprocessing"]))
  said_by = metadata["source"]["preprocessing"]
  return f"pictures prepared as {said_by} beside them says: {differs or 'as usually'}"


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="import_weights", description=__doc__.splitlines()[0])
  parser.add_argument("--arch", help="network; default: the one whose names and shapes fit")
  parser.add_argument(
    "--config",
    help="recipe of a dense task, FILE or FILE:variant: its decoder or detector is read, too",
  )
  parser.add_argument("--from", dest="source", required=True, help="the authors' file")
  parser.add_argument("--to", required=True, help="directory to write")
  parser.add_argument("--num_classes", type=int, help="default: that of the file's head; 0: none")
  parser.add_argument("--layout", help="default: the one whose names fit best")
  parser.add_argument(
    "--average",
    action=argparse.BooleanOptionalAction,
    help="the running average of the weights, or not, where a file holds both",
  )
  parser.add_argument(
    "--argument",
    type=named_literal,
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="attribute of the network that is not the registry's; may be repeated",
  )
  args = parser.parse_args(argv)
  shared = {"num_classes": args.num_classes, "layout": args.layout, "average": args.average}
  imported: families.Imported | dense_checkpoints.ImportedDense
  try:
    source = hub.fetch(args.source) if hub.is_address(args.source) else args.source
    if isinstance(source, hub.Fetched) and source.path.is_dir():
      return _copy(source, args)
    if args.config is not None:
      recipe = _recipe(args)
      imported = import_dense_weights(source, args.to, recipe, **shared)
    else:
      own = dict(args.argument)
      imported = import_weights(source, args.to, args.arch, arguments=own, **shared)
    _, metadata = checkpoints.load_weights(args.to)
  except (ValueError, OSError, ModuleNotFoundError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(imported.report)
  about = metadata["source"]
  branch = f", branch {about['branch']}" if about["branch"] else ""
  if "system" in metadata:
    network = (
      f"{metadata['system']} ({metadata['name']} and the text tower {metadata['text_tower']})"
    )
    width = f"embeddings of {metadata['num_classes']}"
  else:
    network = metadata["name"]
    if args.config is not None:
      settings = metadata["task_settings"]
      network = f"{network} under {(settings.get('detector') or settings['head'])['name']}"
    classes = metadata.get("num_classes")
    width = metadata["task"] if classes is None else f"{classes} classes"
  print(f"{network}, {width}, layout {imported.layout}{branch}")
  if about.get("preprocessing"):
    print(_preparation(metadata))
  for name, digest in about["files"].items():
    print(f"from {name}, SHA-256 {digest}")
  print(f"written to {args.to}")
  return 0


if __name__ == "__main__":
  run_tool(main)
