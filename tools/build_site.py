"""Render the notebooks as a site, and index.ipynb as README.md, without Quarto.

    python tools/build_site.py            write _docs/ and README.md
    python tools/build_site.py --check    write _docs/ only; fail when README.md is out of step with index.ipynb

The pages are the same processed notebooks that Quarto would get (nbdev's `proc_nbs`), the navigation is the sidebar of
_quarto.yml. Every link and image of the finished site is followed: a broken one fails the build.
"""

import argparse
import html
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

CONFIG = get_config()
ROOT = CONFIG.config_path
SITE = CONFIG.doc_host + CONFIG.doc_baseurl
PICTURES = Path("nbs") / "index_files"


def markdown_cell(text: str):
    return nbformat.v4.new_markdown_cell(text)


def plain(cell):
    "A processed cell as a page shows it: documentation as text, hidden cells gone."
    if cell.cell_type == "raw":  # the front matter that nbdev made of the title cell
        front = yaml.safe_load(cell.source.strip().strip("-"))
        return markdown_cell(f"# {front['title']}\n\n> {front.get('description', '')}")
    if cell.cell_type == "markdown":
        return None if cell.source.startswith("<!-- WARNING") else cell
    directives = set(re.findall(r"^#\|\s*(.+)$", cell.source, flags=re.M))
    if "include: false" in directives:
        return None
    if "output: asis" in directives:
        texts = [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
        return markdown_cell(re.sub(r"\)\{[^}]*\}", ")", "\n\n".join(texts))) if texts else None
    if "echo: false" in directives:
        cell.metadata["tags"] = ["hide-input"]
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    return cell


def headings(notebook) -> set[str]:
    "The anchors of the headings of a prepared notebook."
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return {name.lower() for text in texts for name in re.findall(r"^#+ `?\[?`?([\w.]+)", text, flags=re.M)}


def relative(text: str, page: Path, documented: dict[str, set[str]]) -> str:
    """Turn links to the published site into links that work from `page` wherever the site lies.

    A name that no page documents, such as that of a private helper, stays a name without a link."""

    def link(match):
        shown, target, anchor = match[1], match[2], match[3].split(".")[0].lower()  # a method's link goes to its class
        known = target not in documented or anchor in documented[target]
        return f"[{shown}]({'../' * (len(page.parts) - 1)}{target}#{anchor})" if known else shown

    text = re.sub(rf"\[(`[^`\]]+`)\]\({re.escape(SITE)}/([\w/]+\.html)#([\w.]+)\)", link, text)
    return text.replace(SITE + "/", "../" * (len(page.parts) - 1))


def shown_notebook(path: Path):
    "A processed notebook with the cells that its page shows."
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [shown for shown in map(plain, notebook.cells) if shown is not None]
    return notebook


def page_notebook(path: Path, page: Path, documented: dict[str, set[str]]):
    "The notebook of one page, ready to be converted; `documented`: the anchors of each page."
    notebook = shown_notebook(path)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = relative(cell.source, page, documented)
            cell.source = re.sub(r"^#+ .*$", lambda m: m[0].replace("`", ""), text, flags=re.M)
    return notebook


def unique_headings(page: Path) -> None:
    "Number the headings of one page that have the same name, as its table of contents does."
    seen = {}

    def numbered(match):
        count = seen[match[2]] = seen.get(match[2], -1) + 1
        return f'{match[1]}{match[2]}_{count}"' if count else match[0]

    page.write_text(re.sub(r'(<h[1-6] id=")([^"]+)"', numbered, page.read_text(encoding="utf8")), encoding="utf8")


def navigation(contents: list) -> list:
    "The sidebar of _quarto.yml in the words of mkdocs."
    return [{item["section"]: navigation(item["contents"])} if isinstance(item, dict) else item for item in contents]


def listed(contents: list) -> list:
    "Every notebook that the sidebar names, in order."
    return [page for item in contents for page in (listed(item["contents"]) if isinstance(item, dict) else [item])]


def build(pages: Path, out: Path) -> None:
    "mkdocs on the prepared notebooks in `pages`."
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config

    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    settings = {
        "site_name": quarto["title"],
        "site_description": quarto["description"],
        "repo_url": quarto["repo-url"],
        "docs_dir": str(pages),
        "site_dir": str(out),
        "use_directory_urls": False,
        "nav": navigation(quarto["sidebar"]["contents"]),
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "navigation.top", "toc.follow"],
            "palette": {"primary": "indigo"},
        },
        "plugins": [
            "search",
            {
                "mkdocs-jupyter": {
                    "execute": False,
                    "include_source": False,
                    "ignore_h1_titles": False,
                    "remove_tag_config": {"remove_input_tags": ["hide-input"]},
                }
            },
        ],
        "extra_css": ["styles.css"],
    }
    config_file = pages.parent / "mkdocs.yml"
    config_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    mkdocs_build(load_config(str(config_file)))
    for page in out.rglob("*.html"):
        unique_headings(page)


def readme(path: Path) -> tuple[str, dict[str, bytes]]:
    "README.md and the pictures that it shows, made of the index notebook."
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExtractOutputPreprocessor, TagRemovePreprocessor

    exporter = MarkdownExporter()
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"hide-input"}), enabled=True)
    exporter.register_preprocessor(
        ExtractOutputPreprocessor(output_filename_template="picture_{cell_index}_{index}{extension}"), enabled=True
    )
    notebook = page_notebook(path, Path("index.ipynb"), {})
    text, resources = exporter.from_notebook_node(notebook)
    pictures = {Path(name).name: data for name, data in resources.get("outputs", {}).items() if name.endswith(".png")}
    text = re.sub(r"!\[png\]\(([^)]+)\)", lambda m: f"![]({(PICTURES / Path(m[1]).name).as_posix()})", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"\]\((?!https?://|#|nbs/)([\w/]+)\.html(#[\w-]*)?\)", rf"]({SITE}/\1.html\2)", text)
    head = "<!-- Made from nbs/index.ipynb by `make docs`; edit the notebook. -->\n\n"
    return head + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", pictures


def stale_readme(text: str, pictures: dict[str, bytes]) -> list[str]:
    "What differs between README.md (and its pictures) and the index notebook."
    current = ROOT / "README.md"
    stale = [] if current.exists() and current.read_text() == text else ["README.md"]
    return stale + [
        name
        for name, data in pictures.items()
        if not (ROOT / PICTURES / name).exists() or (ROOT / PICTURES / name).read_bytes() != data
    ]


def broken_links(site: Path) -> list[str]:
    "Links and images of the site that lead nowhere."
    pages = {path: path.read_text(encoding="utf8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        for link in re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            url = urlparse(html.unescape(link))
            if url.scheme or url.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(url.fragment)
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append(f"{path.relative_to(site)} -> {link}")
    return sorted(set(broken))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    processed = Path(proc_nbs(n_workers=0, force=True))
    sidebar = listed(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    notebooks = sorted(str(p.relative_to(processed)) for p in processed.rglob("*.ipynb"))
    problems = [f"_quarto.yml lists {page}, which does not exist" for page in sidebar if page not in notebooks]
    problems += [f"{page} is missing from the sidebar of _quarto.yml" for page in notebooks if page not in sidebar]
    out = ROOT / "_docs"
    if not problems:
        with tempfile.TemporaryDirectory() as folder:
            pages = Path(folder) / "pages"
            documented = {
                str(Path(page).with_suffix(".html")): headings(shown_notebook(processed / page)) for page in notebooks
            }
            for page in map(Path, notebooks):
                (pages / page).parent.mkdir(parents=True, exist_ok=True)
                nbformat.write(page_notebook(processed / page, page, documented), pages / page)
            shutil.copy(ROOT / "nbs" / "styles.css", pages / "styles.css")
            build(pages, out)
        problems += [f"broken link: {link}" for link in broken_links(out)]
    text, pictures = readme(processed / "index.ipynb")
    if check:
        problems += [
            f"{name} is out of step with nbs/index.ipynb: run `make docs`" for name in stale_readme(text, pictures)
        ]
    else:
        (ROOT / "README.md").write_text(text)
        (ROOT / PICTURES).mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            (ROOT / PICTURES / name).write_bytes(data)
    shutil.rmtree(processed)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(notebooks)} pages in {out.name}/, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
