"""What several sources raise."""


class MissingDataError(FileNotFoundError):
  """Data that is not there: what was looked for, where, and the command that prepares it."""
