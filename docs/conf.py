"""Settings of the documentation's site: `make docs` builds docs/ into build/docs with Sphinx."""

from importlib.metadata import version as version_of

project = "sorted_ds"
author = "the sorted_ds developers"
version = release = version_of("sorted-ds")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

# Anchors are made as GitHub makes them, so that a link works on the site and in the repository.
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # generated pages may begin below level 2

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autoclass_content = "both"

html_theme = "furo"
html_title = "sorted_ds"
html_show_copyright = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
