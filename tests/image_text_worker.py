"""Evaluates two towers in one of several processes; the first writes the figures."""

import json
import sys
from pathlib import Path

import jax

from hybrid_vit import sharding
from tests.tasks.test_image_text_evaluation import both_kinds


def main(path: Path) -> None:
  sharding.initialize_distributed()
  found = both_kinds(sharding.make_mesh({"data": -1}))
  (path / f"{jax.process_index()}.json").write_text(json.dumps([jax.process_count(), found]))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
