"""TFDS data sets in either format, and the tool that makes them."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from hybrid_vit.data import tfds_source
from hybrid_vit.data import tfrecord as tfrecord_module
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.tfrecord import (
  TfRecordError,
  TfRecordShards,
  crc32c,
  read_records,
)
from hybrid_vit.tools import prepare_data
from tests.data.pictures import (
  as_tfrecord,
  crc32c_bit_by_bit,
  encoded,
  photo,
  tfrecord,
  write_folder,
  write_zip,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """pets/1.0.0 with 15 + 5 pictures: "folder", "new" (ArrayRecord), "old" (TFRecord in shards)."""
  root = tmp_path_factory.mktemp("tfds")
  folder = write_folder(
    root / "folder", {"train/cat": 8, "train/dog": 7, "val/cat": 2, "val/dog": 3}
  )
  prepare_data.store_pictures(f"folder:{folder}", root / "new" / "pets" / "1.0.0")
  as_tfrecord(
    root / "new" / "pets" / "1.0.0", root / "old" / "pets" / "1.0.0", {"train": 4, "validation": 1}
  )
  return root


def contents(source):
  return [(source[i]["image"], source[i]["label"]) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["new", "old"])
def test_it_holds_what_the_folder_holds(data, kind):
  for split, count in (("train", 15), ("validation", 5)):
    source = create_source("tfds:pets", split, str(data / kind))
    folder = create_source(f"folder:{data / 'folder'}", split)
    assert len(source) == count and source.info == folder.info == {"class_names": ("cat", "dog")}
    assert isinstance(source[0]["image"], bytes) and isinstance(source[0]["label"], int)
    assert sorted(contents(source)) == sorted(contents(folder))
  assert source.describe(3) == "tfds:pets validation #3"


@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.parametrize(
  ("split", "chosen"),
  [
    ("train[:40%]", range(6)),
    ("train[5:11]", range(5, 11)),
    ("train[-2:]", range(13, 15)),
    ("train+validation[:1]", [*range(15), 15]),
  ],
)
def test_tfds_own_slicing(data, kind, split, chosen):
  whole = [
    pair
    for part in ("train", "validation")
    for pair in contents(create_source("tfds:pets", part, str(data / "new")))
  ]
  source = create_source("tfds:pets", split, str(data / kind))
  assert contents(source) == [whole[i] for i in chosen]


def test_where_it_is_looked_for(data, monkeypatch, tmp_path):
  directory = data / "old" / "pets" / "1.0.0"
  assert len(create_source(f"tfds:{directory}", "train")) == 15
  assert len(create_source("tfds:pets:1.0.0", "train", str(data / "old"))) == 15
  monkeypatch.setenv("TFDS_DATA_DIR", str(data / "old"))
  assert len(create_source("tfds:pets", "train")) == 15
  with pytest.raises(MissingDataError, match=r"'pets:2.0.0' was looked for in .*docs/data.md"):
    create_source("tfds:pets:2.0.0", "train", str(data / "old"))
  # What a killed or running command has not finished.
  for name in (".1.0.0.partial.x", "incomplete.x_1.0.0"):
    shutil.copytree(directory, tmp_path / "pets" / name)
  with pytest.raises(MissingDataError, match="is not prepared there"):
    create_source("tfds:pets", "train", str(tmp_path))
  # The newest of several versions.
  for version in ("1.0.0", "10.0.0", "9.0.0"):
    shutil.copytree(directory, tmp_path / "pets" / version)
  for version in ("1.0.0", "9.0.0"):
    (tmp_path / "pets" / version / "features.json").unlink()
  assert len(create_source("tfds:pets", "train", str(tmp_path))) == 15


def test_an_empty_record_is_corrupt(data):
  source = tfds_source.TfdsSource("pets", "train", str(data / "new"))
  source._records = [b""]
  with pytest.raises(CorruptExampleError, match=r"tfds:pets train #0 cannot be decoded"):
    source[0]


def test_captions_nested_as_cocos_and_plain(tmp_path):
  """Features as those of coco_captions, and one of plain strings."""
  import tensorflow_datasets as tfds

  picture = encoded(photo(0))
  features = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
    "caption": tfds.features.Text(),
  }

  def captions(names, example):
    class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version("1.0.0")
      code_path = None

      def _info(self):
        chosen = tfds.features.FeaturesDict({name: features[name] for name in names})
        return tfds.core.DatasetInfo(builder=self, features=chosen)

      def _split_generators(self, dl_manager):
        return {"train": iter([("0", example)])}

      def _generate_examples(self):
        raise NotImplementedError

    data_dir = str(tmp_path / names[-1])
    Pairs(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return create_source("tfds:pairs", "train", data_dir)[0]

  nested = [{"text": "a dög", "id": 1}, {"text": "", "id": 2}, {"text": "one dog", "id": 3}]
  found = captions(("image", "captions"), {"image": io.BytesIO(picture), "captions": nested})
  assert found["captions"] == {"caption": ["a dög", "one dog"]} and found["image"] == picture
  found = captions(("image", "caption"), {"image": io.BytesIO(picture), "caption": " a cat"})
  assert found["captions"] == {"caption": ["a cat"]}


def test_data_sets_of_old_do_not_name_their_format(data, tmp_path):
  directory = tmp_path / "pets" / "1.0.0"
  shutil.copytree(data / "old" / "pets" / "1.0.0", directory)
  info = json.loads((directory / "dataset_info.json").read_text())
  del info["fileFormat"]
  for split in info["splits"]:
    del split["filepathTemplate"]
  (directory / "dataset_info.json").write_text(json.dumps(info))
  source = create_source("tfds:pets", "train", str(tmp_path))
  assert contents(source) == contents(create_source("tfds:pets", "train", str(data / "new")))
  prepare_data.convert_tfrecord(directory, tmp_path / "new" / "1.0.0")
  source = create_source(f"tfds:{tmp_path / 'new' / '1.0.0'}", "train")
  assert contents(source) == contents(create_source("tfds:pets", "train", str(data / "new")))


def test_errors_of_the_source(data, tmp_path):
  with pytest.raises(ValueError, match="no split 'val'; it has: train, validation"):
    create_source("tfds:pets", "val", str(data / "new"))
  directory = tmp_path / "pets" / "1.0.0"
  shutil.copytree(data / "old" / "pets" / "1.0.0", directory)
  info = (directory / "dataset_info.json").read_text()
  (directory / "dataset_info.json").write_text(info.replace('"tfrecord"', '"riegeli"'))
  with pytest.raises(MissingDataError, match="prepared as riegeli, which cannot be read by index"):
    create_source("tfds:pets", "train", str(tmp_path))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 63, 64, 65, 1000, 4096, 5003])
def test_crc32c_is_its_definition(length):
  rng = np.random.default_rng(length)
  data = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
  assert crc32c(data) == crc32c_bit_by_bit(data)
  assert crc32c(b"123456789") == 0xE3069283  # the published check value


def test_records_by_index_over_parts_of_files(tmp_path):
  records = [bytes([i]) * (i * 37 % 11) for i in range(10)]
  (tmp_path / "a").write_bytes(tfrecord(records[:6]))
  (tmp_path / "b").write_bytes(tfrecord(records[6:]))
  shards = TfRecordShards([(tmp_path / "a", 2, 3, 6), (tmp_path / "b", 0, 4, 4)])
  assert [shards[i] for i in range(len(shards))] == records[2:5] + records[6:]
  assert list(read_records(tmp_path / "a")) == records[:6]
  with pytest.raises(IndexError):
    shards[7]
  wrong = TfRecordShards([(tmp_path / "a", 0, 7, 7)])
  with pytest.raises(TfRecordError, match=r"a has 6 records, and dataset_info.json says 7"):
    wrong[0]


def test_it_reads_what_another_writer_wrote(tmp_path):
  event_file_writer = pytest.importorskip("tensorboardX").SummaryWriter(str(tmp_path))
  event_file_writer.add_scalar("loss", 1.5, 3)
  event_file_writer.close()
  (path,) = tmp_path.iterdir()
  records = list(read_records(path))
  assert len(records) >= 2 and any(b"loss" in record for record in records)


@pytest.mark.parametrize(
  ("place", "message"),
  [
    (0, "the length of record 0 does not fit its checksum|does not end within"),
    (9, "the length of record 0 does not fit its checksum"),
    (20, "record 0 does not fit its checksum: its bytes changed"),
    (-1, "record 1 does not fit its checksum: its bytes changed"),
    (None, "record 1, which begins at byte 116, does not end within the file's 230 bytes"),
  ],
)
def test_damaged_files_are_named(tmp_path, place, message):
  raw = bytearray(tfrecord([b"a" * 100, b"b" * 100]))
  if place is None:
    raw = raw[:-2]
  else:
    raw[place] ^= 1
  path = tmp_path / "x.tfrecord"
  path.write_bytes(raw)
  with pytest.raises(TfRecordError, match=message):
    list(read_records(path))


def test_conversion_is_byte_for_byte(data, tmp_path, capsys):
  from array_record.python import array_record_module

  origin, to = data / "old" / "pets" / "1.0.0", tmp_path / "pets" / "1.0.0"
  assert prepare_data.main([f"--from={origin}", f"--to={to}", "--processes=1"]) == 0
  assert f"Use it as tfds:{to}" in capsys.readouterr().out
  files = sorted(to.glob("*array_record*"))
  assert len(files) == 5
  for path in files:
    reader = array_record_module.ArrayRecordReader(str(path))
    assert reader.read_all() == list(
      read_records(origin / path.name.replace("array_record", "tfrecord"))
    )
    assert "group_size:1," in reader.writer_options_string()
  assert not list(to.parent.glob(".*"))  # nothing half-done is left
  for split in ("train[3:]", "validation"):
    assert contents(create_source("tfds:pets", split, str(tmp_path))) == contents(
      create_source("tfds:pets", split, str(data / "new"))
    )


def test_conversion_is_whole_or_absent(data, tmp_path, capsys):
  origin = tmp_path / "old" / "1.0.0"
  shutil.copytree(data / "old" / "pets" / "1.0.0", origin)
  to = tmp_path / "new" / "1.0.0"

  def fails(message):
    assert prepare_data.main([f"--from={origin}", f"--to={to}", "--processes=1"]) == 1
    assert message in capsys.readouterr().err
    assert not to.exists() and not list(to.parent.glob(".*"))

  path = origin / "pets-train.tfrecord-00003-of-00004"
  raw = path.read_bytes()
  path.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
  fails("00003-of-00004: record 0 does not fit its checksum")
  path.write_bytes(raw[:-1])
  fails("cut short")
  whole = list(tfrecord_module.read_records(origin / "pets-train.tfrecord-00002-of-00004"))
  path.write_bytes(tfrecord(whole))
  fails("tfrecord-00003-of-00004 has 4 records, and dataset_info.json says 3")
  path.unlink()
  fails("00003-of-00004 is not there, and dataset_info.json names it")
  (origin / "dataset_info.json").unlink()
  fails("has no dataset_info.json")
  to.mkdir(parents=True)
  assert prepare_data.main([f"--from={origin}", f"--to={to}"]) == 1
  assert "is there already" in capsys.readouterr().err


def test_what_killed_conversions_left_goes_and_what_others_write_stays(data, tmp_path):
  origin, to = data / "old" / "pets" / "1.0.0", tmp_path / "new" / "1.0.0"
  left, other = (to.parent / f".{version}.partial.x" for version in ("1.0.0", "2.0.0"))
  for path in (left, other):
    path.mkdir(parents=True)
    (path / "pets-train.array_record").write_bytes(b"a half")
  with prepare_data._partial(to) as held:
    (held / "mine").write_bytes(b"of another process that writes")
    assert not left.exists()
    prepare_data.convert_tfrecord(origin, to)
    assert (held / "mine").exists()
  assert sorted(to.parent.iterdir()) == [other, to]
  # What a run left that was killed after all was done goes, too, where the next one is refused.
  left.mkdir()
  with pytest.raises(FileExistsError, match="is there already"):
    prepare_data.convert_tfrecord(origin, to)
  assert sorted(to.parent.iterdir()) == [other, to]


ORPHANS = """
import sys, time
from pathlib import Path
from hybrid_vit.tools import prepare_data

def convert(path, new, records):
  print("begun", flush=True)
  time.sleep(600)

if __name__ == "__main__":
  prepare_data._convert_file = convert
  prepare_data.convert_tfrecord(Path(sys.argv[1]), Path(sys.argv[2]), 2)
"""


def test_no_worker_outlives_a_killed_conversion(data, tmp_path):
  (tmp_path / "orphans.py").write_text(ORPHANS)
  arguments = [data / "old" / "pets" / "1.0.0", tmp_path / "new" / "1.0.0"]
  process = subprocess.Popen(
    [sys.executable, tmp_path / "orphans.py", *arguments], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "begun\n"
  process.kill()
  # It ends when the last of those that write to it has ended.
  process.communicate(timeout=120)


def test_what_is_converted_already_says_so(data, tmp_path):
  with pytest.raises(MissingDataError, match="prepared as array_record; tfrecord was expected"):
    prepare_data.convert_tfrecord(data / "new" / "pets" / "1.0.0", tmp_path / "x" / "1.0.0")


def test_pictures_keep_their_automatic_split(tmp_path):
  folder = write_folder(tmp_path / "f", {"cat": 10, "dog": 20})
  path = write_zip(tmp_path / "f.zip", folder)
  to = tmp_path / "data" / "pets" / "1.2.0"
  assert prepare_data.store_pictures(f"zip:{path}", to) == {"train": 27, "validation": 3}
  held_out = create_source("tfds:pets", "validation", str(tmp_path / "data"))
  assert sorted(contents(held_out)) == sorted(
    contents(create_source(f"folder:{folder}", "validation"))
  )
  with pytest.raises(ValueError, match="DATA_DIR/NAME/VERSION was expected"):
    prepare_data.store_pictures(f"zip:{path}", tmp_path / "Pets" / "1.0.0")
  with pytest.raises(ValueError, match="DATA_DIR/NAME/VERSION was expected"):
    prepare_data.store_pictures(f"zip:{path}", tmp_path / "pets" / "new")


PROGRAM = """
import sys
from hybrid_vit import main
from hybrid_vit.tools import prepare_data
from configs.quickstart import get_config
from pathlib import Path

TINY = dict(
  stem_widths=(4, 4), depths=(1,), widths=(8,), block_types=("mbconv",), strides=(1,),
  window_sizes=(None,), position_sizes=(None,),
)

if __name__ == "__main__":
  data, workdir = Path(sys.argv[1]), Path(sys.argv[2])
  old, new = data / "old" / "pets" / "1.0.0", workdir / "data" / "pets" / "1.0.0"
  assert prepare_data.main([f"--from={old}", f"--to={new}", "--processes=2"]) == 0
  config = get_config()
  config.model.arguments.update(**TINY)
  config.data.update(source="tfds:pets", data_dir=str(new.parent.parent), batch_size=5)
  config.total_epochs = 1
  config.optimizer.schedule.warmup_epochs = 0
  main.train(config, workdir / "run")
  assert (workdir / "run" / "metrics.jsonl").read_text()
  assert "tensorflow_datasets" in sys.modules
  assert "tensorflow" not in sys.modules
  print("trained without TensorFlow")
"""


@pytest.mark.slow
def test_converting_and_training_import_no_tensorflow(data, tmp_path):
  script = tmp_path / "program.py"
  script.write_text(PROGRAM)
  result = subprocess.run(
    [sys.executable, str(script), str(data), str(tmp_path)],
    env={**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.stdout.strip().endswith("trained without TensorFlow"), result.stderr


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_named(data, tmp_path, name):
  shutil.copytree(data / "new" / "pets" / "1.0.0", tmp_path / "1.0.0")
  path = tmp_path / "1.0.0" / name
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match=r"describes the TFDS data set in .*1.0.0 .*Get these files"):
    create_source(f"tfds:{tmp_path / '1.0.0'}", "train")


@pytest.mark.parametrize("length", [0, 100_000])
def test_records_that_are_cut_short_are_corrupt_examples(data, tmp_path, length):
  shutil.copytree(data / "new" / "pets" / "1.0.0", tmp_path / "1.0.0")
  (path,) = (tmp_path / "1.0.0").glob("*train.array_record*")
  path.write_bytes(path.read_bytes()[:length][:-10])
  source = create_source(f"tfds:{tmp_path / '1.0.0'}", "train")
  with pytest.raises(CorruptExampleError, match=r"1.0.0 train #3 cannot be decoded"):
    source[3]
