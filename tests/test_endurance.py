"""A little of `tests/endurance`: damaged files, files that cannot grow; its kills: `test_main`."""

import contextlib
import gc
import resource

import numpy as np
import pytest

from hybrid_vit.checkpoints import Checkpointer, CheckpointError
from tests import saved_states
from tests.endurance import damaged_files, fuzz, page, writers, written_files


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
  return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=1)


@pytest.mark.parametrize("number", range(len(damaged_files.KINDS)))
def test_a_damaged_file_is_named_or_does_no_harm(number, fuzzer):
  row = fuzzer.one(number, list(damaged_files.KINDS)[number])
  assert row["outcome"] not in fuzz.FAULTS, row


@pytest.mark.parametrize(
  ("fails", "result"),
  [
    (lambda: {}["a"], "traceback"),
    (lambda: int("a"), "nameless"),
    (lambda: 1, "silent"),
    (lambda: 0, "same"),
  ],
)
def test_faults_are_seen(fails, result, tmp_path):
  (tmp_path / "a.bin").write_bytes(b"1234")
  kind = damaged_files.Kind(lambda place: None, lambda place: fails(), checked=True)
  assert fuzz.outcome(kind, tmp_path, tmp_path / "a.bin", 0)[0] == result
  gone = damaged_files.Kind(lambda place: None, lambda place: (place / "a.bin").unlink())
  assert fuzz.outcome(gone, tmp_path, tmp_path / "a.bin", None)[0] == "lost"


def test_what_happens_to_a_file():
  rng, content = np.random.default_rng(0), bytes(range(200))
  found = {way: fuzz.damaged(content, way, rng) for way in fuzz.WAYS}
  assert all(data != content for data in found.values())
  assert len(found["truncate"]) < 200 < len(found["grow"]) and found["empty"] == b""
  assert sum(a != b for a, b in zip(found["flip"], content)) == 1
  assert fuzz.damaged(b"", "flip", rng) == b""


def test_a_file_that_cannot_grow_is_told_and_costs_no_earlier_state(tmp_path, capfd, caplog):
  """A limit of the system on files: what any user can set, as a full disk cannot be."""
  saved_states.save(tmp_path, 1)
  before = saved_states.everything_in(tmp_path / "checkpoints" / "1")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpointer = Checkpointer(tmp_path, keep_best=False)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    with pytest.raises(CheckpointError, match=r"a file grows beyond .*EFBIG"):
      checkpointer.save(saved_states.at(2), 2)
      checkpointer.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with contextlib.suppress(CheckpointError):  # the same failure may be told again
      checkpointer.close()
  gc.collect()
  assert "Traceback" not in capfd.readouterr().err
  assert not [record.getMessage() for record in caplog.records if record.exc_info]
  assert saved_states.everything_in(tmp_path / "checkpoints" / "1") == before
  assert saved_states.restore(tmp_path).step == 1
  saved_states.save(tmp_path, 2)
  assert saved_states.restore(tmp_path).step == 2


def test_what_orbax_raises_is_told_once_and_with_its_place(tmp_path, caplog):
  """The metadata beside a state, which a thread of orbax's own writes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpointer = Checkpointer(tmp_path, keep_best=False)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    with contextlib.suppress(CheckpointError):
      checkpointer.save(saved_states.at(2), 2)
    with pytest.raises(CheckpointError, match=rf"cannot be saved in {tmp_path}: .*EFBIG"):
      checkpointer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not [record.getMessage() for record in caplog.records if record.exc_info]


def _text(write, read=lambda path: path.read_text()):
  """A command that writes a text, in a way of its own."""

  def to(given, there, which):
    write(there / "a.txt", ("earlier " if which == 0 else "new ") * 4)

  return written_files.Writer("a.txt", lambda given: None, to, lambda there: read(there / "a.txt"))


def _at_once(path, text):
  path.with_suffix(".partial").write_text(text)
  path.with_suffix(".partial").replace(path)


def _in_two_goes(path, text):
  path.write_text(text[:7])
  with path.open("a") as file:
    file.write(text[7:])


def _away_first(path, text):
  path.unlink(missing_ok=True)
  path.write_text(text)


def _only_where_nothing_is_left(path, text):
  if path.with_suffix(".partial").exists():
    raise ValueError("something else is there")
  _at_once(path, text)


@pytest.mark.parametrize(
  ("writer", "over", "faults"),
  [
    (_text(_at_once), False, set()),
    (_text(_at_once), True, set()),
    (_text(_in_two_goes), False, {"mixed"}),
    (_text(_away_first), True, {"lost", "mixed"}),
    (_text(_only_where_nothing_is_left), False, {"stuck"}),
    (_text(_at_once, lambda path: int(path.exists()) or {}["a"]), False, {"nameless"}),
    (written_files.WRITERS["a large folder's manifest"], False, set()),
    (written_files.WRITERS["a tar's index"], False, set()),
  ],
)
@pytest.mark.filterwarnings("ignore:os.fork")
def test_what_killed_commands_leave(writer, over, faults, tmp_path):
  trial = writers.Trial("a command", writer, tmp_path, over)
  kills = [writers.Kill(operation=n) for n in range(trial.operations)]
  kills += [writers.Kill(size=size) for size in (1, max(1, trial.sizes[-1] // 2))]
  rows = [row for kill in kills if (row := trial.one(kill))]
  assert len(rows) >= trial.operations
  found = {row["found"] for row in rows} | {row["again"] for row in rows}
  assert found & set(writers.FAULTS) == faults


def test_the_page_has_the_figures_of_its_tables():
  text = page.PAGE.read_text("utf-8")
  assert page.written(text, page.PAGE.with_suffix("")) == text
