"""
How the documentation is built, without a network:

    python -m sphinx -W --keep-going -b html docs docs/_build/html

The Python on its pages is run by `tests/test_docs_pages.py`.
"""

from kserve_pvc import __version__

project = "kserve_pvc"
version = release = __version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
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
html_static_path = ["_static"]
html_css_files = ["boxes.css"]

# Consoles are copied without prompts and output, and output is not copied at all.
copybutton_selector = "div:not(.highlight-output) > div.highlight > pre"
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_remove_prompts = True
copybutton_line_continuation_character = "\\"
