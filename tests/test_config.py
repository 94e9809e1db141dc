"""The reader of configurations: nothing unread, nothing misspelt, neighbours named."""

import dataclasses

import ml_collections
import pytest

from hybrid_vit.config import Config, ConfigError, load_config, parse_argument


def config():
  values = ml_collections.ConfigDict()
  values.seed = 3
  values.absent = None
  values.rules = [["a", 1], ["b", 2]]
  values.model = {"name": "moat_0", "arguments": {"widths": (1, 2)}}
  values.data = {"batch_size": 8, "split": "train"}
  return Config(values)


def read_all(c):
  c.seed, c.get("rules"), c.data.batch_size, c.data.get("split"), c.model.name
  c.model.get("arguments").as_dict()


def test_fields_groups_and_defaults():
  c = config()
  assert c.seed == 3 and c.data.batch_size == 8 and c.model.arguments.widths == (1, 2)
  assert c.get("nothing", 5) == 5 and c.get("absent", 5) == 5
  assert "seed" in c and "absent" not in c and "nothing" not in c
  assert c.get("rules") == (["a", 1], ["b", 2])
  assert set(c.model.names()) == {"name", "arguments"}
  assert c.group("nothing").get("x", 1) == 1


def test_everything_read_is_no_error():
  c = config()
  read_all(c)
  c.assert_all_read()


def test_a_required_field_names_the_one_that_is_there():
  with pytest.raises(
    ConfigError, match=r"`config.data.batchsize` is needed.*`config.data.batch_size`"
  ):
    _ = config().data.batchsize


def test_a_field_that_nobody_reads_names_its_neighbour():
  c = config()
  read_all(c)
  c._values["data"]["batch_sise"] = 4
  c.data.get("batch_size")
  with pytest.raises(
    ConfigError,
    match=r"`config.data.batch_sise` is not read.*did you mean `config.data.batch_size`",
  ):
    c.assert_all_read()


def test_a_field_far_from_all_others_gets_the_list():
  c = Config({"a": {"bright": 1, "zzz": 2}})
  _ = c.a.bright
  with pytest.raises(
    ConfigError, match=r"`config.a.zzz`.*what this run reads in `config.a`: bright"
  ):
    c.assert_all_read()


def test_a_group_that_nobody_reads():
  with pytest.raises(ConfigError, match=r"`config.a.b` is not read.*reads nothing in `config.a`"):
    Config({"a": {"b": 1}}).assert_all_read()


def test_a_field_asked_for_with_a_default_counts_as_known():
  c = Config({"warmup_epoch": 5})
  c.get("warmup_epochs", 0)
  with pytest.raises(ConfigError, match=r"did you mean `config.warmup_epochs`"):
    c.assert_all_read()


def test_names_and_the_record_do_not_count_as_read():
  c = Config({"a": {"b": 1}})
  assert c.a.names() == ("b",) and c.resolved() == {"a": {"b": 1}}
  with pytest.raises(ConfigError, match=r"config\.a\.b"):
    c.assert_all_read()


def test_a_value_where_a_group_belongs():
  with pytest.raises(ConfigError, match=r"`config.mesh` is 8; a group of fields was expected"):
    Config({"mesh": 8}).group("mesh")


def test_choices():
  c = Config({"loss": "softmaks"})
  with pytest.raises(ConfigError, match=r"'softmaks'.*not one of softmax, sigmoid.*mean 'softmax'"):
    c.choice("loss", ("softmax", "sigmoid"))
  assert c.choice("other", ("a", "b"), "b") == "b"
  with pytest.raises(ConfigError, match=r"`config.other` is needed"):
    c.choice("other", ("a", "b"))


def test_references_between_fields_are_resolved():
  values = ml_collections.ConfigDict()
  values.size = 4
  values.twice = values.get_ref("size") * 2
  values.size = 5
  assert Config(values).twice == 10


# What follows the colon.


def parse(argument):
  return parse_argument(argument, ("moat_0", "moat_1"), "moat_0", batch_size=512, pe=True, name="x")


@pytest.mark.parametrize(
  ("argument", "variant", "changed"),
  [
    (None, "moat_0", {}),
    ("", "moat_0", {}),
    ("moat_1", "moat_1", {}),
    ("batch_size=64", "moat_0", {"batch_size": 64}),
    (
      "moat_1, batch_size=64,pe=False,name=a=b",
      "moat_1",
      {"batch_size": 64, "pe": False, "name": "a=b"},
    ),
    ("name=None", "moat_0", {"name": None}),
  ],
)
def test_arguments(argument, variant, changed):
  assert parse(argument) == (variant, {"batch_size": 512, "pe": True, "name": "x", **changed})


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("moat_2", "unknown variant 'moat_2'.*did you mean 'moat_"),
    ("zzz", "one of: moat_0, moat_1"),
    ("moat_0,batchsize=3", "unknown key 'batchsize'.*did you mean 'batch_size'"),
    ("batch_size=3,moat_1", "unknown variant 'moat_1'"),
  ],
)
def test_arguments_that_cannot_be(argument, message):
  with pytest.raises(ConfigError, match=message):
    parse(argument)


def test_a_file_is_loaded_with_its_argument(tmp_path):
  (tmp_path / "one.py").write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config(argument='default'):\n  return ConfigDict({'said': argument})\n"
  )
  assert load_config(tmp_path / "one.py", "this").said == "this"
  assert load_config(tmp_path / "one.py").said == "default"
  with pytest.raises(ConfigError, match="no configuration file"):
    load_config(tmp_path / "two.py")


@dataclasses.dataclass(frozen=True)
class Seen:
  scale: tuple[int, ...] | None = (1333, 800)
  divisor: int = 32
  shift: int | None = None


def test_none_is_meant_where_a_field_may_be_none():
  def read(**values):
    return Config({"inference": values}).inference.as_dataclass(Seen)

  assert read(divisor=1) == Seen(divisor=1)
  assert read(scale=None, divisor=None) == Seen(scale=None)
  assert read(scale=(64, 64), shift=2) == Seen((64, 64), 32, 2)


@pytest.mark.parametrize("argument", ["runlocal,size=8", "runlocal_dense,size=8,epochs=2"])
def test_a_local_try_refuses_keys_that_it_would_not_read(argument):
  variants, fields = ("full", "runlocal", "runlocal_dense"), {"size": 224, "epochs": 90}
  with pytest.raises(ConfigError, match=r"with size of its own; after the colon it takes epochs"):
    parse_argument(argument, variants, "full", runlocal_keys=("epochs",), **fields)
  variant, keys = parse_argument(
    "runlocal,epochs=2", variants, "full", runlocal_keys=("epochs",), **fields
  )
  assert (variant, keys) == ("runlocal", {"size": 224, "epochs": 2})
  assert parse_argument("full,size=8", variants, "full", **fields)[1]["size"] == 8


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n  pass\n", r"bad.py, line 1: no Python: "),
    ("x = 1\n\0\n", r"bad.py.*null bytes"),
    ("\n\nimport no_such_module\n", r"bad.py, line 3: ModuleNotFoundError: .*no_such_module"),
    ("def get_config():\n  return {}['a']\n", r"bad.py, line 2: KeyError: 'a'"),
    ("def get_config():\n  return int('b')\n", r"bad.py, line 2: invalid literal"),
    ("def get_confug():\n  pass\n", r"bad.py has no `get_config\(\)`"),
    ("def get_config():\n  pass\n", r"bad.py returns NoneType; a ConfigDict was expected"),
  ],
)
def test_errors_of_a_files_own_code_say_where(tmp_path, text, message):
  (tmp_path / "bad.py").write_text(text)
  with pytest.raises(ConfigError, match=message):
    load_config(tmp_path / "bad.py")
