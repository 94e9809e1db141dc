"""Compiling for tests: a program runs a few times there, so what counts is how fast it compiles.

Plain code of LLVM instead of the optimised one, and the older way to write down a fused loop: a
fifth of the default's time. The graph and the order of its arithmetic stay XLA's own; results are
held to the same tolerances.
"""

import os
import subprocess
import sys

_FLAGS = {
  "--xla_backend_optimization_level": "0",
  "--xla_llvm_disable_expensive_passes": "true",
  "--xla_cpu_use_fusion_emitters": "false",
  "--xla_cpu_parallel_codegen_split_count": "1",
}


def compile_quickly() -> None:
  """Sets XLA's flags for this process and those that it starts; to call before JAX compiles.

  What the environment sets already stays. Flags that the installed XLA does not know, which it
  would die of, are left out.
  """
  given = os.environ.get("XLA_FLAGS", "")
  flags = [f"{name}={value}" for name, value in _FLAGS.items() if name not in given]
  if flags and not _are_known(flags):
    flags = [flag for flag in flags if _are_known([flag])]
  os.environ["XLA_FLAGS"] = " ".join([*flags, given]).strip()
  # Nobody reads where in the source an operation of a compiled program was written; what writes it
  # down is a tenth of compiling. JAX has read the variable by now: it is for commands.
  os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")


def _are_known(flags: list[str]) -> bool:
  program = "from jaxlib import xla_client; xla_client.CompileOptions()"
  environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
  return not subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True
  ).returncode
