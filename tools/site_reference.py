"""The documentation of a function or a class on its page: signature, parameters, returned value, methods, examples."""

import ast
import html
import importlib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

WIDTH = 88  # a wider signature has one parameter per line


@dataclass
class Entry:
    "A documented object: its anchor on the page, and the object."

    name: str
    object: object
    methods: list["Entry"] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        "The end of its link."
        return self.name.replace("__", "")


def module_of(name: str) -> ModuleType:
    "The exported module of a page."
    return importlib.import_module(f"scellfm.{name}")


def defined_names(source: str) -> list[str]:
    "The functions and classes that a cell defines; a method that is patched in is `Class.method`."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            patched = any(ast.unparse(decorator).startswith("patch") for decorator in node.decorator_list)
            names.append(f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name)
    return names


def unbound(member: object) -> object:
    "The function behind a class method, a static method or a property."
    member = getattr(member, "__func__", member)
    return member.fget if isinstance(member, property) else getattr(member, "func", member)


def words_of(shown: Entry) -> str:
    "The docstring, also of a property."
    described = shown.object if isinstance(shown.object, property) else unbound(shown.object)
    return inspect.cleandoc(getattr(described, "__doc__", None) or "")


def member(cls: type, name: str) -> object:
    "A member of a class: a property or static method unchanged, a class method bound."
    found = inspect.getattr_static(cls, name)
    plain = isinstance(found, property | staticmethod) or inspect.isfunction(found) or hasattr(found, "func")
    return found if plain else getattr(cls, name)


def own_methods(cls: type) -> Iterator[tuple[str, object]]:
    "The public methods and properties of a class and of its bases in this package."
    seen = set()
    for base in (base for base in cls.__mro__ if base.__module__.startswith("scellfm")):
        for name in vars(base):
            if name in seen or (name.startswith("_") and name != "__call__"):
                continue
            seen.add(name)
            found = member(cls, name)
            if callable(unbound(found)) and not isinstance(found, type):
                yield name, found


def entry(module: ModuleType, name: str) -> Entry | None:
    "The entry of a name on a page; None for private names."
    owner, _, method = name.partition(".")
    if owner.startswith("_") or method.startswith("_") or (not method and name not in module.__all__):
        return None
    if method:
        found = getattr(module, owner, None)
        return None if found is None else Entry(name, member(found, method))
    found = getattr(module, name)
    methods = [Entry(f"{name}.{m}", o) for m, o in own_methods(found)] if isinstance(found, type) else []
    return Entry(name, found, methods)


def annotation(value: object) -> str:
    "A type in short form: the last part of each dotted name."
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", lambda m: m[0] if m[0] in ("np.", "pd.", "ad.") else "", text)


def signature(shown: Entry) -> inspect.Signature | None:
    "The signature without `self`; None for objects without one, such as exceptions."
    function = unbound(shown.object)
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    parameters = list(found.parameters.values())
    bound = "." in shown.name and not isinstance(shown.object, staticmethod)
    return found.replace(parameters=parameters[1:] if bound else parameters)


def called(shown: Entry) -> str:
    "The call of the object in Python; wide signatures have one parameter per line."
    sign = signature(shown)
    owner, _, method = shown.name.partition(".")
    name = owner if method == "__call__" else shown.name
    if isinstance(shown.object, property) or sign is None:
        return name
    parts = []
    kinds = [p.kind for p in sign.parameters.values()]
    for number, parameter in enumerate(sign.parameters.values()):
        first_keyword = parameter.kind == parameter.KEYWORD_ONLY and parameter.KEYWORD_ONLY not in kinds[:number]
        if first_keyword and parameter.VAR_POSITIONAL not in kinds[:number]:
            parts.append("*")
        text = str(parameter.replace(annotation=parameter.empty))
        known = parameter.annotation is not parameter.empty
        head, equals, default = text.partition("=")
        typed = f"{head}: {annotation(parameter.annotation)}" if known else head
        parts.append(f"{typed} = {default}" if equals and known else f"{typed}{equals}{default}")
    back = sign.return_annotation
    arrow = "" if back is sign.empty or isinstance(shown.object, type) else f" -> {annotation(back)}"
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) <= WIDTH or not parts:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"


def cell_text(text: object) -> str:
    "Text that a cell of a Markdown table can hold."
    return " ".join(str(text).split()).replace("|", "\\|")


def comments(function: object) -> dict[str, str]:
    "The comment beside each parameter or field, and under `return` the one at the end of the signature."
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return {}
    node = ast.parse(source).body[0]
    beside = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    if isinstance(node, ast.ClassDef):
        lines = {part.target.id: part.end_lineno for part in node.body if isinstance(part, ast.AnnAssign)}
        start = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
    else:
        lines, start = {}, node if isinstance(node, ast.FunctionDef) else None
    if start:
        every = start.args
        named = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
        lines |= {argument.arg: argument.end_lineno for argument in named if argument}
        last = start.body[0].lineno - 1
        lines["return"] = last if last not in lines.values() else 0
    return {name: beside[line] for name, line in lines.items() if line in beside}


def parameters_table(shown: Entry) -> str:
    "The parameters that have a comment, with types and defaults, and the returned value."
    found, sign, rows = comments(unbound(shown.object)), signature(shown), []
    for name, words in found.items():
        returned = name == "return"
        if not returned and (sign is None or name not in sign.parameters):
            continue
        parameter = None if returned else sign.parameters[name]
        source = sign.return_annotation if returned else parameter.annotation
        kind = "" if source is inspect.Parameter.empty else code(annotation(source))
        default = "" if returned or parameter.default is parameter.empty else code(repr(parameter.default))
        rows.append(f"| {'returns' if returned else code(name)} | {kind} | {default} | {cell_text(words)} |")
    return "\n".join(["| parameter | type | default | what it is |", "|---|---|---|---|", *rows]) if rows else ""


def code(text: str) -> str:
    "Text in code font for a table."
    return f"<code>{html.escape(' '.join(text.split()), quote=False).replace('|', '&#124;')}</code>"


def block(shown: Entry, examples: dict[str, str], level: int = 3) -> str:
    "The Markdown of one entry; `examples`: an example of this site for each method."
    name = shown.name.replace(".__call__", "(...)")
    kind = "class " if isinstance(shown.object, type) else ""
    parts = [f"{'#' * level} {name} {{ #{shown.anchor} }}"]
    parts.append(f"```python {{ .signature }}\n{kind}{called(shown)}\n```")
    parts.append(words_of(shown))
    parts.append(parameters_table(shown))
    if shown.name in examples:
        parts.append(f"Example:\n\n```python\n{examples[shown.name]}\n```")
    parts += [block(method, examples, level + 1) for method in shown.methods]
    return "\n\n".join(part for part in parts if part)


def made_from(owner: str, cells: list[str]) -> set[str]:
    "The variables of a page that are assigned from a class: `name = Owner(...)` or `name = Owner.method(...)`."
    return set(re.findall(rf"^(\w+) = {owner}[.(]", "\n".join(cells), flags=re.M))


def statements_calling(source: str, name: str, variables: set[str] = frozenset()) -> Iterator[str]:
    "The statements of a cell that call a method of this name, or call one of `variables`, as they are written."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return
    for node in body:
        for part in ast.walk(node):
            function = part.func if isinstance(part, ast.Call) else None
            method = isinstance(function, ast.Attribute) and function.attr == name
            if method or (isinstance(function, ast.Name) and function.id in variables):
                yield ast.get_source_segment(source, node) or ""
                break


def heirs(cls: type) -> list[str]:
    "The names of a class and of all classes that inherit from it."
    return [cls.__name__, *(name for child in cls.__subclasses__() for name in heirs(child))]


def find_example(method: str, owners: list[str], pages: list[list[str]]) -> str | None:
    "A short statement from the pages (sources of cells, nearest page first) that calls a method, or None."
    asserted = None
    for cells in pages:
        variables = made_from(owners[0], cells) if method == "__call__" else set()
        for text in (text for source in cells for text in statements_calling(source, method, variables)):
            named = any(f"{owner}.{method}(" in text for owner in owners)
            if len(text.splitlines()) > 8 or (method.startswith("from_") and not named):
                continue
            if not text.startswith("assert"):
                return text
            asserted = asserted or text
    return asserted
