"""What several modules of the data raise."""


class MissingDataError(FileNotFoundError):
  """Data that is not there: what was looked for, where, and the command that prepares it."""


class CorruptExampleError(ValueError):
  """A verdict on one example's bytes: they were read, and are no picture or only part of one."""


class CorruptDataError(ValueError):
  """More of the data is corrupt than the configuration allows."""


class DataReadError(OSError):
  """An example that could not be read, however often it was tried; says nothing about its bytes."""
