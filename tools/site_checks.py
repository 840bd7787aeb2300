"""Checks of the finished site that need no browser."""

import html
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import site_reference as reference

USED = (
    "__call__ from_pretrained save_pretrained fit embed embed_genes pretrain finetune perturb transfer predict evaluate"
)
PACKAGES = ("geneformer", "scgpt", "scgenept", "rosa", "data", "crossfit")
PLAIN = re.compile(r"<(script|style|pre|code|math)\b.*?</\1>|<[^>]+>", re.S)


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
                broken.append(f"broken link: {path.relative_to(site)} -> {link}")
    return sorted(set(broken))


def raw_text(site: Path) -> list[str]:
    "Pages with raw formulas or marks, or with prompts of a notebook."
    found = []
    for path in sorted(site.rglob("*.html")):
        text = PLAIN.sub(" ", path.read_text(encoding="utf8"))
        found += [f"{path.relative_to(site)} shows {mark!r}" for mark in ("$$", "In [", "xKEPTx") if mark in text]
    return found


def summaries(pages: list) -> list[str]:
    "Documented objects and pages whose first paragraph does not end a sentence."
    found = []
    for page in pages:
        opening = next((cell.source for cell in page.notebook.cells if cell.cell_type == "markdown"), "")
        quoted = re.search(r"^> (.+?)(?=\n\n|\Z)", opening, flags=re.M | re.S)
        if quoted and not quoted[1].strip().endswith((".", "?", "!")):
            found.append(f"{page.path}: the summary ends in the middle: {quoted[1]!r}")
        for shown in [each for entry in page.entries for each in (entry, *entry.methods)]:
            first = reference.words_of(shown).split("\n\n")[0]
            if not first:
                found.append(f"{page.path}: `{shown.name}` has no docstring")
            elif not first.endswith((".", "?", "!", ":", "::", ")")):
                found.append(f"{page.path}: the summary of `{shown.name}` ends without a full stop")
    return found


def public_methods(page) -> list[reference.Entry]:
    "The public methods of every public class that the module of a page defines, documented or not."
    if not page.module:
        return []
    module = reference.module_of(page.module)
    found = [getattr(module, name) for name in module.__all__]
    classes = [each for each in found if isinstance(each, type) and each.__module__ == module.__name__]
    return [
        reference.Entry(f"{cls.__name__}.{name}", method)
        for cls in classes
        if not cls.__name__.startswith("_")
        for name, method in reference.own_methods(cls)
    ]


def missing_methods(site: Path, pages: list) -> list[str]:
    "Public methods that the page of their class does not show with all their parameters."
    found = []
    for page in pages:
        text = (site / page.html).read_text(encoding="utf8")
        for method in public_methods(page):
            start = text.find(f'id="{method.anchor}"')
            part = html.unescape(re.sub(r"<[^>]+>", "", text[start : text.find("<h", start + 1)])) if start >= 0 else ""
            sign = reference.signature(method)
            lacking = [name for name in (sign.parameters if sign else ()) if name not in part]
            if start < 0 or lacking:
                found.append(f"{page.html} lacks `{method.name}` {', '.join(lacking)}".rstrip())
    return found


def missing_examples(pages: list, examples: dict[str, str]) -> list[str]:
    "Methods that users call, of exported classes, for which the site shows no example."
    exported = {name for package in PACKAGES for name in reference.module_of(package).__all__}
    methods = [(page, method) for page in pages for method in public_methods(page)]
    used = [
        (page, m) for page, m in methods if m.name.split(".")[0] in exported and m.name.split(".")[1] in USED.split()
    ]
    return [f"{page.html} has no example of `{method.name}`" for page, method in used if method.name not in examples]
