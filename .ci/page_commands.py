"""Prints a page's commands as a script of bash: blocks of bash and Python but those of Install."""

import re
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text()
sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
print("set -euo pipefail")
count = 0
for section in sections:
  if section.startswith("Install"):
    continue
  for language, code in re.findall(
    r"^```(bash|python)\n(.*?)^```", section, re.MULTILINE | re.DOTALL
  ):
    count += 1
    print(code if language == "bash" else f"python - <<'END'\n{code}END")
if not count:
  sys.exit(f"{sys.argv[1]} has no commands")
