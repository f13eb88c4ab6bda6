"""
How the documentation is built, without a network:

    python -m sphinx -W --keep-going -b html docs docs/_build/html
    python -m sphinx -W --keep-going -b doctest docs docs/_build/doctest
"""

from pathlib import Path

from kserve_pvc import __version__

project = "kserve_pvc"
version = release = __version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Single backticks in docstrings are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"kserve_pvc {version}"
html_show_copyright = False
html_copy_source = False

# Every page starts with a volume and two sources of its own; no example needs a network.
doctest_test_doctest_blocks = ""
doctest_global_setup = f"""
import os, shutil, subprocess, sys
from pathlib import Path
from tempfile import mkdtemp

for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
    del os.environ[name]
examples = Path({str(Path(__file__).parent / "examples")!r})
work = Path(mkdtemp(prefix="kserve-pvc-docs-"))
volume = work / "volume"
volume.mkdir()
source = work / "line"
source.mkdir()
(source / "model.json").write_text('{{"slope": 2, "intercept": 1}}')
(source / "notes").mkdir()
(source / "notes" / "README.txt").write_text("y = slope * x + intercept")
uri = f"file://{{source}}"
"""
doctest_global_cleanup = "shutil.rmtree(work)"
