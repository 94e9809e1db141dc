import functools
import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hybrid_vit import sharding
from hybrid_vit.train_state import create_state, make_train_step
from tests import small

TENSOR_RULES = (
  ("hidden/kernel", (None, "tensor")),
  ("head/kernel", ("tensor", None)),
  (".*", "fsdp"),
)


@pytest.mark.parametrize(
  ("axes", "devices", "shape"),
  [
    ({"data": -1}, 8, (8, 1, 1)),
    ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
    ({"fsdp": 4}, 4, (1, 4, 1)),
    ({}, 1, (1, 1, 1)),
  ],
)
def test_the_free_axis_takes_what_is_left(axes, devices, shape):
  assert sharding.mesh_shape(axes, devices) == shape


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"model": 2}, "unknown mesh axis 'model'; the axes are data, fsdp, tensor"),
    ({"data": -1, "fsdp": -1}, "at most one -1"),
    ({"data": 0}, "positive numbers"),
    ({"data": -1, "fsdp": 3}, r"'data': -1, 'fsdp': 3.* multiple of 3 devices, and 8 are here"),
    ({"data": 2}, "needs 2 devices, and 8 are here"),
  ],
)
def test_meshes_that_cannot_be_are_refused(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.mesh_shape(axes, 8)


def test_axes_are_automatic():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.axis_types == (AxisType.Auto,) * 3


def node_devices(slices, per_slice, processes_per_slice=1):
  """Devices that claim to be of several slices: nodes of GPUs."""
  per_process = per_slice // processes_per_slice
  return [
    types.SimpleNamespace(
      id=i,
      slice_index=i // per_slice,
      process_index=i // per_process,
      platform="gpu",
      device_kind="NVIDIA H100 80GB HBM3",
    )
    for i in range(slices * per_slice)
  ]


@pytest.mark.parametrize(
  ("shape", "slices", "expected"),
  [
    ((2, 4, 1), 2, (2, 1, 1)),  # data alone crosses
    ((8, 1, 1), 2, (2, 1, 1)),
    ((4, 8, 1), 4, (4, 1, 1)),
    ((2, 8, 2), 4, (2, 2, 1)),  # data is too small: fsdp too
    ((1, 16, 2), 4, (1, 4, 1)),
    ((1, 1, 32), 4, (1, 1, 4)),
    ((3, 4, 2), 6, (3, 2, 1)),
  ],
)
def test_the_slow_network_is_crossed_by_data_first(shape, slices, expected):
  assert sharding.across_slices(shape, slices) == expected
  devices = node_devices(slices, math.prod(shape) // slices)
  array = sharding.arrange(shape, devices)
  assert array.shape == shape
  assert sorted(d.id for d in array.flat) == [d.id for d in devices]
  # Along an axis that crosses nothing, all devices are of one slice.
  for axis, crossed in enumerate(expected):
    lines = np.moveaxis(array, axis, -1).reshape(-1, shape[axis])
    assert {len({d.slice_index for d in line}) for line in lines} == {crossed}


def test_meshes_that_do_not_fit_the_slices_are_refused():
  with pytest.raises(ValueError, match=r"mesh \(data 1, fsdp 4, tensor 1\) .* over 3 slices"):
    sharding.arrange((1, 4, 1), node_devices(3, 4))
  with pytest.raises(ValueError) as error:
    sharding.arrange((6, 1, 1), node_devices(2, 4)[:6])
  assert str(error.value) == (
    "slices (nodes) of unequal numbers of devices: {0: 4, 1: 2}; give each of them the same number"
  )


def test_a_mesh_is_made_of_devices_of_several_slices(monkeypatch):
  """What `jax.make_mesh` refuses; also where devices come in no order, and slices are unequal."""
  monkeypatch.setattr(sharding, "Mesh", lambda array, axes, axis_types: array)
  devices = node_devices(4, 2)
  array = sharding.make_mesh({"data": -1, "fsdp": 2}, devices[::-1])
  assert array.shape == (4, 2, 1)
  assert all(len({d.slice_index for d in row.flat}) == 1 for row in array)
  with pytest.raises(ValueError, match=r"^slices \(nodes\) of unequal numbers .*same number$"):
    sharding.make_mesh({"data": -1}, node_devices(2, 4)[1:])
  # One slice alone, and devices that know of none, are laid as one.
  for alone in (node_devices(1, 8), [*map(without_slice, node_devices(1, 8))]):
    assert sharding.make_mesh({"fsdp": -1}, alone).shape == (1, 8, 1)


def without_slice(device):
  return types.SimpleNamespace(**{k: v for k, v in vars(device).items() if k != "slice_index"})


@pytest.mark.parametrize(
  ("shape", "slices", "processes", "parts"),
  [
    ((2, 4, 1), 2, 1, 2),
    ((4, 8, 1), 4, 1, 4),
    ((4, 8, 1), 4, 8, 32),  # a process for each device
    ((2, 2, 8), 4, 2, 4),  # tensor spans the processes of a slice: they read the same rows
  ],
)
def test_each_process_of_several_slices_reads_neighbouring_rows(
  monkeypatch, shape, slices, processes, parts
):
  devices = node_devices(slices, math.prod(shape) // slices, processes)
  array = sharding.arrange(shape, devices)
  for process in {d.process_index for d in devices}:
    part, number = part_of_devices(monkeypatch, array, process)
    rows = {
      i
      for i, line in enumerate(array.reshape(-1, shape[2]))
      if any(d.process_index == process for d in line)
    }
    each = shape[0] * shape[1] // parts
    assert number == parts and rows == set(range(part * each, (part + 1) * each))


def test_host_arrays_are_given_to_the_devices_part_by_part(monkeypatch):
  layout, state = trained(4, 1)
  host = jax.device_get(state.params)
  parts: list[tuple[int, ...]] = []
  make = jax.make_array_from_callback

  def watched(shape, layout, part):
    def taken(index):
      parts.append(part(index).shape)
      assert parts[-1] == layout.shard_shape(shape)
      return part(index)

    return make(shape, layout, taken)

  with monkeypatch.context() as patch:
    # Neither of them is asked: both would compare or gather whole arrays.
    patch.setattr(jax, "device_put", None)
    patch.setattr("jax.experimental.multihost_utils.process_allgather", None)
    patch.setattr(jax, "make_array_from_callback", watched)
    there = sharding.put_tree(host, layout.params)
  # A device of the eight is never given more than its fourth of the matrix [128, 64].
  assert (32, 64) in parts and (128, 64) not in parts
  kernel = there["hidden"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 64)}
  for leaf, wanted, value in zip(*map(jax.tree.leaves, (there, layout.params, host))):
    assert leaf.sharding == wanted
    np.testing.assert_array_equal(leaf, value)
  with pytest.raises(ValueError, match="takes NumPy arrays"):
    sharding.put_tree(there, layout.params)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((3, 3, 64, 128), PartitionSpec(None, None, None, "fsdp")),
    ((256, 128), PartitionSpec("fsdp", None)),
    ((128, 128), PartitionSpec(None, "fsdp")),  # of equal ones the last
    ((129, 64), PartitionSpec(None, "fsdp")),  # the largest is not divisible
    ((129, 65), PartitionSpec()),
    ((64, 8), PartitionSpec()),  # small
  ],
)
def test_the_largest_divisible_dimension_is_split(shape, spec):
  assert sharding.largest_divisible_spec(shape, "fsdp", 4) == spec
  assert sharding.largest_divisible_spec(shape, "fsdp", 1) == PartitionSpec()


@functools.cache
def abstract_state():
  task = small.make_task()
  return jax.eval_shape(
    lambda key: create_state(key, task, small.adamw(task), small.make_batch(), ema=True),
    jax.random.key(0),
  )


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((("kernel", "fsdp"),), "no sharding rule covers parameter 'params/head/bias'"),
    ((("nothing", "fsdp"), (".*", "fsdp")), "rule 'nothing' matches no parameter"),
    (((".*", "full"),), "'full': 'fsdp', 'replicated' or a tuple of axis names"),
    ((("kernel", ("model",)), (".*", "fsdp")), "axes are data, fsdp, tensor"),
    ((("norm/bias", (None, "fsdp")), (".*", "fsdp")), "is longer than the shape"),
    (
      (("conv/kernel", ("tensor",)), (".*", "fsdp")),
      "dimension 0 cannot be split over 2 devices of axis 'tensor'",
    ),
  ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
  mesh = sharding.make_mesh({"data": 4, "tensor": 2})
  with pytest.raises(ValueError, match=message):
    sharding.state_shardings(abstract_state(), rules, mesh)


@functools.cache
def trained(fsdp, tensor, rules=sharding.DEFAULT_RULES):
  """(layout, state after three steps) on a mesh; on one device where both are 1."""
  devices = jax.devices() if fsdp * tensor > 1 else jax.devices()[:1]
  mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp, "tensor": tensor}, devices)
  task = small.make_task()
  optimizer = small.adamw(task)
  make = functools.partial(
    create_state, task=task, optimizer=optimizer, batch=small.make_batch(), ema=True
  )
  layout = sharding.state_shardings(abstract_state(), rules, mesh)
  rows = sharding.batch_sharding(mesh)
  step = jax.jit(
    make_train_step(task, optimizer, small.schedule, ema_decay=0.9),
    in_shardings=(layout, rows),
    out_shardings=(layout, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  state = jax.jit(make, out_shardings=layout)(jax.random.key(0))
  for seed in range(3):
    before = state
    state, report = step(state, sharding.put_batch(small.make_batch(seed=seed), rows))
    # Donated: the old state's memory is the new one's.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert report["gradient_norm"].sharding.is_fully_replicated
  return layout, state


@pytest.mark.parametrize(
  ("fsdp", "tensor", "rules"),
  [
    (1, 1, sharding.DEFAULT_RULES),
    (4, 1, sharding.DEFAULT_RULES),
    (2, 2, TENSOR_RULES),
  ],
  ids=["one", "fsdp", "tensor"],
)
def test_a_sharded_step_is_that_of_one_device(fsdp, tensor, rules):
  layout, state = trained(fsdp, tensor, rules)
  _, expected = trained(1, 1)
  without = lambda s: jax.device_get(s.replace(rng=None))  # noqa: E731
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    without(state),
    without(expected),
  )
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(layout)):
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)


def test_fully_sharded_arrays_lie_in_parts_beside_their_moments_and_averages():
  _, state = trained(4, 1)
  moments = state.opt_state[-1][0]
  for tree in (state.params, moments.mu, moments.nu, state.ema["params"]):
    kernel = tree["hidden"]["kernel"]  # [128, 64]
    assert kernel.sharding.spec == PartitionSpec("fsdp", None)
    assert {s.data.shape for s in kernel.addressable_shards} == {(32, 64)}
    assert tree["hidden"]["bias"].sharding.is_fully_replicated
  assert sharding.shard_bytes(kernel, kernel.sharding) == 32 * 64 * 4


def test_tensor_parallel_layers_keep_their_columns_and_rows():
  _, state = trained(2, 2, TENSOR_RULES)
  hidden, head = (state.params[name]["kernel"] for name in ("hidden", "head"))
  assert {s.data.shape for s in hidden.addressable_shards} == {(128, 32)}
  assert {s.data.shape for s in head.addressable_shards} == {(32, 10)}
  assert state.opt_state[-1][0].mu["hidden"]["kernel"].sharding == hidden.sharding


def test_a_batch_is_split_over_data_and_fsdp():
  layout = sharding.batch_sharding(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
  images = sharding.put_batch(small.make_batch(16), layout)["image"]
  assert images.shape == (16, 8, 8, 3)
  assert {s.data.shape for s in images.addressable_shards} == {(4, 8, 8, 3)}
  with pytest.raises(ValueError, match=r"batch of 10 cannot be split over 4 devices"):
    sharding.put_batch(small.make_batch(10), layout)


@pytest.mark.parametrize(
  ("owners", "fsdp", "expected"),
  [
    ([0, 0, 1, 1], 4, {0: (0, 2), 1: (1, 2)}),
    ([0, 1, 0, 1], 4, {0: (0, 2), 1: (1, 2)}),  # neighbours in the mesh, not in the hosts
    ([1, 1, 0, 0], 4, {0: (1, 2), 1: (0, 2)}),
    ([0, 0, 1, 1], 1, {0: (0, 1), 1: (0, 1)}),  # tensor spans both: the same rows
    ([0, 0, 1, 1, 2, 2, 3, 3], 2, {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
  ],
)
def test_which_rows_a_process_holds(monkeypatch, owners, fsdp, expected):
  for process, part in expected.items():
    assert part_of(monkeypatch, owners, fsdp, process) == part


def test_rows_that_overlap_in_part_are_refused(monkeypatch):
  with pytest.raises(ValueError, match="overlap"):
    part_of(monkeypatch, [0, 0, 0, 1, 1, 1], 3, 0)


def part_of(monkeypatch, owners, fsdp, process):
  """`batch_part` on a mesh of devices that belong to processes `owners`, tensor innermost."""
  devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners])
  return part_of_devices(monkeypatch, devices.reshape(1, fsdp, -1), process)


def part_of_devices(monkeypatch, array, process):
  """`batch_part` of a process on a mesh of devices [data, fsdp, tensor]."""
  monkeypatch.setattr(jax, "process_index", lambda: process)
  tensor = array.shape[2]
  rows = [(device, (slice(i // tensor, i // tensor + 1),)) for i, device in enumerate(array.flat)]
  layout = types.SimpleNamespace(
    mesh=types.SimpleNamespace(shape=dict(zip(sharding.AXES, array.shape))),
    devices_indices_map=lambda shape: types.SimpleNamespace(items=lambda: rows),
  )
  return sharding.batch_part.__wrapped__(layout)
