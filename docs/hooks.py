"""What the documentation site takes from elsewhere: commands, notebooks, pages of the repository.

mkdocs calls the functions ``on_...`` while it builds the site. Pages that live outside ``docs``
are added, links are directed to them, and links to source code, which the site does not have,
become plain text. The Python reference names public objects as ``::: ocelot_em.NAME``; they are
documented where they are defined.
"""

import base64
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

import ocelot_em

logger = logging.getLogger("mkdocs.hooks.ocelot_em")

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docker/README.md": "how-to/containers.md",
    "src/ocelot_em/io/DESIGN.md": "design-io.md",
    "notebooks/01_merge_a_search.ipynb": "tutorials/merge-a-search.md",
    "notebooks/02_particles.ipynb": "tutorials/particles.md",
    "notebooks/03_montage.ipynb": "tutorials/montage.md",
    "notebooks/04_a_search_that_survives.ipynb": "tutorials/a-search-that-survives.md",
    "notebooks/06_two_searches.ipynb": "tutorials/two-searches.md",
    "notebooks/05_masks.ipynb": "tutorials/masks.md",
    "src/ocelot_em/merge/DESIGN.md": "design-merge.md",
    "src/ocelot_em/store/DESIGN.md": "design-store.md",
}
"""Pages of the site by their files outside ``docs``."""

LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```|^~~~.*?^~~~)", re.DOTALL | re.MULTILINE)
EXTERNAL = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?https?:|<link[^>]+stylesheet[^>]+https?:")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings in links as code forges do, so that links work in both places."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live elsewhere in the repository."""
    for name, page in ELSEWHERE.items():
        path = ROOT / name
        if path.suffix == ".ipynb":
            text, pictures = notebook(path, Path(page).stem)
            for picture, content in pictures.items():
                files.append(File.generated(config, f"tutorials/{picture}", content=content))
        else:
            text = path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill in what is generated, and direct links."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    markdown = re.sub(r"^::: ocelot_em\.(\w+)$", _directive, markdown, flags=re.MULTILINE)
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda m: _link(m, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def on_post_page(output: str, *, page: Page, **_: Any) -> str:
    """Warn of pages that load something from another host."""
    if found := EXTERNAL.search(output):
        logger.warning("%s loads something from another host: %s", page.file.src_uri, found[0])
    return output


def _directive(match: re.Match[str]) -> str:
    name = match[1]
    home = ocelot_em._HOME.get(name)
    if home is None:
        return match[0]
    return f"::: ocelot_em.{home}.{name}\n    options:\n      heading: ocelot_em.{name}"


def _link(match: re.Match[str], page: str) -> str:
    """Direct a link of a page; keep only its text if the site does not have the target."""
    mark, text, target = match.groups()
    path, hash_, anchor = target.partition("#")
    source = next((name for name, to in ELSEWHERE.items() if to == page), f"docs/{page}")
    if not path or re.match(r"[a-z]+:", path) or path.endswith(".png"):
        return match[0]
    at = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    to = ELSEWHERE.get(at, at.removeprefix("docs/") if at.startswith("docs/") else "")
    if not to:
        return text
    return f"{mark}[{text}]({posixpath.relpath(to, posixpath.dirname(page))}{hash_}{anchor})"


def notebook(path: Path, stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, with its pictures by name."""
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            lines += [cell.source, ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        for output in cell.get("outputs", ()):
            lines += [_output(output, stem, pictures), ""]
    return "\n".join(lines), pictures


def _output(output: Any, stem: str, pictures: dict[str, bytes]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![output of the cell above]({name})"
    if "xr-wrap" not in data.get("text/html", "xr-wrap"):  # xarray's own needs its style sheet
        table = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        return re.sub(r"<table[^>]*>", "<table>", table).replace("\n", "")
    return f"```text\n{(output.get('text') or data.get('text/plain', '')).rstrip()}\n```"


def commands() -> str:
    """Describe every command of ``ocelot`` from the models of its options, in tables."""
    from cyclopts.docs import generate_markdown_docs

    from ocelot_em.cli.main import app

    text = generate_markdown_docs(app, generate_toc=False, no_root_title=True, heading_level=2)
    text = text.replace("(#ocelot-install-completion)", "(#ocelot---install-completion)")
    # Options of every command are listed once.
    first, mark, rest = text.partition("**Every command**:\n")
    rest = re.sub(r"\*\*Every command\*\*:\n\n(?:[* ].*\n)*", "", rest)
    return re.sub(r"(?:^\* `.*\n(?:    .*\n)*)+", _table, first + mark + rest, flags=re.MULTILINE)


def _table(items: re.Match[str]) -> str:
    rows = re.findall(r"^\* (`.*?`): (.*\n(?:    .*\n)*)", items[0], flags=re.MULTILINE)
    lines = [f"| {name} | {' '.join(meaning.split())} |" for name, meaning in rows]
    return "\n".join(["| option | meaning |", "|---|---|", *lines, ""])
