"""A picture made smaller by matrix products: its low frequencies alone, or Lanczos's filter.

Both are EfficientTrain's ways to show a network less detail for fewer multiply-adds (Yulin Wang et
al., ICCV 2023, arXiv:2211.09703; TPAMI 2024, arXiv:2405.08768): the first version crops the
spectrum, the second resizes. The matrices depend on the sizes alone and are constants of the
compiled program, so that neither a Fourier transform nor a gather is left in it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Of Lanczos's window, in pixels of the smaller picture; PIL's.
_LANCZOS_SUPPORT = 3.0


def low_frequency_crop(images: jax.Array, size: int) -> jax.Array:
  """Keeps the `size` lowest frequencies of each axis; the mean of a picture stays as it is.

  The frequencies -size/2 … size/2 - 1 of the discrete Fourier transform, scaled, transformed back
  and the real part of it: as the authors' `freq_crop` does it on a square picture. (On another one
  theirs scales by the width alone, so that a constant picture changes; here each axis has its own.)

  The frequency -size/2 comes without its twin, so the inverse is not real. Its imaginary part is
  the same wave on each axis, of rank one, and takes part in the real result by one number for each
  picture and channel.

  Args:
    images: `[B, H, W, C]`.
    size: of both sides of the result, even, at most H and W; equal sides change nothing.

  Returns:
    float32 `[B, size, size, C]`.

  Raises:
    ValueError: an odd size, or one that the picture does not have.
  """
  _check(images, size)
  if size % 2:
    raise ValueError(f"a low-frequency crop of {size} pixels: an even number was expected")
  height, width = images.shape[1:3]
  x = images.astype(jnp.float32)
  if (height, width) == (size, size):
    return x
  rows, columns = _fourier_matrix(height, size), _fourier_matrix(width, size)
  y = _on_both_axes(x, rows.real, columns.real)
  # Of the imaginary parts, s vᵀ on each axis, the product over both axes.
  signs = np.where(np.arange(size) % 2, -1.0, 1.0).astype(np.float32)
  waves = (rows.imag[0], columns.imag[0])
  both = jnp.einsum("h,w,bhwc->bc", *waves, x, precision=jax.lax.Precision.HIGHEST)
  return y - (signs[:, None] * signs)[None, :, :, None] * both[:, None, None]


def low_frequency_crop_reference(images: jax.Array, size: int) -> jax.Array:
  """The same by the Fourier transforms that define it; slower, for reading and for tests."""
  _check(images, size)
  height, width = images.shape[1:3]
  spectrum = jnp.fft.fft2(images.astype(jnp.float32), axes=(1, 2))
  kept = np.fft.ifftshift(np.arange(-size // 2, size // 2))
  spectrum = spectrum[:, kept % height][:, :, kept % width]
  scale = size * size / (height * width)
  return jnp.fft.ifft2(spectrum * scale, axes=(1, 2)).real


def lanczos_resize(images: jax.Array, size: int) -> jax.Array:
  """PIL's Lanczos resize (a window of three, wider where it shrinks), sides to `size`.

  Args:
    images: `[B, H, W, C]`. uint8 ones come back as uint8, rounded and cut after each axis, as PIL
      does it; others as float32, neither rounded nor cut.
    size: of both sides of the result.

  Returns:
    `[B, size, size, C]`, uint8 or float32.

  Raises:
    ValueError: a size below 1, or above the picture's.
  """
  _check(images, size)
  height, width = images.shape[1:3]
  if (height, width) == (size, size):
    return images if images.dtype == jnp.uint8 else images.astype(jnp.float32)
  rows, columns = _lanczos_matrix(height, size), _lanczos_matrix(width, size)
  if images.dtype != jnp.uint8:
    return _on_both_axes(images.astype(jnp.float32), rows, columns)
  x = _on_columns(images.astype(jnp.float32), columns)
  x = _on_rows(_to_bytes(x), rows)
  return _to_bytes(x).astype(jnp.uint8)


def _check(images: jax.Array, size: int) -> None:
  if images.ndim != 4:
    raise ValueError(f"images have shape {list(images.shape)}; [B, H, W, C] was expected")
  height, width = images.shape[1:3]
  if not 1 <= size <= min(height, width):
    raise ValueError(
      f"pictures of {height}x{width} cannot be made {size}x{size}: sides of 1 to "
      f"{min(height, width)} were expected"
    )


def _on_rows(x: jax.Array, matrix: np.ndarray) -> jax.Array:
  return jnp.einsum("ih,bhwc->biwc", matrix, x, precision=jax.lax.Precision.HIGHEST)


def _on_columns(x: jax.Array, matrix: np.ndarray) -> jax.Array:
  return jnp.einsum("jw,bhwc->bhjc", matrix, x, precision=jax.lax.Precision.HIGHEST)


def _on_both_axes(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  return _on_rows(_on_columns(x, columns), rows)


def _to_bytes(x: jax.Array) -> jax.Array:
  # PIL adds a half and cuts off, so a half goes up.
  return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)


@functools.lru_cache(maxsize=64)
def _fourier_matrix(length: int, size: int) -> np.ndarray:
  """complex64 `[size, length]`: transform, keep the lowest, scale, transform back."""
  frequencies = np.arange(-size // 2, size // 2)
  places = np.arange(size)[:, None] / size - np.arange(length)[None] / length
  waves = np.exp(2j * np.pi * frequencies[:, None, None] * places)
  return (waves.sum(0) / length).astype(np.complex64)


@functools.lru_cache(maxsize=64)
def _lanczos_matrix(length: int, size: int) -> np.ndarray:
  """float32 `[size, length]`; a row sums to 1."""
  scale = length / size
  support = _LANCZOS_SUPPORT * max(scale, 1.0)
  matrix = np.zeros((size, length))
  for i in range(size):
    centre = (i + 0.5) * scale
    first = max(int(centre - support + 0.5), 0)
    last = min(int(centre + support + 0.5), length)
    x = (np.arange(first, last) - centre + 0.5) / max(scale, 1.0)
    weights = np.where(np.abs(x) < _LANCZOS_SUPPORT, np.sinc(x) * np.sinc(x / _LANCZOS_SUPPORT), 0)
    matrix[i, first:last] = weights / weights.sum()
  return matrix.astype(np.float32)
