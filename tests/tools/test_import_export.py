import functools
import hashlib
import json

import jax
import numpy as np
import pytest

from hybrid_vit import checkpoints
from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.tools import export_weights, import_weights
from hybrid_vit.weights import families, readers, stored
from tests.weights.test_families import made_variables

MOAT = "tiny_moat_0"


@functools.cache
def official_weights():
  return families.export_checkpoint(made_variables(MOAT, 10), MOAT, create_model(MOAT, 10))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("authors") / "tiny_moat0.npz"
  np.savez(path, **official_weights())
  return path


@pytest.fixture(scope="module")
def imported(file):
  directory = file.parent / "imported"
  assert import_weights.main([f"--arch={MOAT}", f"--from={file}", f"--to={directory}"]) == 0
  return directory


def test_the_import_says_all_that_its_users_must_know(file, imported):
  variables, metadata = checkpoints.load_weights(imported)
  jax.tree.map(np.testing.assert_array_equal, variables, made_variables(MOAT, 10))
  assert metadata["name"] == MOAT and metadata["num_classes"] == 10
  assert metadata["weights"] == "imported" and metadata["arguments"] == {}
  assert (metadata["task"], metadata["task_settings"]) == ("classification", {})
  assert (metadata["class_names"], metadata["step"], metadata["results"]) == ([], None, {})
  assert metadata["preprocessing"]["image_size"] == model_entry(MOAT).preprocessing.image_size
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  assert metadata["source"]["files"] == {"tiny_moat0.npz": digest}
  assert metadata["source"]["layout"] == "official"
  network = stored.load_network(imported)
  assert network.model == create_model(MOAT, 10)
  assert network.preprocessing == model_entry(MOAT).preprocessing


def test_the_command_prints_the_three_lists(file, tmp_path, capsys):
  arguments = [f"--from={file}", f"--to={tmp_path / 'out'}", "--num_classes=3", f"--arch={MOAT}"]
  assert import_weights.main(arguments) == 0
  said = capsys.readouterr().out
  assert "loaded: 359 variables" in said
  assert "initialised anew: 2\n  params/head/bias: moat/logits_head/bias has shape (10,)" in said
  assert "unused in the checkpoint: 0" in said
  assert "SHA-256" in said and f"{MOAT}, 3 classes, layout official" in said
  metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
  assert list(metadata["initialised_anew"]) == ["params/head/bias", "params/head/kernel"]


def test_export_gives_the_file_back(imported, tmp_path, capsys):
  path = tmp_path / "back.safetensors"
  assert export_weights.main([f"--from={imported}", f"--to={path}"]) == 0
  assert f"{len(official_weights())} tensors" in capsys.readouterr().out
  back = readers.read_checkpoint(path).weights
  assert set(back) == set(official_weights())
  for name, value in official_weights().items():
    np.testing.assert_array_equal(back[name], value)


def test_errors_are_one_paragraph_and_leave_nothing(file, imported, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(families, "families", lambda: {"hybrid_vit.models.moat": [MOAT]})
  out = tmp_path / "out"
  weights = {**official_weights(), "moat/more": np.zeros(2)}
  np.savez(tmp_path / "surplus.npz", **weights)
  broken = {k: np.array(v) for k, v in official_weights().items()}
  broken["moat/logits_head/bias"][2:5] = np.nan, np.nan, np.inf
  np.savez(tmp_path / "broken.npz", **broken)
  full = tmp_path / "photos"
  full.mkdir()
  (full / "cat.jpg").write_bytes(b"x")
  for arguments, message in [
    (["--from=none.pth", f"--to={out}"], "none.pth does not exist"),
    ([f"--from={tmp_path}/surplus.npz", f"--to={out}", f"--arch={MOAT}"], "moat/more: no variable"),
    (
      [f"--from={tmp_path}/broken.npz", f"--to={out}", f"--arch={MOAT}"],
      "params/head/bias: moat/logits_head/bias holds 2 NaN and 1 infinite of 10 numbers",
    ),
    (["--from=gs://bucket/w.pth", f"--to={out}"], "in an object store: copy it"),
    ([f"--from={file}", f"--to={full}", f"--arch={MOAT}"], "is no weights; give another --to"),
    ([f"--from={file}", f"--to={out}", "--arch=tiny_moat_9"], "did you mean"),
  ]:
    assert import_weights.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not out.exists() and (full / "cat.jpg").exists()
  for arguments, message in [
    ([f"--from={imported}", f"--to={out}"], "does not end in .safetensors"),
    ([f"--from={tmp_path}", f"--to={out}.safetensors"], "no weights in"),
    ([f"--from={imported}", f"--to={out}.safetensors", "--arch=moat_0"], "weights of tiny_moat_0"),
    ([f"--from={imported}", f"--to={out}.safetensors", "--layout=x"], "no layout 'x'"),
  ]:
    assert export_weights.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not out.with_suffix(".safetensors").exists()


def test_the_architecture_may_be_left_to_the_file(file, tmp_path, monkeypatch):
  names = ["tiny_moat_0", "tiny_moat_0_no_pe"]
  monkeypatch.setattr(families, "families", lambda: {"hybrid_vit.models.moat": names})
  import_weights.import_weights(file, tmp_path / "out")
  assert stored.load_network(tmp_path / "out").name == MOAT


def test_a_file_that_fits_several_networks_asks_which(file, tmp_path, monkeypatch):
  monkeypatch.setattr(families, "identify", lambda weights: ([MOAT, "moat_0"], "moat"))
  with pytest.raises(ValueError, match=r"several networks.*--arch=tiny_moat_0 or --arch=moat_0"):
    import_weights.import_weights(file, tmp_path / "out")


def test_own_arguments_of_the_network_are_kept(tmp_path):
  arguments = {"position_bias": False, "num_classes": 5}
  model = create_model(MOAT, **arguments)
  variables = made_variables("tiny_moat_0_no_pe", 5)
  np.savez(tmp_path / "w.npz", **families.export_checkpoint(variables, MOAT, model))
  said = [f"--from={tmp_path / 'w.npz'}", f"--to={tmp_path / 'out'}", f"--arch={MOAT}"]
  assert import_weights.main([*said, "--argument=position_bias=False"]) == 0
  network = stored.load_network(tmp_path / "out")
  assert network.model == model
  jax.tree.map(np.testing.assert_array_equal, network.variables, variables)
