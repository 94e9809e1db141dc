"""The report on a folder with names that would break a page or a formula."""

import csv
import html.parser
import re

import numpy as np
import pytest

from hybrid_vit.tools import report
from tests.tools.test_predict import photo, weights

STRANGE = ["<script>alert(1)<b>", "$\\frac{1}{0$", '猫 & "hund"', "d", "e"]
STRANGE = sorted([*STRANGE, "f", "=1+1"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  root = tmp_path_factory.mktemp("pictures")
  for part, count in (("train", 1), ("val", 2)):
    for number, name in enumerate(STRANGE):
      (root / part / name).mkdir(parents=True)
      for i in range(count):
        photo(root / part / name / f"<b>{i}.png", 40, 50, seed=10 * number + i)
  return root


class Page(html.parser.HTMLParser):
  """Collects tags and what would be fetched."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.sources, self.text = [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [value for key, value in attrs if key in ("src", "href")]

  def handle_data(self, data):
    self.text += data


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_one_page_that_holds_everything(tmp_path, pictures, capsys, loss):
  where = weights(tmp_path / "w", class_names=STRANGE, task_settings={"loss": loss})
  out = tmp_path / "out"
  arguments = [f"--weights={where}", f"--data=folder:{pictures}", f"--output={out}"]
  assert report.main([*arguments, "--bins=5", "--mistakes=4"]) == 0
  said = dict(re.findall(r"(\w+) (\d\.\d{4})", capsys.readouterr().out))
  page = Page((out / "report.html").read_text())
  assert "script" not in page.tags and "b" not in page.tags
  assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
  assert page.tags.count("figure") == 4
  for name in STRANGE:
    assert name in page.text
  assert ("by itself" in page.text) == (loss == "sigmoid") and "in 5 equally wide" in page.text
  rows = list(csv.DictReader((out / "classes.csv").open()))
  assert [row["class"] for row in rows] == STRANGE and {row["pictures"] for row in rows} == {"2"}
  table = list(csv.reader((out / "confusion.csv").open()))
  assert table[0][1:] == STRANGE
  counts = np.array([[int(n) for n in row[1:]] for row in table[1:]])
  assert counts.sum() == 14 and np.trace(counts) / 14 == pytest.approx(
    float(said["top1"]), abs=1e-4
  )
  for name in ("confusion.png", "reliability.png"):
    assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_paragraph(tmp_path, pictures, capsys):
  headless = weights(tmp_path / "n", num_classes=0)
  other = weights(tmp_path / "o", class_names=[*"abcdefg"])
  good = weights(tmp_path / "g", class_names=STRANGE)
  for where, data, more, message in (
    (headless, f"folder:{pictures}", [], "have no classifier"),
    (other, f"folder:{pictures}", [], "the classes of the data"),
    (good, "folder:/not/there", [], "is not there"),
    (good, f"folder:{pictures}", ["--bins=0"], "--bins and --batch_size must be at least 1"),
    (tmp_path, f"folder:{pictures}", [], "no weights in"),
  ):
    arguments = [f"--weights={where}", f"--data={data}", f"--output={tmp_path / 'x'}", *more]
    assert report.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


def test_a_picture_that_cannot_be_read_is_named(tmp_path, pictures, capsys):
  import shutil

  root = tmp_path / "copy"
  shutil.copytree(pictures, root)
  broken = root / "val" / "d" / "broken.png"
  broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
  where = weights(tmp_path / "w", class_names=STRANGE)
  arguments = [f"--weights={where}", f"--data=folder:{root}", f"--output={tmp_path / 'out'}"]
  assert report.main(arguments) == 2
  assert "broken.png" in capsys.readouterr().err
  assert "1 pictures could not be read" in (tmp_path / "out" / "report.html").read_text()


def test_only_a_sets_own_classes_compete(tmp_path):
  from hybrid_vit.inference import Answers
  from hybrid_vit.weights.stored import load_network

  network = load_network(weights(tmp_path / "w", class_names=STRANGE))

  class Two:
    info = {"class_names": tuple(STRANGE), "class_subset": (1, 2)}  # noqa: RUF012

    def __len__(self):
      return 2

    def __getitem__(self, index):
      return {"image": np.zeros((40, 40, 3), np.uint8), "label": index + 1}

    def describe(self, index):
      return f"picture {index}"

  logits = np.array([[9, 2, 1, 0, 0, 0, 0], [9, 2, 1, 0, 0, 0, 0]], np.float32)
  answers = Answers(logits, logits, np.array([1, 2]), np.arange(2), ())
  about = {"title": "two", "facts": {}}
  found = report.write_report(network, Two(), answers, tmp_path / "out", **about)
  assert found["top1"] == 0.5  # 0 without the rule
  source = Two()
  source.info = {"class_names": tuple(STRANGE), "label_sets": ((1,), (2,))}
  with pytest.raises(ValueError, match="pictures of one class each"):
    report.write_report(network, source, answers, tmp_path / "out", **about)
