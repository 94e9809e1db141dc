"""Repositories of the hub, against a stand-in of it on this machine."""

import hashlib
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from hybrid_vit import checkpoints, hub, starting
from hybrid_vit.models.registry import create_model
from hybrid_vit.tools import import_weights
from hybrid_vit.weights import families, readers, stored
from tests import hub_server
from tests.weights.test_families import made_variables

huggingface_hub = pytest.importorskip("huggingface_hub")

CARD = "---\nlicense: apache-2.0\n---\n# Weights\n"


@pytest.fixture
def server(monkeypatch, tmp_path):
  """The stand-in, with an empty cache."""
  with hub_server.serving() as (there, address):
    hub_server.use(monkeypatch, address, tmp_path / "cache")
    yield there


@pytest.fixture
def offline(monkeypatch):
  from huggingface_hub import constants

  def switch():
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

  return switch


def tensors(seed=0):
  """A safetensors file of two small tensors."""
  from safetensors.numpy import save

  rng = np.random.default_rng(seed)
  return save({"a": rng.normal(size=(3,)).astype(np.float32), "b": np.ones((2, 2), np.float32)})


def export_files(directory, **metadata):
  """The files of an export of two numbers, by their names in a repository."""
  checkpoints.export(
    directory,
    {"params": {"head": {"kernel": np.ones((2, 3), np.float32)}}, "batch_stats": {}},
    {"name": "tiny_moat_0", "task": "classification", **metadata},
  )
  names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
  sums = hub.sha256sums(directory, sorted(names))
  return {"SHA256SUMS": sums, **{name: (directory / name).read_bytes() for name in names}}


def test_a_file_is_fetched_held_to_its_sum_and_its_licence_said_first(server):
  server.put("someone/net", {"README.md": CARD, "model.safetensors": tensors(), "more.bin": b"x"})
  said = []
  fetched = hub.fetch("hf:someone/net", lambda line: said.append((line, list(server.fetched))))
  assert fetched.path.name == "model.safetensors" and fetched.path.read_bytes() == tensors()
  assert fetched.origin == {
    "repository": "someone/net",
    "commit": server.commit("someone/net", "main"),
    "licence": "apache-2.0",
  }
  # Told before the weights came, and nothing came that is not needed.
  ((line, before),) = said
  assert "licence apache-2.0" in line and fetched.commit in line
  assert before == ["README.md"] and server.fetched == ["README.md", "model.safetensors"]
  file = readers.read_checkpoint("hf:someone/net")
  assert file.origin == fetched.origin and set(file.weights) == {"a", "b"}
  assert file.sha256 == {"model.safetensors": hashlib.sha256(tensors()).hexdigest()}
  # All of it was in the cache.
  assert len(server.fetched) == 2


def test_revisions_and_files_are_named(server):
  server.put("someone/net", {"one.pth": b"1", "two.pth": b"2", "deep/three.npz": b"3"})
  server.put("someone/net", {"one.pth": b"older"}, "v1")
  server.put("someone/net", {"one.pth": b"asked for"}, "refs/pr/3")
  path = lambda address: hub.fetch(address, lambda _: None).path  # noqa: E731
  assert path("hf:someone/net@v1").read_bytes() == b"older"
  assert path("hf:someone/net@refs/pr/3/one.pth").read_bytes() == b"asked for"
  server.put("someone/net", {"one.pth": b"of a branch"}, "try/it")
  assert hub.address_of("someone/net", "try/it") == "hf:someone/net@try%2Fit"
  assert path("hf:someone/net@try%2Fit/one.pth").read_bytes() == b"of a branch"
  commit = server.commit("someone/net", "v1")
  assert path(f"hf:someone/net@{commit}").read_bytes() == b"older"
  assert path("hf:someone/net/deep").read_bytes() == b"3"
  assert path("hf://someone/net/two.pth").read_bytes() == b"2"
  for address, message in [
    ("hf:someone/net", "several files of weights, name one, as hf:someone/net/one.pth: one.pth, t"),
    ("hf:someone/net/none", "has no none; it has: deep/three.npz, one.pth, two.pth"),
    ("hf:someone/net@v2", "someone/net has no branch, tag or commit 'v2'"),
    ("hf:someone/other", "no repository someone/other, or a private one: `hf auth login`"),
    ("hf:someone", "is no address of the hub; hf:owner/name"),
    ("hf:someone/net/../../x", "is no address of the hub"),
  ]:
    with pytest.raises(hub.HubError) as error:
      hub.fetch(address)
    assert message in str(error.value)
  server.gated.add("someone/net")
  with pytest.raises(hub.HubError, match="accept its terms"):
    hub.fetch("hf:someone/net@v1")


def test_a_card_without_a_licence_and_one_of_its_own(server):
  said = []
  for card, expected in [
    (None, ""),
    ("no front matter", ""),
    ("---\nlicense: [broken\n---\n", ""),
    ("---\nlicense: other\nlicense_name: research-only\n---\n", "research-only"),
    ("---\nlicense: other\n---\n", "other"),
  ]:
    card = {} if card is None else {"README.md": card}
    server.put("someone/net", {**card, "model.safetensors": tensors()})
    assert hub.fetch("hf:someone/net", said.append).licence == expected
  assert sum("names no licence: ask its owner" in line for line in said) == 3


def test_a_changed_file_is_named_with_both_sums_and_not_used(server, offline, tmp_path, capsys):
  server.put("someone/net", {"model.safetensors": tensors()})
  server.wrong.add(("someone/net", "model.safetensors"))
  expected = hashlib.sha256(tensors()).hexdigest()
  with pytest.raises(hub.HubError, match=rf"SHA-256 is [0-9a-f]{{64}}, the hub says {expected}"):
    hub.fetch("hf:someone/net", lambda _: None)
  arguments = ["--from=hf:someone/net", f"--to={tmp_path / 'out'}"]
  assert import_weights.main(arguments) == 1
  assert "is not used" in capsys.readouterr().err and not (tmp_path / "out").exists()
  # The name in the cache says the sum, too.
  offline()
  with pytest.raises(hub.HubError, match=f"says {expected}. Remove (.*) and give") as error:
    hub.fetch("hf:someone/net", lambda _: None)
  assert os.path.isfile(str(error.value).split("Remove ")[1].split(" and give")[0])


def test_small_files_are_held_to_the_sum_of_git(server):
  server.put("someone/net", {"a.pth": b"abc"})
  server.wrong.add(("someone/net", "a.pth"))
  with pytest.raises(hub.HubError, match=f"git's SHA-1 is .*says {hub_server.git_sum(b'abc')}"):
    hub.fetch("hf:someone/net", lambda _: None)


def test_without_a_network_the_cache_serves_or_says_what_it_lacks(server, offline, tmp_path):
  server.put("someone/net", {"README.md": CARD, "model.safetensors": tensors(), "b.pth": b"b"})
  online = hub.fetch("hf:someone/net", lambda _: None)
  # Down, then told to stay offline.
  for switch in (lambda: setattr(server, "down", True), offline):
    switch()
    said = []
    again = hub.fetch("hf:someone/net", said.append)
    assert again == online and "cannot be reached" in said[0] and "apache-2.0" in said[1]
    assert hub.fetch(f"hf:someone/net@{online.commit}", lambda _: None) == online
    for address, message in [
      ("hf:someone/net/b.pth", "has no b.pth; it has: README.md, model.safetensors"),
      (
        "hf:someone/net@v1",
        f"someone/net at 'v1' is not in the cache, which has of it the commits {online.commit}: ",
      ),
      ("hf:someone/other", "someone/other at 'main' is not in the cache: give the same command"),
    ]:
      with pytest.raises(hub.HubError) as error:
        hub.fetch(address, lambda _: None)
      assert message in str(error.value)


def test_files_in_several_parts(server, offline):
  index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
  parts = {"m-1.safetensors": tensors(1), "m-2.safetensors": tensors(2)}
  server.put("someone/net", {"model.safetensors.index.json": json.dumps(index), **parts})
  file = readers.read_checkpoint("hf:someone/net")
  assert set(file.sha256) == {"model.safetensors.index.json", *parts}
  server.put("someone/net", {"model.safetensors.index.json": json.dumps(index)})
  with pytest.raises(hub.HubError, match=r"m-1\.safetensors, which other files name, is not among"):
    readers.read_checkpoint("hf:someone/net")


def test_an_export_is_whole_or_refused(server, tmp_path, offline):
  files = export_files(tmp_path / "export")
  server.put("someone/ours", {"README.md": CARD, **files})
  weights, metadata = checkpoints.load_weights("hf:someone/ours")
  np.testing.assert_array_equal(weights["params"]["head"]["kernel"], np.ones((2, 3)))
  assert metadata["source"]["licence"] == "apache-2.0" and metadata["name"] == "tiny_moat_0"
  begun, _ = starting._initial_weights(None, "hf:someone/ours")
  jax.tree.map(np.testing.assert_array_equal, begun, weights)
  offline()
  checkpoints.load_weights("hf:someone/ours")
  with pytest.raises(checkpoints.CheckpointError, match="is not in the cache"):
    checkpoints.load_weights("hf:someone/none")


def test_an_export_is_held_to_its_own_record(server, tmp_path):
  files = export_files(tmp_path / "export")
  name = next(name for name in files if "/d/" in name)
  # The hub has another file than the one whose sum was pushed, or none.
  server.put("someone/ours", {**files, name: files[name] + b"x"})
  digest = hashlib.sha256(files[name]).hexdigest()
  with pytest.raises(checkpoints.CheckpointError, match=f"SHA256SUMS beside it says {digest}"):
    checkpoints.load_weights("hf:someone/ours")
  server.put("someone/ours", {n: content for n, content in files.items() if n != name})
  with pytest.raises(checkpoints.CheckpointError, match=f"{name}, which other files name, is not"):
    checkpoints.load_weights("hf:someone/ours")
  # Without the sums its fingerprints tell.
  damaged = json.loads(files["metadata.json"])
  del damaged["checksum"]
  damaged["fingerprints"]["params/head/kernel"] ^= 1
  del files["SHA256SUMS"]
  server.put("someone/ours", {**files, "metadata.json": json.dumps(damaged)})
  with pytest.raises(checkpoints.CheckpointError, match="fingerprint differs"):
    checkpoints.load_weights("hf:someone/ours")


def test_the_command_copies_an_export_and_keeps_where_it_is_from(server, tmp_path, capsys):
  server.put("someone/ours", {"README.md": CARD, **export_files(tmp_path / "export", results={})})
  out = tmp_path / "out"
  said = ["--from=hf:someone/ours", f"--to={out}"]
  assert import_weights.main([*said, "--num_classes=3"]) == 1
  assert "--num_classes: hf:someone/ours is an export of this package" in capsys.readouterr().err
  assert import_weights.main([*said, "--arch=moat_0"]) == 1
  assert "someone/ours holds weights of tiny_moat_0, not of moat_0" in capsys.readouterr().err
  assert not out.exists()
  assert import_weights.main([*said, "--arch=tiny_moat_0"]) == 0
  printed = capsys.readouterr().out
  assert printed.index("licence apache-2.0") < printed.index("written to")
  weights, metadata = checkpoints.load_weights(out)
  assert weights["params"]["head"]["kernel"].shape == (2, 3)
  commit = server.commit("someone/ours", "main")
  origin = {"repository": "someone/ours", "commit": commit, "licence": "apache-2.0"}
  assert metadata["source"] == origin


def test_without_the_library_the_command_that_installs_it_is_said(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert import_weights.main(["--from=hf:someone/net", f"--to={tmp_path / 'out'}"]) == 1
  message = "needs huggingface_hub, which is not installed: pip install -e '.[hub]'"
  assert message in capsys.readouterr().err
  with pytest.raises(checkpoints.CheckpointError, match="pip install"):
    checkpoints.load_weights("hf:someone/net")
  with pytest.raises(ValueError, match="pip install"):
    starting._initial_weights(None, "hf:someone/net")
  # Nothing else asks for it.
  assert hub.local(tmp_path) == str(tmp_path)


@pytest.mark.slow
def test_a_network_by_its_address_its_name_and_with_another_head(
  server, monkeypatch, tmp_path, capsys
):
  model = create_model("tiny_moat_0", 10)
  variables = made_variables("tiny_moat_0", 10)
  content = io.BytesIO()
  np.savez(content, **families.export_checkpoint(variables, "tiny_moat_0", model))
  config = json.dumps({"pretrained_cfg": {"mean": [0.5, 0.25, 0.75]}})
  files = {"README.md": CARD, "config.json": config, "weights.npz": content.getvalue()}
  server.put("someone/net", files)
  network = stored.load_network("hf:someone/net", "tiny_moat_0")
  assert network.model == model and network.metadata["source"]["licence"] == "apache-2.0"
  jax.tree.map(np.testing.assert_array_equal, network.variables, variables)
  assert network.preprocessing.mean == (0.5, 0.25, 0.75)
  command = ["--from=hf:someone/net", "--arch=tiny_moat_0", f"--to={tmp_path / 'out'}"]
  assert import_weights.main(command) == 0
  printed = capsys.readouterr().out
  assert "prepared as config.json beside them says: mean (0.5, 0.25, 0.75) ((0.485" in printed
  assert stored.load_network(tmp_path / "out").preprocessing == network.preprocessing
  with pytest.raises(ValueError, match="no copy of tiny_moat_0 on the hub is known"):
    stored.load_network("tiny_moat_0")
  monkeypatch.setattr(stored, "hub_copies", lambda name: ["hf:someone/net", "hf:someone/b"])
  with pytest.raises(ValueError, match="name one: hf:someone/net, hf:someone/b"):
    stored.load_network("tiny_moat_0")
  monkeypatch.setattr(stored, "hub_copies", lambda name: ["hf:someone/net"])
  other = stored.load_network("tiny_moat_0", num_classes=3)
  assert other.num_classes == 3 and other.model == create_model("tiny_moat_0", 3)
  assert other.variables["params"]["head"]["kernel"].shape[-1] == 3


@pytest.mark.slow
def test_the_environment_alone_makes_it_work(server, tmp_path):
  """As a user's shell sets it, in a process of its own: fetched, then found without a network."""
  from huggingface_hub import constants

  server.put("someone/ours", {"README.md": CARD, **export_files(tmp_path / "export")})
  out = tmp_path / "out"
  command = [sys.executable, "-m", "hybrid_vit.tools.import_weights", "--from=hf:someone/ours"]
  environment = {
    **os.environ,
    "HF_ENDPOINT": constants.ENDPOINT,
    "HF_HOME": str(tmp_path / "home"),
    "JAX_PLATFORMS": "cpu",
  }

  def run(**more):
    return subprocess.run(
      [*command, f"--to={out}"], env={**environment, **more}, capture_output=True, text=True
    )

  first = run(HF_HUB_OFFLINE="1")
  assert first.returncode == 1 and "is not in the cache" in first.stderr
  assert run().returncode == 0 and out.exists()
  nowhere = run(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
  assert nowhere.returncode == 0 and "what is cached is taken" in nowhere.stdout
