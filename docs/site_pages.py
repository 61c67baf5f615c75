"""Pages of the documentation site that are made from other files: a hook of mkdocs.

README.md, CHANGELOG.md and CONTRIBUTING.md lie outside of docs/ and become pages; the API
reference has a page for each package, with what mkdocstrings reads from its modules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Page -> file of the repository's root.
FROM_ROOT = {
    "index.md": "README.md",
    "changes.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
PACKAGES = {
    "rm": "DeScore and other reward models",
    "alignment": "The loops of GRPO and DPO, and rewards",
    "generator": "Wan as a policy",
    "engine": "What surrounds a training step",
    "common": "Records, mathematics and files that all packages use",
}


def generated_pages() -> dict[str, str]:
    """Return the text of every generated page, by its path inside of docs/."""
    pages = {}
    for page, file in FROM_ROOT.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        pages[page] = moved_links(text)
    for package, title in PACKAGES.items():
        pages[f"api/{package}.md"] = api_page(package, title)
    return pages


def moved_links(text: str) -> str:
    """Turn links of a file in the root into links between pages of the site."""
    text = re.sub(r"(\]\(|src=\"|srcset=\")docs/", r"\1", text)
    for page, file in FROM_ROOT.items():
        text = re.sub(rf"\]\((?:\.\./)?{file}", f"]({page}", text)
    return text


def api_page(package: str, title: str) -> str:
    """Write a heading and mkdocstrings' directive for every module of a package."""
    lines = [f"# {package}", "", f"{title}.", ""]
    for path in sorted((ROOT / package).rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("")
        # a package's __init__ holds re-exports of its modules
        if module.name != "__init__":
            lines += [f"::: {'.'.join(module.parts)}", ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (mkdocs calls this)."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links of docs/ to files in the root lead to their pages (mkdocs calls this)."""
    return moved_links(markdown)
