"""Small tars of image–text pairs that the tests write for themselves."""

import io
import json
import tarfile

from tests.data.pictures import encoded, photo


def pair(number, **json_fields):
  """The members of one example."""
  members = {"jpg": encoded(photo(number, 20, 24)), "txt": f"picture number {number}".encode()}
  return members | ({"json": json.dumps(json_fields).encode()} if json_fields else {})


def write_tar(path, examples, format=tarfile.USTAR_FORMAT):
  """{key: {extension: bytes}} → a tar."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=format) as tar:
    for key, members in examples.items():
      for extension, data in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  return path
