"""Render the notebooks as a site, and index.ipynb as README.md, without Quarto.

    python tools/build_site.py            write _docs/ and README.md
    python tools/build_site.py --check    write _docs/ only; fail when README.md is out of step with index.ipynb

A page shows its notebook: prose, code and outputs, with documentation in place of exported code. The navigation is the
sidebar of _quarto.yml. Every link and image of the finished site is followed, and every public method must be found:
the build fails otherwise.
"""

import argparse
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path

import site_checks as checks
import site_pages as site
import site_reference as reference
import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob

CONFIG = get_config()
ROOT = CONFIG.config_path
SITE = CONFIG.doc_host + CONFIG.doc_baseurl
NOTEBOOKS = ROOT / "nbs"
PICTURES = Path("nbs") / "index_files"


def navigation(contents: list) -> list:
    "The sidebar of _quarto.yml in the format of mkdocs."
    return [
        {item["section"]: navigation(item["contents"])}
        if isinstance(item, dict)
        else Path(item).with_suffix(".md").as_posix()
        for item in contents
    ]


def listed(contents: list) -> list:
    "Every notebook that the sidebar names, in order."
    return [page for item in contents for page in (listed(item["contents"]) if isinstance(item, dict) else [item])]


def build(pages: Path, out: Path) -> None:
    "Run mkdocs on the pages of Markdown in `pages`."
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config

    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    schemes = {"default": ("slate", "weather-night", "dark"), "slate": ("default", "weather-sunny", "light")}
    settings = {
        "site_name": quarto["title"],
        "site_description": quarto["description"],
        "site_url": SITE + "/",
        "repo_url": quarto["repo-url"],
        "docs_dir": str(pages),
        "site_dir": str(out),
        "use_directory_urls": False,
        "nav": navigation(quarto["sidebar"]["contents"]),
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "navigation.top", "toc.follow", "content.code.copy"],
            "palette": [
                {
                    "scheme": scheme,
                    "primary": "indigo",
                    "toggle": {"icon": f"material/{icon}", "name": f"Switch to {other}"},
                }
                for scheme, (_, icon, other) in schemes.items()
            ],
        },
        "plugins": ["search"],
        "markdown_extensions": [
            "attr_list",
            "tables",
            "sane_lists",
            {"toc": {"permalink": True, "toc_depth": "2-4"}},
            {"pymdownx.highlight": {"anchor_linenums": False}},
            "pymdownx.superfences",
        ],
        "extra_css": ["styles.css"],
    }
    config_file = pages.parent / "mkdocs.yml"
    config_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    mkdocs_build(load_config(str(config_file)))


def finish(out: Path, pages: list[site.Page]) -> None:
    "Replace marks by their formulas and outputs."
    for page in pages:
        path = out / page.html
        text = path.read_text(encoding="utf8")
        for mark, piece in page.kept.items():
            text = text.replace(f"<p>{mark}</p>", piece).replace(mark, piece)
        path.write_text(text, encoding="utf8")
    index = out / "search" / "search_index.json"
    index.write_text(re.sub(r"xKEPTx\d+x", "", index.read_text(encoding="utf8")), encoding="utf8")


def examples_of(pages: list[site.Page]) -> dict[str, str]:
    "An example for each documented method: from its own page, else from a neighbour, else from a tutorial."
    sources = {page.path: site.shown_sources(page) for page in pages}
    tutorials = [cells for path, cells in sources.items() if path.parts[0] == "tutorials" or len(path.parts) == 1]
    found = {}
    for page in pages:
        beside = [cells for path, cells in sources.items() if path.parts[0] == page.path.parts[0] and path != page.path]
        for shown in page.entries:
            owners = reference.heirs(shown.object) if shown.methods else []
            known = [cells for cells in tutorials if any(owner in cell for cell in cells for owner in owners)]
            for method in shown.methods:
                name = method.name.split(".")[1]
                example = reference.find_example(name, owners, [sources[page.path], *beside, *known])
                if example and not isinstance(method.object, property):
                    found[method.name] = example
    return found


def write_pages(pages: list[site.Page], examples: dict[str, str], folder: Path) -> None:
    "The Markdown of every page and its pictures, in `folder`; `examples`: a piece of code for each method."
    places = site.documented_places(pages)
    for page in pages:
        target = folder / page.path.with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        text = site.page_text(page, places, examples)
        target.write_text(text.replace(SITE + "/", "../" * (len(page.path.parts) - 1)), encoding="utf8")
        for name, data in page.pictures.items():
            picture = target.parent / f"{page.path.stem}_files" / name
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(data)
    shutil.copy(NOTEBOOKS / "styles.css", folder / "styles.css")


def readme(path: Path) -> tuple[str, dict[str, bytes]]:
    "README.md and its pictures, made from the index notebook."
    page = site.read_page(path, NOTEBOOKS)
    parts = []
    for number, cell in enumerate(page.notebook.cells):
        parts += [cell.source] if cell.cell_type == "markdown" else site.code_parts(cell, number, page, {}, {})
    text = "\n\n".join(parts)
    for mark, piece in page.kept.items():
        text = text.replace(
            mark, re.sub(r'<p class="output"><img src="(.*?)" alt="(.*?)"></p>', r"![\2](nbs/\1)", piece)
        )
    text = re.sub(r"\]\((?!https?://|#|nbs/)([\w/]+)\.html(#[\w.-]*)?\)", rf"]({SITE}/\1.html\2)", text)
    head = "<!-- Made from nbs/index.ipynb by `make docs`; edit the notebook. -->\n\n"
    return head + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", page.pictures


def stale_readme(text: str, pictures: dict[str, bytes]) -> list[str]:
    "Files among README.md and its pictures that differ from the index notebook."
    current = ROOT / "README.md"
    stale = [] if current.exists() and current.read_text() == text else ["README.md"]
    return stale + [
        name
        for name, data in pictures.items()
        if not (ROOT / PICTURES / name).exists() or (ROOT / PICTURES / name).read_bytes() != data
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sidebar = listed(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    notebooks = sorted(Path(path).relative_to(NOTEBOOKS).as_posix() for path in nbglob(NOTEBOOKS))
    problems = [f"_quarto.yml lists {page}, which does not exist" for page in sidebar if page not in notebooks]
    problems += [f"{page} is missing from the sidebar of _quarto.yml" for page in notebooks if page not in sidebar]
    out, pages = ROOT / "_docs", [site.read_page(Path(page), NOTEBOOKS) for page in notebooks]
    if not problems:
        examples = examples_of(pages)
        with tempfile.TemporaryDirectory() as folder:
            write_pages(pages, examples, Path(folder) / "pages")
            build(Path(folder) / "pages", out)
        finish(out, pages)
        problems += checks.broken_links(out) + checks.raw_text(out) + checks.missing_methods(out, pages)
        problems += checks.summaries(pages) + checks.missing_examples(pages, examples)
    text, pictures = readme(Path("index.ipynb"))
    if check:
        problems += [
            f"{name} is out of step with nbs/index.ipynb: run `make docs`" for name in stale_readme(text, pictures)
        ]
    else:
        (ROOT / "README.md").write_text(text)
        (ROOT / PICTURES).mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            (ROOT / PICTURES / name).write_bytes(data)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(notebooks)} pages in {out.name}/, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
