"""The launchers: what they run, that quoting survives every shell, what they do after a preemption.

Clusters are played by `cluster_commands`, which shows that flags are spelled as documented and what
a launcher does with an answer, not that a cloud answers so.
"""

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster_commands import Clusters

LAUNCH = Path(__file__).parent.parent / "launch"
RULES = """--config.sharding_rules=((".*/it's a/kernel", "fsdp"), ('.*', None))"""
ARGUMENTS = ["--config=configs/moat.py:moat_0,batch_size=512", RULES]
MAIN = ["python", "-m", "hybrid_vit.main", "--distributed", "--workdir=/mnt/my runs/a", *ARGUMENTS]
OPTIONS = {
  "tpu_vm.sh": ["--name=pod", "--zone=us-central2-b"],
  "gke_xpk.sh": ["--cluster=c", "--workload=w", "--tpu_type=v5litepod-256", "--image=i/hybrid"],
  "slurm.sh": ["--nodes=4", "--gpus_per_node=2"],
}
QUEUE = [
  *("--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite", "--spot"),
  *("--poll=0", "--tries=3"),
]


@pytest.fixture
def clusters(tmp_path):
  return Clusters(tmp_path)


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
    *("--zone=us-central2-b", "--project=p", "--worker=all"),
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
    *("--max-restarts=20", "--termination-grace-period-seconds=120"),
  ]
  assert words(command[-1]) == MAIN


def test_slurm_asks_for_one_task_for_each_gpu():
  (command,) = dry_run("slurm.sh", "--time=1:00:00", "--name=a b")
  job = command.index(str(LAUNCH / "slurm.sbatch"))
  assert command[0] == "sbatch" and command[job + 1 :] == ["100", *MAIN]
  assert {
    *("--nodes=4", "--gpus-per-node=2", "--ntasks-per-node=2", "--time=1:00:00", "--job-name=a b"),
  } <= set(command[:job])


@pytest.mark.parametrize("script", sorted(OPTIONS))
def test_what_is_missing_or_unknown_is_named(script):
  missing = launch(script, "--dry_run", workdir="")
  assert missing.returncode == 2 and "--workdir=... is needed" in missing.stderr
  unknown = launch(script, "--dry-run")
  assert unknown.returncode == 2 and "unknown option --dry-run" in unknown.stderr
  help_text = launch(script, "--help")
  assert help_text.returncode == 0 and "--workdir=" in help_text.stdout
  assert "set -euo" not in help_text.stdout


def queue(clusters, *options, **plan):
  """The launcher of TPU VMs with a queued resource, run to its end."""
  clusters.plan(**plan)
  return clusters.run(
    *(LAUNCH / "tpu_vm.sh", *OPTIONS["tpu_vm.sh"], "--workdir=/mnt/my runs/a", *QUEUE, *options),
    *("--", *ARGUMENTS),
  )


def trainings(clusters):
  return [c for c in clusters.calls("tpu-vm ssh") if "hybrid_vit.main" in c[-1]]


def asked_and_deleted(clusters):
  return len(clusters.calls("resources create")), len(clusters.calls("resources delete"))


def test_a_queued_tpu_is_waited_for_set_up_used_and_deleted(clusters):
  waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
  result = queue(clusters, "--project=my-project", tpus=[{"states": waiting, "runs": [0]}])
  assert result.returncode == 0, result.stderr
  (create,) = clusters.calls("resources create")
  assert {"pod", "--node-id=pod", "--spot", "--project=my-project"} <= set(create)
  copy, install, train = clusters.calls("tpu-vm scp", "tpu-vm ssh")
  assert "scp" in copy and ".venv/bin/pip install" in install[-1]
  assert words(train[-1].split(" && ")[-1]) == MAIN
  assert asked_and_deleted(clusters) == (1, 1)
  for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
    assert f"is {state}" in result.stderr


def test_on_demand_capacity_is_asked_for_without_the_flag_of_spot(clusters):
  clusters.plan(tpus=[{"runs": [0]}])
  options = [*OPTIONS["tpu_vm.sh"], "--workdir=/a", "--keep", *QUEUE]
  options.remove("--spot")
  assert clusters.run(LAUNCH / "tpu_vm.sh", *options, "--", "--config=moat").returncode == 0
  assert "--spot" not in clusters.calls("resources create")[0]
  assert asked_and_deleted(clusters) == (1, 0)


@pytest.mark.parametrize(("then", "lag"), [("ACTIVE", 2), ("SUSPENDING", 1), ("SUSPENDED", 0)])
def test_a_preempted_tpu_is_asked_for_again_and_the_same_command_run(clusters, then, lag):
  tpus = [{"runs": ["lost"], "then": then, "lag": lag}, {"runs": [0]}]
  result = queue(clusters, tpus=tpus)
  assert result.returncode == 0, result.stderr
  first, second = trainings(clusters)
  assert first == second
  assert asked_and_deleted(clusters) == (2, 2)


def test_a_command_that_fails_on_a_tpu_that_is_there_ends_the_launcher(clusters):
  result = queue(clusters, tpus=[{"runs": [7]}])
  assert result.returncode == 7
  assert "exit code 7" in result.stderr
  assert len(trainings(clusters)) == 1 and asked_and_deleted(clusters) == (1, 1)


def test_a_run_that_was_told_to_stop_and_saved_is_started_again(clusters):
  assert queue(clusters, tpus=[{"runs": [143, 0]}]).returncode == 0
  assert len(trainings(clusters)) == 2 and asked_and_deleted(clusters) == (1, 1)


def test_tries_come_to_an_end(clusters):
  result = queue(clusters, tpus=[{"runs": ["lost"]}] * 9)
  assert result.returncode == 1 and "no try is left of 3" in result.stderr
  assert len(trainings(clusters)) == 3 and asked_and_deleted(clusters) == (3, 3)


def test_starts_on_a_tpu_that_is_there_come_to_an_end_too(clusters):
  assert queue(clusters, tpus=[{"runs": [143] * 9}]).returncode == 143
  assert len(trainings(clusters)) == 3 and asked_and_deleted(clusters) == (1, 1)


def test_a_refused_request_ends_with_what_was_said_and_is_not_made_again(clusters):
  result = queue(clusters, tpus=[{"deny": "PERMISSION_DENIED: tpu.nodes.create"}])
  assert result.returncode == 1 and "PERMISSION_DENIED: tpu.nodes.create" in result.stderr
  assert asked_and_deleted(clusters) == (1, 0) and not trainings(clusters)


def test_a_request_that_failed_in_the_queue_is_made_again(clusters):
  tpus = [{"states": ["WAITING_FOR_RESOURCES"], "ends": "FAILED"}, {"runs": [0]}]
  assert queue(clusters, tpus=tpus).returncode == 0
  assert asked_and_deleted(clusters) == (2, 2)


def test_a_launcher_that_is_started_again_goes_on_with_the_request_that_is_there(clusters):
  assert queue(clusters, "--keep", tpus=[{"runs": [7, 0]}]).returncode == 7
  assert queue(clusters, tpus=[{"runs": [7, 0]}]).returncode == 0
  assert asked_and_deleted(clusters) == (1, 1)


def test_a_network_that_fails_is_borne_for_a_while(clusters):
  assert queue(clusters, silent=3, tpus=[{"runs": [0]}]).returncode == 0
  never = queue(clusters, silent=1000, tpus=[])
  assert never.returncode == 1 and "no answer 5 times" in never.stderr


def test_a_request_that_cannot_be_deleted_ends_the_launcher(clusters):
  result = queue(clusters, keeps=True, tpus=[{"runs": ["lost"] * 9, "then": "SUSPENDED"}])
  assert result.returncode == 1 and "cannot be deleted" in result.stderr
  assert asked_and_deleted(clusters) == (1, 5)


def test_an_existing_tpu_is_neither_asked_for_nor_deleted(clusters):
  clusters.plan(existing={"runs": [5]})
  options = [*OPTIONS["tpu_vm.sh"], "--workdir=/a", "--setup"]
  assert clusters.run(LAUNCH / "tpu_vm.sh", *options, "--", "--config=moat").returncode == 5
  assert asked_and_deleted(clusters) == (0, 0)
  assert len(clusters.calls("tpu-vm ssh")) == 2 and len(trainings(clusters)) == 1


def test_queue_options_that_do_not_go_together_are_named():
  for options, text in [
    (["--spot"], "need --accelerator_type"),
    (["--accelerator_type=v4-8"], "--runtime_version=... is needed"),
    ([*QUEUE, "--detach"], "--detach does not go with"),
    ([*QUEUE, "--tries=many"], "--tries=many: a whole number is needed"),
  ]:
    result = launch("tpu_vm.sh", "--dry_run", *options)
    assert result.returncode == 2 and text in result.stderr, result.stderr


def test_the_dry_run_of_a_queue_prints_its_commands_in_order():
  commands = dry_run("tpu_vm.sh", *QUEUE)
  done = [" ".join(c[3:5]) for c in commands if c[0] == "gcloud"]
  assert done == [
    *("queued-resources create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"),
    "queued-resources delete",
  ]


def test_xpk_gets_what_it_knows_and_its_answer_is_passed_on(clusters):
  options = ["--num_slices=2", "--priority=high", "--spot", "--max_restarts=3", "--grace=60"]
  command = [*OPTIONS["gke_xpk.sh"], "--workdir=/a", *options, "--zone=us-east5-a"]
  for code in (0, 1):
    clusters.plan(xpk=code)
    result = clusters.run(LAUNCH / "gke_xpk.sh", *command, "--", *ARGUMENTS)
    assert result.returncode == code, result.stderr
  given = clusters.calls()[0]
  assert {"--max-restarts=3", "--termination-grace-period-seconds=60", "--spot"} <= set(given)
  refused = clusters.run(LAUNCH / "gke_xpk.sh", *command, "--priority=urgent", "--", *ARGUMENTS)
  assert refused.returncode == 2 and "--priority" in refused.stderr


def test_sbatch_takes_the_launcher_s_flags_and_those_in_the_job(clusters):
  result = clusters.run(
    *(LAUNCH / "slurm.sh", *OPTIONS["slurm.sh"], "--workdir=/a", "--time=48:00:00"),
    *("--requeues=5", "--", *ARGUMENTS),
  )
  assert result.returncode == 0, result.stderr
  header = (LAUNCH / "slurm.sbatch").read_text()
  assert "#SBATCH --requeue\n" in header and "#SBATCH --signal=B:USR1@180\n" in header


# What a step of the job does: it says that it runs, and ends with 143 when it is told to stop.
STEP = "trap 'echo saving; sleep 0.2; exit %d' TERM; echo running; while :; do sleep 0.05; done"


def job(clusters, step, *signals, restarts=0, requeue=0):
  """(exit code, output) of the job, signalled as SLURM does once its step runs."""
  clusters.plan(requeue=requeue)
  process = subprocess.Popen(
    [LAUNCH / "slurm.sbatch", "2", "bash", "-c", step],
    env=clusters.environment() | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  first = process.stdout.readline() if signals else ""
  for number in signals:
    process.send_signal(number)
    time.sleep(0.05)
  output, _ = process.communicate(timeout=60)
  return process.returncode, first + output


def requeues(clusters):
  return clusters.calls("scontrol requeue")


def test_the_slurm_job_hands_its_arguments_to_srun(clusters):
  code, output = job(clusters, "echo a 'b  c'")
  assert code == 0 and output == "a b  c\n" and not requeues(clusters)
  (given,) = clusters.calls("srun")
  assert given[1:4] == ["--kill-on-bad-exit=1", "--label", "bash"]


def test_a_slurm_job_near_its_limit_saves_and_goes_back_to_the_queue(clusters):
  code, output = job(clusters, STEP % 143, signal.SIGUSR1)
  assert code == 143 and output.splitlines()[:2] == ["running", "saving"]
  assert requeues(clusters) == [["scontrol", "requeue", "7"]]


def test_a_slurm_job_that_fails_by_itself_is_not_requeued(clusters):
  assert job(clusters, "exit 3")[0] == 3
  # Nor one that fails when it is told to stop, nor one that is done by then.
  assert job(clusters, STEP % 1, signal.SIGUSR1)[0] == 1
  assert job(clusters, STEP % 0, signal.SIGUSR1)[0] == 0
  assert not requeues(clusters)


def test_a_cancelled_slurm_job_waits_until_the_run_has_saved_and_does_not_come_back(clusters):
  # SLURM signals both, the step here later than the script.
  step = f"({STEP % 143}) & sleep 0.4; kill $!; wait $!"
  code, output = job(clusters, step, signal.SIGTERM)
  assert code == 143 and "saving" in output and not requeues(clusters)


def test_requeues_come_to_an_end(clusters):
  assert job(clusters, STEP % 143, signal.SIGUSR1, restarts=1)[0] == 143
  assert len(requeues(clusters)) == 1
  code, output = job(clusters, STEP % 143, signal.SIGUSR1, restarts=2)
  assert code == 143 and "requeued 2 times" in output
  assert len(requeues(clusters)) == 1


def test_a_refused_requeue_says_what_to_do(clusters):
  code, output = job(clusters, STEP % 143, signal.SIGUSR1, requeue=1)
  assert code == 143 and "cannot be requeued" in output


@pytest.mark.parametrize(
  ("command", "text"),
  [
    ("gcloud compute tpus queued-resources make a", "no such command"),
    ("gcloud compute tpus tpu-vm describe a", "--zone is needed"),
    ("gcloud compute tpus tpu-vm describe a --zone=us-west4-a --zoom=1", "unknown flag --zoom"),
    ("gcloud compute tpus tpu-vm describe a --zone=west", "not of the form"),
    ("xpk workload create --cluster=Big", "not of the form"),
    ("sbatch --time=soon job", "not of the form"),
    ("scontrol requeue", "positional arguments"),
  ],
)
def test_the_stand_ins_refuse_what_the_originals_do(clusters, command, text):
  result = clusters.run("sh", "-c", command)
  assert result.returncode == 2 and text in result.stderr
