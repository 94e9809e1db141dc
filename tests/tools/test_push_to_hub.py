"""Weights sent to a stand-in of the hub, and read from there again."""

import dataclasses
import json
import tempfile

import jax
import numpy as np
import pytest
import yaml

import hybrid_vit
from hybrid_vit import checkpoints, model_card, tiny_networks
from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.tools import push_to_hub
from hybrid_vit.weights import stored
from tests import hub_server

huggingface_hub = pytest.importorskip("huggingface_hub")

SMT, ARGUMENTS = "smt_t", tiny_networks.SMT


@pytest.fixture
def server(monkeypatch, tmp_path):
  with hub_server.serving() as (there, address):
    hub_server.use(monkeypatch, address, tmp_path / "cache")
    yield there


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """An export as a training leaves it."""
  directory = tmp_path_factory.mktemp("runs") / "export"
  model = create_model(SMT, 3, **ARGUMENTS)
  images = np.zeros((1, 64, 64, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  preprocessing = dataclasses.replace(model_entry(SMT).preprocessing, image_size=64)
  metadata = {
    "name": SMT,
    "arguments": dict(ARGUMENTS),
    "preprocessing": dataclasses.asdict(preprocessing),
    "task": "classification",
    "task_settings": {"loss": "softmax"},
    "num_classes": 3,
    "class_names": ["daisy", "rose | red", "tulip"],
    "step": 1200,
    "results": {"validation/top1": 0.98333333},
    "weights": "trained here",
    "config": {"model": {"name": SMT}, "data": {"source": "folder:/home/me/secret"}},
    "teacher": {"path": "/home/me/teacher", "name": SMT, "fingerprint": "0" * 16},
  }
  checkpoints.export(directory, dict(variables), metadata)
  return directory


def run(*arguments):
  return push_to_hub.main(list(map(str, arguments)))


def test_what_is_sent_is_read_again_with_all_that_it_says(server, trained, capsys):
  assert run(trained, "me/flowers", "--licence=apache-2.0") == 0
  assert "sent: http://127.0.0.1" in capsys.readouterr().out
  assert "me/flowers" in server.private
  there, back = stored.load_network(trained), hybrid_vit.load_network("hf:me/flowers")
  jax.tree.map(np.testing.assert_array_equal, back.variables, there.variables)
  assert back.model == there.model and back.class_names == there.class_names
  assert back.preprocessing == there.preprocessing
  assert back.metadata["results"] == {"validation/top1": 0.98333333}
  assert back.metadata["source"]["licence"] == "apache-2.0"
  files = server.repositories["me/flowers"]["main"]
  assert not [name for name, content in files.items() if b"/home/me" in content]


def test_what_was_prepared_is_whole_or_as_before_and_may_be_prepared_again(
  trained, tmp_path, monkeypatch
):
  folder = tmp_path / "folder"

  def prepare():
    return push_to_hub.prepare(trained, folder, "me/flowers", licence="mit")

  def sums():
    return (folder / "SHA256SUMS").read_text() if folder.exists() else None

  for _ in range(2):
    before = sums()
    with monkeypatch.context() as killed:
      killed.setattr(push_to_hub, "model_card", lambda *_: (_ for _ in ()).throw(SystemExit))
      with pytest.raises(SystemExit):
        prepare()
    assert sums() == before
    names = prepare()
    assert sorted(names) == sorted(
      path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
  # A kill between the two renames.
  folder.rename(tmp_path / "folder.old")
  assert prepare() and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_stored_weights_with_another_head(trained):
  there = stored.load_network(trained)
  assert stored.load_network(trained, num_classes=3).class_names == there.class_names
  for classes in (7, 0):
    other = stored.load_network(trained, num_classes=classes)
    assert other.num_classes == classes and other.class_names == ()
    assert other.model == create_model(SMT, classes, **ARGUMENTS)
    own = other.variables["params"].pop("head", None)
    assert (own is None) == (classes == 0)
    assert own is None or (own["kernel"].shape[-1] == 7 and np.std(own["kernel"]) > 0)
    trunk = {name: leaf for name, leaf in there.variables["params"].items() if name != "head"}
    jax.tree.map(np.testing.assert_array_equal, other.variables["params"], trunk)
    assert set(other.variables) == {"params", "batch_stats"}


def test_the_card(trained):
  variables, metadata = checkpoints.load_weights(trained)
  card = model_card.model_card("hf:me/flowers", variables, metadata, "apache-2.0")
  _, header, text = card.split("---\n", 2)
  header = yaml.safe_load(header)
  assert header["license"] == "apache-2.0" and header["library_name"] == "hybrid_vit"
  assert header["pipeline_tag"] == "image-classification" and SMT in header["tags"]
  parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  for row in (
    f"| network | `{SMT}` |",
    f"| parameters | {parameters:,} |",
    "| classes | 3: daisy, rose \\| red, tulip |",
    "| weights | trained here, step 1200 |",
    "| image_size | 64 |",
    "| validation/top1 | 0.98333 |",
    'hybrid_vit.load_network("hf:me/flowers")',
  ):
    assert row in text, row
  assert "`depths=" in text
  own = model_card.model_card(
    "hf:me/x", variables, {**metadata, "results": {}}, "For research only"
  )
  header = yaml.safe_load(own.split("---\n", 2)[1])
  assert (header["license"], header["license_name"]) == ("other", "For research only")
  assert "No figures lie beside these weights." in own
  dense = {**metadata, "task": "detection", "task_settings": {"detector": {"name": "mask_rcnn"}}}
  dense = model_card.model_card("hf:me/x", variables, dense, "mit")
  assert f"# {SMT} under mask_rcnn" in dense and 'load_task("hf:me/x")' in dense
  assert "stored.objects(photo)" in dense and "object-detection" in dense
  towers = model_card.model_card("hf:me/x", variables, {**metadata, "text_tower": "t"}, "mit")
  assert f"# {SMT} and t" in towers and "load_clip" in towers


def test_every_task_has_the_hubs_name():
  from hybrid_vit.stored_tasks import DENSE_TASKS
  from hybrid_vit.tasks import registry

  # Not those that tests register.
  modules = set(registry._MODULES)
  own = {name for name, entry in registry._entries().items() if entry.build.__module__ in modules}
  assert own <= set(model_card._PIPELINES)
  assert set(DENSE_TASKS) == set(model_card._METHODS)


def test_a_dry_run_writes_all_of_it_and_sends_nothing(server, trained, tmp_path, capsys):
  out = tmp_path / "out"
  assert run(trained, "me/flowers", "--licence=mit", f"--dry_run={out}") == 0
  printed = capsys.readouterr().out
  assert "README.md" in printed and "nothing was sent" in printed
  assert not server.repositories
  for name in ("README.md", "metadata.json", "SHA256SUMS"):
    assert (out / name).is_file() and name in printed
  stored.load_network(out)
  # Once more in the same place, and not over anything else.
  assert run(trained, "me/flowers", "--licence=mit", f"--dry_run={out}") == 0
  photos = tmp_path / "photos"
  photos.mkdir()
  (photos / "cat.jpg").write_bytes(b"x")
  assert run(trained, "me/flowers", "--licence=mit", f"--dry_run={photos}") == 1
  assert "holds something else" in capsys.readouterr().err
  assert (photos / "cat.jpg").read_bytes() == b"x"


def test_what_is_there_is_not_overwritten_unasked(server, trained, capsys):
  server.put("me/flowers", {"README.md": "mine", "notes.txt": "n", "weights/d/stale": "old"})
  before = dict(server.repositories["me/flowers"]["main"])
  send = [trained, "me/flowers", "--licence=mit"]
  assert run(*send) == 1
  assert "me/flowers holds 3 files in 'main' already" in capsys.readouterr().err
  assert server.repositories["me/flowers"]["main"] == before
  # A branch of their own; the one after it is not new any more.
  assert run(*send, "--revision=v2") == 0
  assert server.repositories["me/flowers"]["main"] == before
  assert stored.load_network("hf:me/flowers@v2").num_classes == 3
  assert run(*send, "--revision=v2") == 1
  assert run(*send, "--overwrite") == 0
  files = server.repositories["me/flowers"]["main"]
  assert files["notes.txt"] == b"n" and files["README.md"] != b"mine"
  assert "weights/d/stale" not in files
  assert stored.load_network("hf:me/flowers").num_classes == 3


def test_what_is_refused(server, trained, tmp_path, capsys):
  weights, metadata = checkpoints.load_weights(trained)
  bought = {
    **metadata,
    "source": {"repository": "a/b", "commit": "0" * 40, "licence": "cc-by-nc-4.0"},
  }
  checkpoints.export(tmp_path / "bought", weights, bought)
  head = {**weights["params"]["head"], "bias": np.full(3, np.nan, np.float32)}
  broken = {**weights, "params": {**weights["params"], "head": head}}
  checkpoints.export(tmp_path / "broken", broken, metadata)
  server.put("me/private", {".gitattributes": ""})
  server.private.add("me/private")
  for arguments, message in [
    ([trained, "me/flowers"], "nothing says under which licence"),
    ([tmp_path / "bought", "me/flowers", "--licence=mit"], "came under cc-by-nc-4.0, which stays"),
    ([tmp_path / "broken", "me/flowers", "--licence=mit"], "first in 'params/head/bias'"),
    ([tmp_path / "none", "me/flowers", "--licence=mit"], "no weights in"),
    ([trained, "me/private", "--licence=mit", "--public"], "is there and private"),
  ]:
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
  assert set(server.repositories) == {"me/private"}
  assert run(tmp_path / "bought", "me/flowers", "--public") == 0
  assert "me/flowers" not in server.private
  assert b"license: cc-by-nc-4.0" in server.repositories["me/flowers"]["main"]["README.md"]
  server.down = True
  assert run(trained, "me/more", "--licence=mit") == 1
  assert "cannot be reached" in capsys.readouterr().err


def test_nothing_of_this_machine_is_sent(server, trained):
  assert run(trained, "me/flowers", "--licence=mit") == 0
  sent = json.loads(server.repositories["me/flowers"]["main"]["metadata.json"])
  for name, content in server.repositories["me/flowers"]["main"].items():
    assert tempfile.gettempdir().encode() not in content, name
  assert sent["config"] == {"model": {"name": SMT}} and "path" not in sent["teacher"]
