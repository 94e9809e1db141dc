"""What the README and docs say is so: code runs, links lead somewhere, commands' parts exist."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_vit.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.slow
def test_the_library_example_runs_and_gives_the_shape_beside_it(capsys):
  (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "create_model" in b)
  space: dict = {}
  exec(compile(block, "README.md", "exec"), space)
  said = ast.literal_eval(re.search(r'\["stage4"\]\.shape  # (\(.*?\))', block)[1])
  assert space["endpoints"]["stage4"].shape == said
  assert space["logits"].shape == (2, 10)
  assert "moat_0" in capsys.readouterr().out


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_lead_somewhere(page):
  missing = []
  for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", prose(page)):
    place = page.parent / target if target else page
    if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
      missing.append(f"{target}#{anchor}")
  assert not missing, missing


@each_page
def test_commands_name_modules_and_configurations_that_exist(page):
  text = page.read_text()
  for module in set(re.findall(r"python -m (hybrid_vit[\w.]*)", text)):
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
  for path in set(re.findall(r"--config=(configs/\w+\.py)", text)):
    assert (ROOT / path).is_file(), path


@each_page
def test_commands_have_variants_keys_and_options_that_exist(page):
  for command in commands(page):
    script, options = what_it_runs(command)
    known = source_of(script)
    for option in options:
      name, _, value = option.removeprefix("--").partition("=")
      if name.startswith("config."):
        assert set(name.split(".")) - {"config"} <= words_of_the_code(), option
      elif name == "config" and value.startswith("configs/"):
        file, _, argument = value.partition(":")
        loads(file, argument)
      else:
        assert re.search(rf"[\"'\s]-?-?{name}[\"'=)\s]", known), f"{option} of {script}"


@pytest.mark.parametrize(
  "page", sorted((ROOT / "docs/howto").glob("from_*.md")), ids=lambda p: p.stem
)
def test_fields_in_tables_are_read_somewhere(page):
  rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
  fields = {
    name
    for row in rows
    for name in re.findall(
      r"`((?:data|model|optimizer|task|checkpoint|evaluation)(?:\.\w+)+)", row[-1]
    )
  }
  assert len(fields) > 10
  unknown = [name for name in fields if not set(name.split(".")[1:]) <= words_of_the_code()]
  assert not unknown, unknown


def test_messages_of_the_troubleshooting_are_those_of_the_code():
  page = (ROOT / "docs/howto/troubleshooting.md").read_text()
  # A message with backticks in it stands between two of them.
  messages = re.findall(r"^> `` (.*) ``$", page, re.M) + re.findall(r"^> `([^`]+)`$", page, re.M)
  assert len(messages) == len(re.findall(r"^> `", page, re.M))
  ours = [message for message in messages if not message.startswith("RESOURCE_EXHAUSTED")]
  assert len(ours) > 30
  said = texts_of_the_code()
  for message in ours:
    # Names and numbers are a run's own; of what is between them every part must be in the code.
    parts = re.split(r"[…;:()]|'[^']*'|`[^`]*`|\[[^]]*\]|\b[\d.,]+\b|[\w/]*/[\w/.]+", message)
    found = [part.strip(" .,:;()") for part in parts if len(part.split()) > 1]
    assert found, message
    for part in found:
      assert part in said, f"{part!r} of {message!r}"


@pytest.mark.parametrize("folder", ["cards", "howto", "api", "results"])
def test_every_page_of_a_folder_is_named_by_its_first_page(folder):
  place = ROOT / "docs" / folder
  first = (place / "README.md").read_text()
  pages = [p for p in place.iterdir() if p.name != "README.md" and p.suffix in ("", ".md")]
  assert pages
  missing = [p.name for p in pages if f"]({p.name}" not in first]
  assert not missing, missing


def prose(page: Path) -> str:
  """The text without blocks of code."""
  return re.sub(r"^( *)```.*?^ *```$", "", page.read_text(), flags=re.S | re.M)


@functools.cache
def anchors(page: Path) -> set[str]:
  """GitHub's, of the headings, and those that are written out."""
  text = prose(page)
  headings = re.findall(r"^#+ (.*)$", text, re.M)
  plain = (re.sub(r"\]\([^)]*\)|[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)
  return {*plain, *re.findall(r'<a id="([^"]+)">', text)}


def commands(page: Path) -> Iterator[list[str]]:
  """The words of each command of the package in the page's blocks of shell."""
  for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
    for line in block.replace("\\\n", " ").splitlines():
      for part in line.split(" && "):
        if "hybrid_vit." in part or part.startswith("launch/"):
          words = shlex.split(part, comments=True)
          if words and not words[0].startswith("pip"):
            yield words


def what_it_runs(command: list[str]) -> tuple[str, list[str]]:
  """The file of a command, and its options; those behind a launcher's "--" are main's."""
  if command[0].startswith("launch/"):
    return command[0], [word for word in command[: command.index("--")] if word.startswith("--")]
  module = command[command.index("-m") + 1]
  return f"{module.replace('.', '/')}.py", [w for w in command if w.startswith("--")]


@functools.cache
def source_of(script: str) -> str:
  """The text of a command, with that of what its subcommands stand in."""
  text = (ROOT / script).read_text()
  if script.endswith("tools/benchmark.py"):
    parts = sorted((ROOT / "hybrid_vit/tools").glob("benchmark_*.py"))
    text += "".join(part.read_text() for part in parts)
  return text


@functools.cache
def loads(path: str, argument: str) -> None:
  load_config(ROOT / path, argument or None)


@functools.cache
def words_of_the_code() -> set[str]:
  texts = (p.read_text() for p in [*ROOT.glob("hybrid_vit/**/*.py"), *ROOT.glob("configs/*.py")])
  return {word for text in texts for word in re.findall(r"\w+", text)}


@functools.cache
def texts_of_the_code() -> str:
  """Every string of the package, formatted ones with their values left out, a line each."""
  found = []
  for path in sorted(ROOT.glob("hybrid_vit/**/*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        found.append(
          "".join(
            getattr(v, "value", "") if isinstance(v, ast.Constant) else "\0" for v in node.values
          )
        )
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return "\n".join(found)
