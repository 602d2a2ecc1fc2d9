"""Hooks of mkdocs: the site holds pages that lie outside docs/, and says all of Python's public names.

A page's place on the site is its place in the repository without `docs/`; links between pages are rewritten to it.
"""

import ast
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE"]
OUTSIDE += [f"experiments/{name}/README.md" for name in ("lab", "paper", "smollm2", "gemma3")]
OUTSIDE += sorted(
    str(path.relative_to(ROOT))
    for place in ("experiments/*/*.toml", "experiments/*/*.json", "examples/*.*")
    for path in ROOT.glob(place)
)
"""What is on the site beside docs/."""
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)")
_SHOWN = re.compile(r"^::: fedproxy\.([\w.]+)", re.MULTILINE)
_log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Any, config: Any) -> Any:
    for path in OUTSIDE:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri == "api.md":
        check_names(markdown)
    outside = page.file.src_uri in OUTSIDE
    here = posixpath.dirname(page.file.src_uri if outside else f"docs/{page.file.src_uri}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[1]))
        if not (ROOT / target).is_file():
            return link[1]  # mkdocs says that it leads nowhere
        return posixpath.relpath(target.removeprefix("docs/"), here.removeprefix("docs").strip("/") or ".")

    return _LINK.sub(on_site, markdown)


def check_names(page: str) -> None:
    """Warn, which ends the build, of public names that the page leaves out or that have no docstring."""
    tree = ast.parse((ROOT / "src" / "fedproxy" / "__init__.py").read_text())
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    shown = _SHOWN.findall(page)
    for name in public:
        if name not in shown and f"`{name}`" not in page:
            _log.warning("api.md does not show the public name %r", name)
    package = griffe.load("fedproxy", search_paths=[ROOT / "src"])
    for name in shown:
        found = package[name]
        if not (found.final_target if found.is_alias else found).has_docstring:
            _log.warning("the public name %r has no docstring", name)
