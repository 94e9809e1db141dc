"""Cycles summed over a program's text; compiling for a TPU where libtpu is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from hybrid_vit import tpu_topology
from hybrid_vit.tools import tpu_memory

_PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[8])->f32[8]}

%fused (p: f32[8]) -> f32[8] {
  ROOT %sine.1 = f32[8]{0} sine(%p)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/net/block/sin"}, backend_config={"estimated_cycles":"10","a":"b"}
  %sort.1 = (f32[8]{0}, s32[8]{0}) sort(%f.1, %i), dimensions={0}
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5)
  ROOT %lt.3 = pred[]{:T(512)} compare(%get-tuple-element.26, %constant.3), direction=LT
}

%open (s: (s32[], f32[8])) -> pred[] {
  ROOT %get.1 = pred[] get-tuple-element(%s), index=0
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %n.1 = f32[8]{0} negate(%p), metadata={op_name="jit(f)/net/cheap"}, backend_config={"estimated_cycles":"1"}
}

%dear (p: f32[8]) -> f32[8] {
  ROOT %n.2 = f32[8]{0} negate(%p), metadata={op_name="jit(f)/net/dear"}, backend_config={"estimated_cycles":"7"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%open, body=%body
  %if.1 = f32[8]{0} conditional(%c, %p, %p), branch_computations={%cheap, %dear}
  ROOT %n.3 = f32[8]{0} negate(%p), metadata={op_name="jit(f)/head/neg"}, backend_config={"estimated_cycles":"100"}
}
"""  # noqa: E501


# A fusion for each kind: what its computation has, or its name, tells it.
_KINDS = """HloModule jit_step

%depthwise (p: f32[8]) -> f32[8] {
  %c.1 = f32[8]{0} convolution(%p, %k), feature_group_count=8, metadata={op_name="jit(step)/jvp(Net)/conv_general_dilated"}
  ROOT %d.1 = f32[8]{0} convolution(%c.1, %k), metadata={op_name="jit(step)/jvp(Net)/dot_general"}
}

%around (p: f32[8]) -> f32[8] {
  ROOT %f.0 = f32[8]{0} fusion(%p), kind=kOutput, calls=%depthwise
}

%dense (p: f32[8]) -> f32[8] {
  ROOT %c.2 = f32[8]{0} convolution(%p, %k), window={size=3x3}, metadata={op_name="jit(step)/jvp(Net)/conv_general_dilated"}
}

%product (p: f32[8]) -> f32[8] {
  ROOT %c.3 = f32[8]{0} convolution(%p, %k), window={size=1x12}, metadata={op_name="jit(step)/jvp(Net)/attention/key/dot_general"}
}

%plain (p: f32[8]) -> f32[8] {
  ROOT %n.0 = f32[8]{0} negate(%p)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %f.1 = f32[8]{0} fusion(%p), kind=kOutput, calls=%around, metadata={op_name="jit(step)/jvp(Net)/norm/mul"}, backend_config={"estimated_cycles":"1"}
  %f.2 = f32[8]{0} fusion(%p), kind=kOutput, calls=%dense, metadata={op_name="jit(step)/jvp(Net)/stem/add"}, backend_config={"estimated_cycles":"2"}
  %f.3 = f32[8]{0} fusion(%p), kind=kOutput, calls=%product, metadata={op_name="jit(step)/jvp(Net)/attention/key/dot_general"}, backend_config={"estimated_cycles":"4"}
  %f.4 = f32[8]{0} fusion(%p), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/transpose(jvp(Net))/block/norm/mul"}, backend_config={"estimated_cycles":"8"}
  %f.5 = f32[8]{0} fusion(%p), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/jvp(Net)/block/attention/exp"}, backend_config={"estimated_cycles":"16"}
  %f.6 = f32[8]{0} fusion(%p), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/jvp(Net)/block/mlp/transpose"}, backend_config={"estimated_cycles":"32"}
  %f.7 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"64"}
  %f.8 = f32[8]{0} fusion(%p), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/mul"}, backend_config={"estimated_cycles":"128"}
  ROOT %f.9 = f32[8]{0} fusion(%p), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/jvp(Net)/block/mlp/erf"}, backend_config={"estimated_cycles":"256"}
}
"""  # noqa: E501


def _needs_libtpu():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install 'jax[tpu]'")


def test_cycles_by_rounds_and_branches():
  found = tpu_topology.estimated_cycles(_PROGRAM)
  # Five rounds and one of the open loop, the dearer branch, and the entry's own.
  assert found.total == 5 * 10 + 10 + 7 + 100
  assert found.by_name == {
    "jit(f)/net/block/sin": 60, "jit(f)/net/dear": 7, "jit(f)/head/neg": 100,
  }  # fmt: skip
  assert found.unknown == {"sort": 6} and found.open_loops == 1
  assert tpu_topology.cycles_by_module(found, 1) == {"head": 100, "net": 67}
  assert tpu_topology.cycles_by_module(found, 2)["net/block"] == 60


def test_cycles_by_kind():
  kinds = tpu_topology.estimated_cycles(_KINDS).by_kind
  assert kinds == {
    "depthwise": 1, "convolutions": 2, "products": 4, "norms": 8, "attention": 16,
    "copies": 32 + 64, "update": 128, "others": 256,
  }  # fmt: skip
  assert set(kinds) == set(tpu_topology.KINDS)
  # Where nothing is differentiated there is no update.
  predicts = tpu_topology.estimated_cycles(
    _KINDS.replace("transpose(jvp(Net))", "Net").replace("jvp(Net)", "Net")
  )
  assert predicts.by_kind == {**{k: v for k, v in kinds.items() if k != "update"}, "others": 384}


def test_a_program_that_does_not_fit():
  def refuse(text):
    def compile_program():
      raise jax.errors.JaxRuntimeError(text)

    return compile_program

  text = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 2.75G."
  )
  found = tpu_topology.examine(refuse(text))
  assert not found.fits and found.peak_bytes == int(18.5 * 2**30)
  text = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(149.06G) exceeds available HBM (15.75G)."
  )
  assert tpu_topology.gibibytes(tpu_topology.examine(refuse(text)).peak_bytes) == 149.06
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    tpu_topology.examine(refuse("INTERNAL: something else"))


def test_what_is_missing_is_said(monkeypatch, capsys):
  monkeypatch.setattr(tpu_topology.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(tpu_topology.TopologyError, match=r"pip install 'jax\[tpu\]'"):
    tpu_topology.topology_devices("v5e:2x2")
  assert tpu_memory.main(["retinanet"]) == 1
  assert "pip install 'jax[tpu]'" in capsys.readouterr().err
  assert tpu_topology.chip_of("v5e:2x2").hbm_bytes == int(15.75 * 2**30)
  with pytest.raises(tpu_topology.TopologyError, match="'v99' is known; there are: v4, v5e"):
    tpu_topology.chip_of("v99:2x2")


def test_compiled_for_a_tpu():
  _needs_libtpu()
  device = tpu_topology.topology_devices("v5e:2x2")[0]

  def products(x):
    return jax.lax.map(lambda row: jnp.sin(row @ row), x)

  shapes = [jax.ShapeDtypeStruct((n, 256, 256), jnp.float32) for n in (3, 6)]
  few, many = (tpu_topology.compile_for(products, x, device=device) for x in shapes)
  assert few.fits and few.argument_bytes == 3 * 256 * 256 * 4
  assert many.peak_bytes > few.peak_bytes > few.argument_bytes
  assert 1.5 < many.cycles.total / few.cycles.total < 2.5
  with pytest.raises(tpu_topology.TopologyError, match="'v5e:3x5x7'"):
    tpu_topology.topology_devices("v5e:3x5x7")
  # A device is a chip, also of those that have two cores.
  for name in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2"):
    assert len(tpu_topology.topology_devices(name)) == tpu_topology.device_count(name) == 4


@pytest.mark.parametrize("name", ["retinanet", "mask2former"])
def test_steps_trace(name):
  step, state, batch = tpu_memory.step_of(name, "tiny_moat_0", (64, 96), 1, remat=True)
  after, _ = jax.eval_shape(step, state, batch)
  # What is donated has the very shapes of what comes out.
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), state
  )


def test_rows_of_earlier_calls_stay(tmp_path):
  found = tpu_topology.Compilation(61.7, True, 3 * 2**30, 2**30, 2**30, 2e12, 3e9)
  refused = tpu_topology.Compilation(5.0, False, 20 * 2**30)
  row = lambda said, rows: tpu_memory.table_row(  # noqa: E731
    said, "dino", "swin_tiny", (800, 1344), rows, False, "v5e:2x2"
  )
  path = tmp_path / "a.b"
  tpu_memory.merge_rows(path, [row(found, 1)])
  tpu_memory.merge_rows(path, [row(refused, 2)])
  tpu_memory.merge_rows(path, [row(found, 1)])
  lines = (tmp_path / "a.b.csv").read_text().splitlines()
  assert len(lines) == 3 and lines[0].startswith("network,backbone,canvas,rows")
  assert lines[1].split(",")[6:9] == ["False", "20.0", "15.75"]
  assert lines[2].split(",")[6:12] == ["True", "3.0", "15.75", "1.0", "1.0", "2.0"]
