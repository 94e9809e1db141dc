"""Every test sees eight simulated devices; what does not name a mesh uses the first of them."""

import gc

import jax
import pytest

from tests import command, compiling

compiling.compile_quickly()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_traceback_in_locations_limit", 0)


# Files of few tests that take long; what is begun last leaves the other worker idle.
_LONG_FILES = (
  "test_configs.py",
  "test_mask_classification.py",
  "test_detection_run.py",
  "test_dense.py",
  "test_distributed.py",
  "test_notebooks.py",
  "test_main.py",
  "test_masked_autoencoding.py",
  "test_revcol.py",
)


def pytest_collection_modifyitems(items):
  """Files that take long come first."""

  def place(item):
    return _LONG_FILES.index(item.path.name) if item.path.name in _LONG_FILES else len(_LONG_FILES)

  items.sort(key=place)


def pytest_collection_finish():
  """Tracing makes objects by the million, and a fifth of its time is looking for cycles in them."""
  gc.collect()
  # What is imported and collected by now stays to the end and need not be looked at.
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """A file's compiled programs end with it: all files' together take gigabytes."""
  yield
  jax.clear_caches()
  gc.collect()
  # Looking through what is left again and again would take longer than the tests of small files.
  gc.freeze()


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
  """A directory in which the commands that tests start share what they compile."""
  return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory):
  """The trainings of one file, in its own process, share what they compile, as commands do."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0)):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, before):
    jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
  """A configuration file for the command."""
  path = tmp_path_factory.mktemp("configs") / "tiny.py"
  path.write_text(command.TINY)
  return path


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, tiny_config, compilation_cache):
  """(work directory, output) of a run of the command that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("runs") / "unbroken"
  output = command.run(compilation_cache, f"--config={tiny_config}", f"--workdir={workdir}")
  return workdir, output
