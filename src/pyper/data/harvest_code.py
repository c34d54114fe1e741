"""Code and calculations for the embedded corpus: each function yields one domain's documents."""

import ast
import dis
import re
import textwrap
import warnings
from collections.abc import Iterator
from types import CodeType

from pyper.data.harvest_files import (
    list_files,
    package_folder,
    read_text,
    shuffled,
    some,
    standard_library,
)

_MIN_CHARS, _MAX_CHARS = 200, 8_000
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_LEGAL = re.compile(r"copyright|licen[sc]e", re.IGNORECASE)
_COMMENT = re.compile(r"\s*(?:/\*.*?\*/|(?://[^\n]*(?:\n|$))+)", re.DOTALL)
_GENERATED = frozenset(("ops", "opencl", "oneapi", "__pycache__", "tests"))
# torch's build puts the same guard around most headers; it would be most of what a model learns.
_GUARD = re.compile(
    r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n(.*?)"
    r"(?:\n#else\n#error[^\n]*)?\n#endif[^\n]*\s*\Z",
    re.DOTALL,
)


def python() -> Iterator[str]:
    """Functions and classes of the standard library, without comments and docstrings."""
    for _, source in standard_library():
        yield from some(_definitions(source))


def _definitions(source: str) -> Iterator[str]:
    tree = _parse(source)
    lines = source.split("\n")
    for node in _small_definitions(tree) if tree else ():
        text = _without_words(lines, node)
        if _MIN_CHARS <= len(text) <= _MAX_CHARS:
            yield text


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _small_definitions(node: ast.AST) -> Iterator[_Definition]:
    """Functions and classes; of a long class its methods."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _Definition):
            continue
        if isinstance(child, ast.ClassDef) and (child.end_lineno or 0) - child.lineno > 150:
            yield from _small_definitions(child)
        else:
            yield child


def _without_words(lines: list[str], node: _Definition) -> str:
    """The source of a definition without docstrings and lines that are comments."""
    words = {line for part in ast.walk(node) for line in _docstring_lines(part)}
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = [
        lines[number - 1]
        for number in range(first, (node.end_lineno or first) + 1)
        if number not in words and not lines[number - 1].lstrip().startswith("#")
    ]
    return re.sub(r"\n\s*\n(?=\s*\n)", "\n", textwrap.dedent("\n".join(kept))).strip() + "\n"


def _docstring_lines(node: ast.AST) -> range:
    if isinstance(node, _Definition) and ast.get_docstring(node, clean=False) is not None:
        return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    return range(0)


def cpp() -> Iterator[str]:
    """C++ headers of torch, without the licence at their top and without generated ones."""
    torch = package_folder("torch")
    if torch is None:
        return
    root = torch / "include"
    names = [n for s in (".h", ".hpp") for n in list_files(root, s, skip=_GENERATED)]
    for name in shuffled(names):
        text = _without_licence(read_text(root / name))
        if _MIN_CHARS <= len(text) <= 2 * _MAX_CHARS:
            yield text


def _without_licence(text: str) -> str:
    text = _GUARD.sub(r"\1", text)
    while (found := _COMMENT.match(text)) and _LEGAL.search(found[0]):
        text = text[found.end() :]
    return text.strip() + "\n"


def maths() -> Iterator[str]:
    """Calculations: the examples that sympy's documentation works through."""
    sympy = package_folder("sympy")
    if sympy is None:
        return
    for name in shuffled(list_files(sympy, ".py", skip=_GENERATED)):
        yield from some(_calculations(read_text(sympy / name)))


def _calculations(source: str) -> Iterator[str]:
    for docstring in source.split('"""')[1::2]:
        text = "\n".join(_example_lines(docstring))
        if _MIN_CHARS <= len(text) <= _MAX_CHARS:
            yield text + "\n"


def _example_lines(docstring: str) -> Iterator[str]:
    """Inputs after `>>>` or `...`, and the lines below them up to an empty one."""
    inside, indent = False, 0
    for line in docstring.split("\n"):
        bare = line.lstrip()
        if bare.startswith(">>> "):
            inside, indent = True, len(line) - len(bare)
        elif not bare:
            inside = False
        if inside:
            yield line[indent:].rstrip()


def bytecode() -> Iterator[str]:
    """What the standard library's functions compile to."""
    for _, source in standard_library():
        code = _compile(source)
        if code is not None:
            yield from some(_listings(code))


def _compile(source: str) -> CodeType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return compile(source, "", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return None


def _listings(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            listing = _listing(constant)
            # The order of a frozenset changes with every start of Python.
            if _MIN_CHARS <= len(listing) <= _MAX_CHARS and "frozenset" not in listing:
                yield listing
            yield from _listings(constant)


def _listing(code: CodeType) -> str:
    rows = [f"{code.co_name}({', '.join(code.co_varnames[: code.co_argcount])})"]
    for step in dis.get_instructions(code):
        shown = re.sub(r" at 0x[0-9a-f]+, file .*?, line \d+", "", step.argrepr)
        number = "" if step.arg is None else str(step.arg)
        rows.append(f"{step.offset:5} {step.opname:<22} {number:>4} {shown[:80]}".rstrip())
    return "\n".join(rows) + "\n"


def build_files() -> Iterator[str]:
    """A spare domain: the CMake files that come with torch."""
    torch = package_folder("torch")
    if torch is None:
        return
    for name in shuffled(list_files(torch / "share", ".cmake")):
        text = _without_words_of_cmake(read_text(torch / "share" / name))
        if len(text) >= _MIN_CHARS:
            yield text[: 2 * _MAX_CHARS]


def _without_words_of_cmake(text: str) -> str:
    return re.sub(r"\A(?:#[^\n]*\n|\s*\n)+", "", text)
