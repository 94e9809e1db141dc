"""The launchers' dry runs: they print what would be run, and quoting survives every shell."""

import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
RULES = """--config.sharding_rules=((".*/it's a/kernel", "fsdp"), ('.*', None))"""
ARGUMENTS = ["--config=configs/moat.py:moat_0,batch_size=512", RULES]
MAIN = ["python", "-m", "hybrid_vit.main", "--distributed", "--workdir=/mnt/my runs/a", *ARGUMENTS]
OPTIONS = {
  "tpu_vm.sh": ["--name=pod", "--zone=us-central2-b"],
  "gke_xpk.sh": ["--cluster=c", "--workload=w", "--tpu_type=v5litepod-256", "--image=i/hybrid"],
  "slurm.sh": ["--nodes=4", "--gpus_per_node=2"],
}


def launch(script, *options, workdir="/mnt/my runs/a"):
  return subprocess.run(
    [LAUNCH / script, *OPTIONS[script], f"--workdir={workdir}", *options, "--", *ARGUMENTS],
    capture_output=True,
    text=True,
    timeout=30,
  )


def dry_run(script, *options):
  """The commands that would be run, each as its list of words."""
  result = launch(script, "--dry_run", *options)
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


def words(command_option):
  """The words of a command that goes through another shell, here split by that shell itself."""
  text = command_option.removeprefix("--command=")
  printed = subprocess.run(
    ["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True
  )
  return printed.stdout.splitlines()


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.iterdir()))
def test_bash_can_read_it(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True, timeout=30)


def test_tpu_vm_runs_the_command_on_all_hosts():
  (command,) = dry_run("tpu_vm.sh", "--project=p")
  assert command[:-1] == [
    *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"),
    *("--zone=us-central2-b", "--worker=all", "--project=p"),
  ]
  enter, activate, train = command[-1].split(" && ")
  assert enter == "--command=cd hybrid_vit" and activate == "source .venv/bin/activate"
  assert words(train) == MAIN


def test_tpu_vm_can_install_first_and_stay_behind():
  archive, copy, install, train = dry_run("tpu_vm.sh", "--setup", "--detach", "--dir=code/it")
  assert archive[0] == "git" and copy[4] == "scp" and "--worker=all" in copy
  # The archive that is made is the one that is copied.
  assert archive[-2] == f"--output={copy[5]}"
  assert install[-1].endswith(".venv/bin/pip install -e '.[tpu]'")
  assert "cd code/it && " in install[-1] and "cd code/it && " in train[-1]
  assert train[-1].endswith(">train.log 2>&1 </dev/null & }")
  subprocess.run(["bash", "-n", "-c", train[-1].removeprefix("--command=")], check=True)


def test_xpk_creates_the_workload():
  (command,) = dry_run("gke_xpk.sh", "--num_slices=2")
  assert command[:3] == ["xpk", "workload", "create"]
  assert command[3:-1] == [
    *("--cluster=c", "--workload=w", "--tpu-type=v5litepod-256", "--num-slices=2"),
    "--docker-image=i/hybrid",
  ]
  assert words(command[-1]) == MAIN


def test_slurm_asks_for_one_task_for_each_gpu():
  (command,) = dry_run("slurm.sh", "--time=1:00:00", "--name=a b")
  job = command.index(str(LAUNCH / "slurm.sbatch"))
  assert command[0] == "sbatch" and command[job + 1 :] == MAIN
  assert {
    *("--nodes=4", "--gpus-per-node=2", "--ntasks-per-node=2", "--time=1:00:00", "--job-name=a b"),
  } <= set(command[:job])


def test_the_slurm_job_hands_its_arguments_to_srun(tmp_path):
  (tmp_path / "srun").write_text("""#!/bin/sh\nprintf '%s\\n' "$@"\n""")
  (tmp_path / "srun").chmod(0o755)
  result = subprocess.run(
    [LAUNCH / "slurm.sbatch", *MAIN],
    env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    capture_output=True,
    text=True,
    timeout=30,
  )
  assert result.stdout.splitlines() == ["--kill-on-bad-exit=1", "--label", *MAIN]


def test_without_dry_run_the_command_is_run(tmp_path, monkeypatch):
  (tmp_path / "xpk").write_text("""#!/bin/sh\nprintf '%s\\n' "$@"\n""")
  (tmp_path / "xpk").chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
  result = launch("gke_xpk.sh")
  (dry,) = dry_run("gke_xpk.sh")
  assert result.stdout.splitlines() == dry[1:]


@pytest.mark.parametrize("script", sorted(OPTIONS))
def test_what_is_missing_or_unknown_is_named(script):
  missing = launch(script, "--dry_run", workdir="")
  assert missing.returncode == 2 and "--workdir=... is needed" in missing.stderr
  unknown = launch(script, "--dry-run")
  assert unknown.returncode == 2 and "unknown option --dry-run" in unknown.stderr
  help_text = launch(script, "--help")
  assert help_text.returncode == 0 and "--workdir=" in help_text.stdout
  assert "set -euo" not in help_text.stdout
