"""Turn Metal text into text for clang's C++-for-OpenCL mode.

The two languages are close enough that a few rewrites of tokens do it. Line numbers are kept, so
that compiler messages and memory checker reports point into the kernel's own source.
"""

import re
from pathlib import Path

_NAME = r"[A-Za-z_]\w*"
_SCALAR = r"u?(?:char|short|int|long)|float|half|bfloat"


def translate(text: str, include_directory: Path) -> str:
    """Metal text, as MLX would compile it, to text for clang that needs the shim headers only."""
    text = blank_comments(_inline_includes(text, include_directory, "<kernel>", set()))
    text = _drop_constructor_qualifiers(text)
    text = _rewrite_vector_constructors(text)
    text = _drop_instantiation_attributes(text)
    return _rewrite_threadgroup_variables(text)


def blank_comments(text: str) -> str:
    """Replace comments by spaces; string literals and newlines stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'

    def blank(match: re.Match) -> str:
        token = match[0]
        return token if token.startswith('"') else re.sub(r"[^\n]", " ", token)

    return re.sub(pattern, blank, text, flags=re.S)


def _inline_includes(text: str, directory: Path, file_name: str, seen: set[Path]) -> str:
    """Inline every `#include "..."` once, with line markers.

    Standard headers (`#include <metal_...>`) all become the one shim header.
    """
    lines = [f'# 1 "{file_name}"']
    for number, line in enumerate(text.split("\n"), start=1):
        if re.match(r"\s*#\s*include\s*<metal_", line):
            lines.append('#include "metal_shim.h"')
        elif re.match(r"\s*#\s*pragma\s+once", line):
            lines.append("")
        elif include := re.match(r'\s*#\s*include\s*"([^"]+)"', line):
            beside = Path(file_name).parent / include[1]
            path = beside if beside.is_file() else directory / include[1]
            if path not in seen:
                seen.add(path)
                lines.append(_inline_includes(path.read_text(), directory, str(path), seen))
            lines.append(f'# {number + 1} "{file_name}"')
        else:
            lines.append(line)
    return "\n".join(lines)


def _drop_constructor_qualifiers(text: str) -> str:
    """Drop the trailing `thread` of constructors (methods keep theirs): clang refuses it."""
    classes = set(re.findall(rf"\b(?:struct|class)\s+({_NAME})", text))
    before = r"(?:[{};:>\]]|\b(?:constexpr|explicit|inline|METAL_FUNC))\s*$"
    for match in re.finditer(r"\)\s*thread\b(?=\s*[{:;=])", text):
        head = text[: _opening_parenthesis(text, match.start())]
        name = re.search(rf"({_NAME})\s*$", head)
        if name and name[1] in classes and re.search(before, head[: name.start()]):
            blanks = " " * (len(match[0]) - 1)
            text = text[: match.start()] + ")" + blanks + text[match.end() :]
    return text


def _opening_parenthesis(text: str, closing: int) -> int:
    """The position of the parenthesis that closes at ``closing``."""
    depth = 0
    for position in range(closing, -1, -1):
        depth += (text[position] == ")") - (text[position] == "(")
        if depth == 0:
            return position
    return 0


def _rewrite_vector_constructors(text: str) -> str:
    """`float4(...)`, `vec<T, 4>(...)`, `V(...)` for aliases V: calls of the shim's own builders.

    OpenCL reads `(float4)(a, b)` with other rules than Metal.
    """
    alias = rf"\btypedef\s+(?:metal::)?vec<[^;{{}}]+>\s+({_NAME})\s*;"
    alias += rf"|\busing\s+({_NAME})\s*=\s*(?:metal::)?vec<"
    for name in {first or second for first, second in re.findall(alias, text)}:
        text = re.sub(rf"(?<![\w:.]){name}\((?=[^)])", f"::metal::_make<{name}>(", text)
    text = re.sub(
        r"(?<!\w)(?:metal::)?vec<([^<>;{}()]+),\s*([^<>;{}()]+)>\s*\((?=[^)*&])",
        r"::metal::_make_vec<\1, \2>(",
        text,
    )
    return re.sub(
        rf"(?<!operator )(?<![\w.])(?:metal::)?({_SCALAR})([234])\s*\(",
        r"::metal::_make_vec<\1, \2>(",
        text,
    )


def _drop_instantiation_attributes(text: str) -> str:
    """`template [[host_name("f")]] [[kernel]] ...`: clang wants no attributes there."""
    return re.sub(r"\btemplate\s*((?:\[\[[^\]]*\]\]\s*)+)", "template ", text)


def _rewrite_threadgroup_variables(text: str) -> str:
    """`threadgroup T x[N];` in a body: a reference into the executor's threadgroup memory.

    OpenCL itself allows such variables only in kernels that are not templates.
    """
    statement_start = r"(?<=[;{}])((?:\s*#[^\n]*\n)*\s*)"  # maybe after lines with #if
    declaration = r"([^;{}()]*(?:\([^;{}]*\)[^;{}]*)?)"
    count = 0

    def rewrite(match: re.Match) -> str:
        nonlocal count
        if (parts := _split_declaration(match[2])) is None:
            return match[0]
        type_, variables = parts
        statements = []
        for name, dimensions in variables:
            statements.append(_allocation(type_, name, dimensions, count))
            count += 1
        replacement = " ".join(statements)
        lost_lines = match[2].count("\n") - replacement.count("\n")
        return match[1] + replacement + "\n" * lost_lines

    return re.sub(rf"{statement_start}threadgroup\b{declaration};", rewrite, text)


def _allocation(type_: str, name: str, dimensions: str, number: int) -> str:
    alias = f"_mol_threadgroup{number}"
    allocate = f"mol_threadgroup_alloc({number}u, sizeof({alias}), alignof({alias}))"
    return (
        f"using {alias} = {type_} {dimensions}; "
        f"threadgroup {alias}& {name} = *(threadgroup {alias}*){allocate};"
    )


def _split_declaration(declaration: str) -> tuple[str, list[tuple[str, str]]] | None:
    """`float a[4], b` -> ("float", [("a", "[4]"), ("b", "")]); None when it is something else."""
    qualifier = r"(?:(?:const|volatile|unsigned|signed|typename|metal::|::)\s*)*"
    match = re.match(rf"\s*({qualifier}{_NAME}(?:\s*::\s*{_NAME})*)", declaration)
    if not match:
        return None
    end = _end_of_template_arguments(declaration, match.end())
    type_ = match[1] + declaration[match.end() : end]
    variables = []
    for part in re.split(r",(?![^\[(<]*[\])>])", declaration[end:]):
        variable = re.fullmatch(rf"\s*({_NAME})\s*((?:\[[^\]]*\]\s*)*)", part)
        if not variable:  # a pointer, a reference, an initialiser
            return None
        variables.append((variable[1], variable[2].strip()))
    return type_, variables


def _end_of_template_arguments(text: str, start: int) -> int:
    """The end of the `<...>` that begins at ``start``, or ``start`` when there is none."""
    if not re.match(r"\s*<", text[start:]):
        return start
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "<") - (text[position] == ">")
        if text[position] == ">" and depth == 0:
            return position + 1
    return len(text)
