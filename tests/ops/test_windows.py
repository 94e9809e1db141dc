import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.windows import merge_windows, partition_windows


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 2), (1, 9)])
@pytest.mark.parametrize("window", [(2, 3), (4, 4), (1, 1)])
def test_merging_undoes_partitioning(size, window):
  x = np.arange(2 * size[0] * size[1] * 3, dtype=np.float32).reshape(2, *size, 3)
  windows, mask = partition_windows(jnp.asarray(x), window)
  np.testing.assert_array_equal(merge_windows(windows, window, size), x)
  divides = size[0] % window[0] == 0 and size[1] % window[1] == 0
  assert (mask is None) == divides
  if mask is not None:
    assert mask.shape == windows.shape[1:3]
    assert mask.any(axis=1).all()
    # The mask marks the cells of the map, in their places, and nothing else.
    np.testing.assert_array_equal(np.asarray(windows)[0][~mask], 0.0)
    assert sorted(np.asarray(windows)[0][mask][:, 0]) == sorted(x[0, :, :, 0].ravel())


def test_windows_go_row_by_row():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  windows, _ = partition_windows(x, (2, 2))
  np.testing.assert_array_equal(windows[0, 1, :, 0], [2, 3, 6, 7])
  np.testing.assert_array_equal(windows[0, 2, :, 0], [8, 9, 12, 13])


def test_without_padding_a_window_must_divide_the_map():
  with pytest.raises(ValueError, match="window of 2x3 does not divide a map of 4x4"):
    partition_windows(jnp.zeros((1, 4, 4, 1)), (2, 3), pad=False)
