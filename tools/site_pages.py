"""A notebook as a page of Markdown: prose, code and outputs, with documentation in place of exported code."""

import base64
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import site_reference as reference
from latex2mathml.converter import convert

FENCE = re.compile(
    r"(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*\s*$|`[^`\n]+`)", re.S | re.M
)  # code within text, not changed
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\d\w])", re.S)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Page:
    "A notebook on its way to a page; `kept` are pieces of HTML that replace their marks in the finished page."

    path: Path  # within nbs/
    notebook: nbformat.NotebookNode
    module: str | None = None
    entries: list[reference.Entry] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def html(self) -> str:
        "The address of the page within the site."
        return self.path.with_suffix(".html").as_posix()

    def keep(self, text: str) -> str:
        "A mark that is replaced by a piece of HTML when the page is finished."
        mark = f"xKEPTx{len(self.kept)}x"
        self.kept[mark] = text
        return mark


def directives(cell: nbformat.NotebookNode) -> set[str]:
    "The directives of a cell of code, as they are written."
    return set(re.findall(r"^#\|\s*(.+?)\s*$", cell.source, flags=re.M))


def code_of(cell: nbformat.NotebookNode) -> str:
    "The source code without directives."
    return re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()


def read_page(path: Path, folder: Path) -> Page:
    "Read a notebook and find the objects that it documents."
    page = Page(path, nbformat.read(folder / path, as_version=4))
    for cell in page.notebook.cells:
        for directive in directives(cell) if cell.cell_type == "code" else ():
            if directive.startswith("default_exp"):
                page.module = directive.split()[1]
    if page.module:
        module = reference.module_of(page.module)
        for cell in page.notebook.cells:
            if cell.cell_type == "code" and directives(cell) & {"export", "exports"}:
                found = (reference.entry(module, name) for name in reference.defined_names(code_of(cell)))
                cell.metadata["entries"] = [shown for shown in found if shown]
                page.entries += cell.metadata["entries"]
    return page


def shown_sources(page: Page) -> list[str]:
    "The code that the page shows: cell by cell, then the blocks of Python in its prose."
    hidden = {"export", "exporti", "exports", "hide", "echo: false", "include: false"}
    code = [cell for cell in page.notebook.cells if cell.cell_type == "code" and not directives(cell) & hidden]
    prose = "\n".join(cell.source for cell in page.notebook.cells if cell.cell_type == "markdown")
    return [code_of(cell) for cell in code] + re.findall(r"^```python\n(.*?)^```", prose, flags=re.S | re.M)


def formulas(text: str, page: Page) -> str:
    "Formulas in MathML, which browsers draw without a script; code is not changed."

    def drawn(match: re.Match) -> str:
        display = match[1] is not None
        mathml = convert(" ".join((match[1] or match[2]).split()), display="block" if display else "inline")
        return f"\n\n{page.keep(mathml)}\n\n" if display else page.keep(mathml)

    pieces = FENCE.split(text)
    return "".join(
        piece if number % 3 == 1 else "" if number % 3 == 2 else FORMULA.sub(drawn, piece)
        for number, piece in enumerate(pieces)
    )


def linked(text: str, page: Page, places: dict[str, str]) -> str:
    "Names in code font become links to where they are documented; `places`: page and anchor of each name."
    up = "../" * (len(page.path.parts) - 1)

    def link(match: re.Match) -> str:
        place = places.get(match[1].removesuffix("()"))
        return f"[`{match[1]}`]({up}{place})" if place else match[0]

    pieces = re.split(r"(^ {0,3}(?:`{3,}|~{3,}).*?^ {0,3}(?:`{3,}|~{3,})\s*$|^#+ .*$)", text, flags=re.S | re.M)
    pattern = re.compile(r"(?<![\[`\w])`([A-Za-z_][\w.]*(?:\(\))?)`(?![\]`])")
    return "".join(pattern.sub(link, piece) if number % 2 == 0 else piece for number, piece in enumerate(pieces))


def fenced(text: str, language: str) -> str:
    "A block of code, fenced by more backticks than it holds."
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def outputs(cell: nbformat.NotebookNode, number: int, page: Page) -> Iterator[str]:
    "The outputs of a cell, each in its richest form."
    for index, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if output.output_type == "stream":
            yield page.keep(f'<pre class="output">{html.escape(COLOURS.sub("", output.text).rstrip())}</pre>')
        elif "image/png" in data:
            name = f"picture_{number}_{index}.png"
            page.pictures[name] = base64.b64decode(data["image/png"])
            folder = f"{page.path.stem}_files"
            yield page.keep(f'<p class="output"><img src="{folder}/{name}" alt="{picture_words(page, number)}"></p>')
        elif "text/markdown" in data:
            yield data["text/markdown"]
        elif "text/html" in data:
            clean = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.S)
            yield page.keep(f'<div class="output">{clean}</div>')
        elif "text/plain" in data:
            yield page.keep(f'<pre class="output">{html.escape(COLOURS.sub("", data["text/plain"]).rstrip())}</pre>')


def picture_words(page: Page, number: int) -> str:
    "A description of a picture for those who cannot see it: the last full sentence of the prose before it."
    above = [cell.source for cell in page.notebook.cells[:number] if cell.cell_type == "markdown"]
    prose = re.sub(r"^#.*$|^ {0,3}```.*?```$", "", above[-1] if above else "", flags=re.M | re.S)
    words = " ".join(re.sub(r"[>`*$]|\[|\]\([^)]*\)", "", prose).split())
    sentences = [s for s in re.split(r"(?<=[.:])\s", words) if s.endswith(".")]
    return html.escape(sentences[-1] if sentences else page.path.stem.replace("_", " "), quote=True)


def page_text(page: Page, places: dict[str, str], examples: dict[str, str]) -> str:
    "The Markdown of a page."
    parts = []
    for number, cell in enumerate(page.notebook.cells):
        if cell.cell_type == "markdown":
            prose = re.sub(r"^- skip_\w+: true\n?", "", cell.source, flags=re.M)  # a directive for the exporter
            parts.append(linked(formulas(prose, page), page, places))
        elif cell.cell_type == "code":
            parts += code_parts(cell, number, page, places, examples)
    return "\n\n".join(parts) + "\n"


def code_parts(cell, number: int, page: Page, places: dict, examples: dict) -> Iterator[str]:
    "A cell of code: its documentation if it is exported, else the code and its outputs."
    words = directives(cell)
    if words & {"export", "exports"}:
        for shown in cell.metadata.get("entries", []):
            yield linked(reference.block(shown, examples), page, places)
        return
    if words & {"hide", "exporti", "include: false"} or any(word.startswith("default_exp") for word in words):
        return
    if code_of(cell) and "echo: false" not in words:
        yield fenced(code_of(cell), "python")
    if "output: false" not in words:
        yield from outputs(cell, number, page)


def documented_places(pages: list[Page]) -> dict[str, str]:
    "Page and anchor of every documented name; a short name that two pages have is not linked."
    places, seen = {}, {}
    for page in pages:
        for shown in [each for found in page.entries for each in (found, *found.methods)]:
            place = f"{page.html}#{shown.anchor}"
            dotted = f"scellfm.{page.module}.{shown.name}"
            for name in {shown.name, dotted}:
                seen.setdefault(name, set()).add(place)
                places[name] = place
    return {name: place for name, place in places.items() if len(seen[name]) == 1}
