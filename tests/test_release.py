"""What a release says of itself is so: versions, ranges of dependencies, CI's matrix, forms."""

import configparser
import re
import runpy
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hybrid_vit

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
VERSION = SETUP["metadata"]["version"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
PINS = dict(
  line.split("==")
  for line in (ROOT / "constraints.txt").read_text().splitlines()
  if not line.startswith("#")
)
lowest = runpy.run_path(str(ROOT / ".ci" / "lowest_constraints.py"))["lowest"]


def load(path):
  return yaml.safe_load((ROOT / path).read_text())


def requirements():
  """Those that CI installs."""
  lines = (
    SETUP["options"]["install_requires"] + SETUP["options.extras_require"]["dev"]
  ).splitlines()
  return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_versions_agree():
  citation = load("CITATION.cff")
  assert hybrid_vit.__version__ == VERSION, "installed anew? (pip install -e .)"
  assert citation["version"] == VERSION
  assert citation["license"] == SETUP["metadata"]["license"]
  assert {"cff-version", "message", "title", "authors"} <= set(citation)
  sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
  assert VERSION in sections


def test_the_lowest_constraints_are_the_lower_bounds():
  expected = {
    f"{r.name}=={next(s.version for s in r.specifier if s.operator == '>=')}"
    for r in requirements()
  }
  found = lowest(ROOT / "setup.cfg")
  assert set(found) == expected and len(found) == len(expected)


def test_a_requirement_without_a_lower_bound_is_named(tmp_path):
  setup = tmp_path / "setup.cfg"
  setup.write_text("[options]\ninstall_requires =\n    jax\n[options.extras_require]\ndev =\n")
  with pytest.raises(ValueError, match="'jax' has no lower bound"):
    lowest(setup)


def test_the_pins_lie_in_the_ranges():
  names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
  for requirement in requirements():
    version = names[re.sub(r"[-_.]+", "-", requirement.name).lower()]
    assert requirement.specifier.contains(version), (requirement, version)


def test_hooks_run_the_pinned_versions():
  (repository,) = load(".pre-commit-config.yaml")["repos"]
  hooks = {hook["id"]: hook for hook in repository["hooks"]}
  assert set(hooks) == {"ruff-format", "ruff-check", "mypy"}
  for hook in hooks.values():
    tool = hook["entry"].split()[0]
    assert hook["additional_dependencies"] == [f"{tool}=={PINS[tool]}"]


def test_ci_tries_every_python_that_is_promised_with_both_ends_of_the_ranges():
  matrix = load(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
  assert matrix["python"] == PYTHONS
  assert SETUP["options"]["python_requires"] == f">={PYTHONS[0]}"
  assert set(matrix["dependencies"]) == {"lowest", "newest"}
  script = (ROOT / ".ci" / "run").read_text()
  for choice in [*matrix["dependencies"], *(job["dependencies"] for job in matrix["include"])]:
    assert f"    {choice}) constraints=" in script or f"    {choice})\n" in script, choice


def test_the_published_site_is_the_one_that_ci_builds():
  jobs = load(".github/workflows/site.yml")["jobs"]
  lines = [step.get("run", "") for step in jobs["build"]["steps"]]
  install, build = (next(line for line in lines if line.startswith(w)) for w in ("pip", "mkdocs"))
  assert "[docs]" in install and "-c constraints.txt" in install
  assert (
    "mkdocs build --strict" in build and "mkdocs build --strict" in (ROOT / ".ci/run").read_text()
  )
  directory = build.rpartition("--site-dir ")[2]
  uploads = [step["with"] for step in jobs["build"]["steps"] if "upload" in step.get("uses", "")]
  assert uploads == [{"path": directory}]
  assert jobs["deploy"]["needs"] == "build"


def test_the_container_has_extras_that_exist_and_a_user_without_rights():
  text = (ROOT / "Dockerfile").read_text()
  arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.M))
  named = re.findall(r"EXTRA=(\w+)", text + (ROOT / "README.md").read_text())
  assert {arguments["EXTRA"], *named} <= set(SETUP["options.extras_require"])
  assert re.search(r"^FROM python:(\S+)-slim$", text, re.M)[1] in PYTHONS
  assert f"useradd --create-home --uid 1000 {arguments['RUN_AS']}\n" in text
  assert text.index("pip install") < text.index("USER ${RUN_AS}")


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_whole_and_ask_for_what_is_needed(path):
  form = load(path)
  assert {"name", "description", "body"} <= set(form)
  ids = [field["id"] for field in form["body"]]
  assert len(ids) == len(set(ids))
  for field in form["body"]:
    assert field["type"] in ("input", "textarea") and field["attributes"]["label"]
    assert field["validations"] == {"required": True}
  if path.stem != "question":
    doctor = form["body"][ids.index("doctor")]["attributes"]["description"]
    assert "`python -m hybrid_vit.tools.doctor`" in doctor


def test_there_are_forms_for_bugs_weights_and_questions_and_no_blank_one():
  assert [path.stem for path in FORMS] == ["bug", "question", "weights"]
  config = load(".github/ISSUE_TEMPLATE/config.yml")
  assert config["blank_issues_enabled"] is False
  assert all(link["url"].startswith("https://") for link in config["contact_links"])
