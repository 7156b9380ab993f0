"""README.md as the package index shows it: what it links to lies in the repository, not beside it.

All else stands in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

FILES = "https://github.com/neoxconv/neoxconv/blob/main/"
RELATIVE = re.compile(r"\]\((?!https?://|#)")

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
setup(long_description=RELATIVE.sub(f"]({FILES}", readme), long_description_content_type="text/markdown")
