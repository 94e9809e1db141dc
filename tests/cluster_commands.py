"""Stand-ins of `gcloud`, `xpk` and SLURM's commands: strict about what they are given.

Each knows the subcommands and flags that a launcher uses, as its original documents them (gcloud of
2025, XPK of June 2026, SLURM 22.05): which are needed and what a value looks like. Anything else
ends with code 2, as the original would. What then happens is the test's to say (`Clusters.plan`).
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

# (needed, flag) → the form of its value; None for a flag without one.
_ANY, _NUMBER = r"(?s).+", r"\d+"
_NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
_ZONE = r"[a-z]+-[a-z]+\d+-[a-z]"
_XPK_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_TPU = r"(v\d+[a-z]*|v5litepod|v5p|v6e)-\d+"
_PLACE = {(True, "--zone"): _ZONE, (False, "--project"): r"[a-z][-a-z0-9]{4,28}[a-z0-9]"}
_SSH = {**_PLACE, (True, "--worker"): r"all|\d+"}
_TPUS = "gcloud compute tpus"

# Words of the command → (forms of its positional arguments, flags).
GRAMMAR = {
  f"{_TPUS} queued-resources create": (
    [_NAME],
    {
      **_PLACE,
      (True, "--node-id"): _NAME,
      (True, "--accelerator-type"): _TPU,
      (True, "--runtime-version"): r"[a-z0-9][-a-z0-9.]+",
      (False, "--spot"): None,
    },
  ),
  f"{_TPUS} queued-resources describe": (
    [_NAME],
    {**_PLACE, (False, "--format"): r"value\(state\.state\)"},
  ),
  f"{_TPUS} queued-resources delete": (
    [_NAME],
    {**_PLACE, (True, "--force"): None, (True, "--quiet"): None},
  ),
  f"{_TPUS} tpu-vm describe": ([_NAME], {**_PLACE, (False, "--format"): r"value\(state\)"}),
  f"{_TPUS} tpu-vm ssh": ([_NAME], {**_SSH, (True, "--command"): _ANY}),
  f"{_TPUS} tpu-vm scp": ([r"/.+", rf"{_NAME}:.+"], _SSH),
  "xpk workload create": (
    [],
    {
      (True, "--cluster"): _XPK_NAME,
      (True, "--workload"): _XPK_NAME,
      (True, "--tpu-type"): _TPU,
      (True, "--command"): _ANY,
      (True, "--docker-image"): _ANY,
      (False, "--num-slices"): _NUMBER,
      (False, "--max-restarts"): _NUMBER,
      (False, "--termination-grace-period-seconds"): _NUMBER,
      (False, "--priority"): r"very-low|low|medium|high|very-high",
      (False, "--spot"): None,
      (False, "--project"): _ANY,
      (False, "--zone"): _ZONE,
    },
  ),
  "sbatch": (
    None,
    {
      (False, "--job-name"): _ANY,
      (False, "--nodes"): _NUMBER,
      (False, "--gpus-per-node"): _NUMBER,
      (False, "--ntasks-per-node"): _NUMBER,
      (False, "--cpus-per-task"): _NUMBER,
      (False, "--chdir"): r"/.+",
      (False, "--partition"): _ANY,
      (False, "--account"): _ANY,
      (False, "--time"): r"(\d+-)?\d+(:\d+){0,2}",
      (False, "--output"): _ANY,
      (False, "--open-mode"): "append|truncate",
      (False, "--requeue"): None,
      (False, "--signal"): r"([RB]:)?([A-Z0-9]+)(@\d+)?",
    },
  ),
  "srun": (None, {(False, "--kill-on-bad-exit"): "[01]", (False, "--label"): None}),
  "scancel": ([r"\d+"], {(True, "--signal"): r"[A-Z]+\d?"}),
  "scontrol requeue": ([r"\d+(,\d+)*"], {}),
}
COMMANDS = sorted({words.split()[0] for words in GRAMMAR})


class Clusters:
  """The stand-ins in a directory, and what they were given.

  Attributes:
    path: of the directory, which stands first on PATH.
  """

  def __init__(self, path):
    self.path = path
    for name in COMMANDS:
      script = path / name
      script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" {name} "$@"\n')
      script.chmod(0o755)
    self.plan()

  def plan(self, **plan):
    """What shall happen; see the functions `_gcloud`, `_xpk` and `_scontrol`."""
    (self.path / "plan.json").write_text(json.dumps(plan))

  def environment(self):
    """For a process that shall find them."""
    return {**os.environ, "PATH": f"{self.path}:/usr/bin:/bin", "CLUSTERS": str(self.path)}

  def run(self, *command, **more):
    """A command that finds them; its output as text."""
    return subprocess.run(
      command, env={**self.environment(), **more}, capture_output=True, text=True, timeout=60
    )

  def calls(self, *of):
    """The argument lists they took, in order; only of commands whose last words are among `of`."""
    log = self.path / "calls.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["arguments"] for line in lines if not of or line["command"].endswith(of)]


def check(arguments):
  """The entry of `GRAMMAR` and the flags given, as a dict.

  Raises:
    ValueError: the original would not take these arguments.
  """
  words = next((w for w in GRAMMAR if arguments[: len(w.split())] == w.split()), None)
  if words is None:
    raise ValueError(f"no such command: {shlex.join(arguments[:5])}")
  rest, (positional, flags) = arguments[len(words.split()) :], GRAMMAR[words]
  known = {flag: form for (_, flag), form in flags.items()}
  given, places = {}, []
  for number, argument in enumerate(rest):
    if not argument.startswith("--"):
      places.append(argument)
      if positional is None:  # a program and its arguments, which are its own
        places = rest[number:]
        break
      continue
    flag, equals, value = argument.partition("=")
    if flag not in known:
      raise ValueError(f"{words}: unknown flag {flag}")
    if flag in given:
      raise ValueError(f"{words}: {flag} is given twice")
    form = known[flag]
    if (form is None) == bool(equals) or (form is not None and not re.fullmatch(form, value)):
      raise ValueError(f"{words}: {argument!r} is not of the form {flag}={form}")
    given[flag] = value
  if missing := [flag for needed, flag in flags if needed and flag not in given]:
    raise ValueError(f"{words}: {', '.join(missing)} is needed")
  if positional is None:
    if not places:
      raise ValueError(f"{words}: what to run is needed")
  elif len(places) != len(positional) or not all(map(re.fullmatch, positional, places)):
    raise ValueError(f"{words}: positional arguments {places} are not of the forms {positional}")
  return words, given, places


def _main(arguments):
  here = Path(os.environ["CLUSTERS"])
  plan = json.loads((here / "plan.json").read_text())
  words, given, places = check(arguments)
  with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps({"command": words, "arguments": arguments}) + "\n")
  if words.startswith("gcloud"):
    return _gcloud(words.removeprefix(f"{_TPUS} "), given, plan, here / "state.json")
  return _OTHERS[arguments[0]](given, places, plan)


def _tell(text, code):
  print(text, file=sys.stderr)
  return code


def _gcloud(words, given, plan, file):
  """`plan["tpus"]`: one for each request; `plan["existing"]`: one that nobody asked for.

  Each is {"deny": text}, or: "states" of the request before ACTIVE, or before "ends"; "runs", the
  exit codes of the training on it, with "lost" for a preemption in its midst; "lag", how many looks
  it takes until that shows; "then", the request's state after it. So many looks as `plan["silent"]`
  fail as without a network; `plan["keeps"]` refuses deletion.
  """
  state = json.loads(file.read_text()) if file.exists() else {"asked": 0, "looks": 0, "runs": 0}
  tpu = plan["tpus"][state["asked"] - 1] if state["asked"] else plan.get("existing", {})
  code = _answer(words, given, plan, state, tpu)
  file.write_text(json.dumps(state))
  return code


def _answer(words, given, plan, state, tpu):
  lost = state.get("lost") and state["looks"] >= state["lost"] + tpu.get("lag", 0)
  if words.endswith("describe"):
    state["looks"] += 1
    if state["looks"] <= plan.get("silent", 0):
      return _tell("ERROR: (gcloud) There was a problem connecting", 1)
    if not state.get("there"):
      return _tell("ERROR: (gcloud) NOT_FOUND: Resource was not found", 1)
    if words.startswith("tpu-vm"):
      print("PREEMPTED" if lost else "READY")
    elif state["states"]:
      print(state["states"].pop(0))
    else:
      print(tpu.get("then", "ACTIVE") if lost else tpu.get("ends", "ACTIVE"))
    return 0
  if words.endswith("create"):
    if state.get("there"):
      return _tell("ERROR: (gcloud) ALREADY_EXISTS", 1)
    state["asked"] += 1
    tpu = plan["tpus"][state["asked"] - 1]
    if "deny" in tpu:
      return _tell(f"ERROR: (gcloud) {tpu['deny']}", 1)
    state.update(there=True, states=tpu.get("states", []), runs=0, lost=0)
    return 0
  if words.endswith("delete"):
    if plan.get("keeps"):
      return _tell("ERROR: (gcloud) PERMISSION_DENIED", 1)
    state.update(there=False, lost=0)
    return 0
  if state["asked"] and not state.get("there"):
    return _tell("ERROR: (gcloud) NOT_FOUND", 1)
  if "hybrid_vit.main" not in given.get("--command", ""):
    return 0  # the installation
  subprocess.run(["bash", "-n", "-c", given["--command"]], check=True)
  ending = tpu["runs"][state["runs"]]
  state["runs"] += 1
  if ending == "lost":
    state["lost"] = state["looks"] + 1
    return 255
  return ending


def _xpk(given, places, plan):
  """`plan["xpk"]`: what it ends with."""
  return plan.get("xpk", 0)


def _sbatch(given, places, plan):
  """Takes the header of the script too, whose lines are its flags."""
  header = [
    word
    for line in Path(places[0]).read_text().splitlines()
    if line.startswith("#SBATCH ")
    for word in shlex.split(line.removeprefix("#SBATCH "))
  ]
  check(["sbatch", *header, places[0]])
  print("Submitted batch job 7")
  return 0


def _srun(given, places, plan):
  """Runs the command once and becomes it: its code is the step's."""
  (Path(os.environ["CLUSTERS"]) / "step").write_text(str(os.getpid()))
  os.execvp(places[0], places)


def _scancel(given, places, plan):
  """Signals the step, as SLURM does where neither --batch nor --full is given."""
  step = int((Path(os.environ["CLUSTERS"]) / "step").read_text())
  os.kill(step, signal.Signals[f"SIG{given['--signal']}"])
  return 0


def _scontrol(given, places, plan):
  """`plan["requeue"]`: what it ends with."""
  return plan.get("requeue", 0)


_OTHERS = {
  "xpk": _xpk,
  "sbatch": _sbatch,
  "srun": _srun,
  "scancel": _scancel,
  "scontrol": _scontrol,
}


if __name__ == "__main__":
  try:
    sys.exit(_main(sys.argv[1:]))
  except ValueError as error:
    sys.exit(_tell(f"ERROR: {error}", 2))
