import importlib.metadata

import jax
import pytest

from hybrid_vit.tools import doctor


@pytest.mark.slow
def test_a_sound_installation_is_sound(capsys):
  assert doctor.main([]) == 0
  out = capsys.readouterr().out
  assert "BAD" not in out and "all is well" in out
  for part in ("Python", "jax", "devices", "computation", "pictures", "checkpoints", "data"):
    assert f"ok  {part}: " in out


def look(part, monkeypatch, answer):
  monkeypatch.setattr(doctor, "_LOOKS", {part: answer})
  return {finding.part: finding for finding in doctor.examine()}[part]


def test_a_broken_part_is_named_and_hides_no_other(monkeypatch, capsys):
  def broken():
    raise RuntimeError("no such library")

  monkeypatch.setattr(doctor, "_LOOKS", {"pictures": broken, "data": doctor._data})
  assert doctor.main([]) == 1
  out = capsys.readouterr().out
  assert "BAD pictures: RuntimeError: no such library" in out
  assert "ok  data: 1437 embedded digits" in out


def test_a_version_outside_the_range_says_which_one_to_install(monkeypatch):
  found = importlib.metadata.version
  monkeypatch.setattr(
    importlib.metadata, "version", lambda name: "0.4.30" if name == "jax" else found(name)
  )
  finding = {f.part: f for f in doctor._packages()}["jax"]
  assert not finding.good and finding.text.startswith("0.4.30; ")
  assert "pip install 'jax<0.12,>=0.10'" in finding.text


def test_an_accelerator_that_jax_does_not_see(monkeypatch):
  if jax.default_backend() != "cpu":
    pytest.skip("JAX sees the accelerator of this machine")
  monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
  finding = look("devices", monkeypatch, doctor._devices)
  assert not finding.good and "pip install 'hybrid_vit[cuda]'" in finding.text


def test_no_home_is_needed(monkeypatch):
  """As in a container under a number that no one has a name for."""

  def unknown(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr("pwd.getpwuid", unknown)
  for part in ("machine", "pictures", "checkpoints", "data"):
    finding = look(part, monkeypatch, getattr(doctor, f"_{part}"))
    assert finding.good, finding
