"""Commands whose output nobody reads to its end."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_vit import standard_streams

ROOT = Path(__file__).parent.parent

_TALKER = """
import os, sys
from hybrid_vit.standard_streams import run_tool

def main(arguments):
  print(f"begun with {arguments[1:]}", flush=True)
  sys.stdin.readline()  # by now nobody reads
  for i in range(20_000):
    print("line", i, file=sys.stdout if i % 2 else sys.stderr)
  sys.stdout.flush()
  os.write(1, b"of a library")
  open(arguments[0], "w").write("all of it")
  return 3

run_tool(main)
"""


def test_a_command_whose_reader_has_gone_ends_its_work(tmp_path):
  script, left = tmp_path / "talker.py", tmp_path / "left.txt"
  script.write_text(_TALKER)
  with subprocess.Popen(
    [sys.executable, script, left, "more"],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env={"PYTHONPATH": str(ROOT)},
  ) as process:
    assert process.stdout.readline() == b"begun with ['more']\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 3
  assert left.read_text() == "all of it"


def test_what_is_printed_comes_whole_and_in_its_encoding(tmp_path):
  script = "import sys; from hybrid_vit.standard_streams import run_tool\n"
  script += "run_tool(lambda arguments: print('é' * 70_000) or print('err', file=sys.stderr))"
  env = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
  found = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, timeout=60)
  assert found.returncode == 0
  assert found.stdout.decode() == "é" * 70_000 + "\n"
  assert found.stderr == b"err\n"


def test_streams_that_stand_in_for_the_process_s_own_are_left_alone(capsys):
  before = sys.stdout, sys.stderr
  standard_streams.outlive_readers()
  assert (sys.stdout, sys.stderr) == before
  with pytest.raises(SystemExit) as ended:
    standard_streams.run_tool(lambda arguments: print("seen"))
  assert ended.value.code is None and capsys.readouterr().out == "seen\n"


def test_every_command_is_run_so():
  """But for those that speak with a process of ours through their pipes."""
  ours = {"torch_loading", "torch_networks"}
  for path in sorted((ROOT / "hybrid_vit" / "tools").glob("*.py")):
    body = re.search(r'^if __name__ == "__main__":\n((?:  .*\n)+)', path.read_text(), re.M)
    if body and path.stem not in ours:
      assert body[1].endswith("  run_tool(main)\n"), path.name
