"""Type check: clang's verdict on the exact text MLX generates, plus rules that clang lacks.

clang's C++-for-OpenCL mode accepts some things that Metal's compiler rejects. The lints below read
clang's own view of the program (its AST dump and unoptimised LLVM IR), so that they see through
templates and macros.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from . import toolchain
from .kernel import Kernel
from .signature import ATTRIBUTES
from .translate import blank_comments, translate

_MAX_THREADGROUP_BYTES = 32768
_MAX_THREADS = 1024
_MAX_BUFFERS = 31

_KNOWN_ATTRIBUTES = {"kernel", "buffer", "host_name", *ATTRIBUTES}

_WARNINGS = [
    *("-Wimplicit-float-conversion", "-Wuninitialized", "-Wsometimes-uninitialized"),
    *("-Warray-bounds", "-Wshift-count-overflow", "-Wreturn-type", "-Wpre-c++17-compat"),
]
# Valid in Metal: `if constexpr`, narrowing to half, and to bfloat (which has a lint of its own).
_HARMLESS = ("__bf16", "to 'half'", "constexpr if")

# (pattern on one line of the AST dump, message)
_AST_RULES = [
    (
        r"\b(VarDecl|ParmVarDecl|FieldDecl)\b.*'[^']*__generic [^'&*]*\*",
        "pointer without an address space (Metal: error)",
    ),
    (r"\bLambdaExpr\b", "lambda (needs Metal 3.2)"),
    (r"\b(GotoStmt|IndirectGotoStmt)\b", "goto (not in Metal)"),
    (r"\b(VarDecl|FieldDecl|ParmVarDecl)\b.*'[^']*long long", "long long (Metal: use long)"),
]


def check(
    kernel: Kernel,
    *,
    inputs: list[object],
    output_dtypes: list[mx.Dtype],
    threadgroup: tuple[int, int, int],
    template: list[tuple[str, object]] | None = None,
    **_launch_arguments: object,
) -> list[str]:
    """Type-check one call of a kernel; returns a list of findings, empty when all is well.

    Takes the keyword arguments of the call itself and ignores those that it does not need, so that
    ``check(kernel, **call)`` and ``kernel(**call)`` go together.
    """
    inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    signature = kernel.signature(inputs, output_dtypes, template)
    file_name = kernel.name + ".metal"
    program = translate(kernel.program(signature), toolchain.mlx_include_directory())
    findings = list(_text_findings(blank_comments(signature.text)))
    findings += toolchain.remember(
        lambda: list(_compiler_findings(program, file_name)), program, Path(__file__).read_text()
    )
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > _MAX_THREADS:
        findings.append(f"{threads} threads in a threadgroup, the limit is {_MAX_THREADS}")
    return [text if text.startswith(file_name) else f"{file_name}: {text}" for text in findings]


def _text_findings(text: str) -> Iterator[str]:
    """Rules on the generated text, comments blanked."""
    for attribute in re.findall(r"\[\[\s*(\w+)", text):
        if attribute not in _KNOWN_ATTRIBUTES:
            yield f"unknown attribute [[{attribute}]]"
    helpers = text.split("[[kernel]]")[0]
    if re.search(r"[;{}]\s*threadgroup\s+[^*&;()]*;", helpers):
        yield "threadgroup variable outside a kernel function (Metal: error)"
    buffers = len(re.findall(r"\[\[buffer\(", text))
    if buffers > _MAX_BUFFERS:
        yield f"{buffers} buffer arguments (with _shape etc.), the limit is {_MAX_BUFFERS}"


def _compiler_findings(program: str, file_name: str) -> Iterator[str]:
    """clang's errors and relevant warnings; when there are no errors, the AST and IR lints."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.metal"
        path.write_text(program)

        def clang(*arguments: str) -> tuple[int, str, str]:
            options = [*toolchain.LANGUAGE_FLAGS, "-fno-color-diagnostics", *arguments]
            done = toolchain.start([*toolchain.clang(), *options, str(path)])
            return done.returncode, done.stdout, done.stderr

        failed, _, messages = clang("-fsyntax-only", "-ferror-limit=50", *_WARNINGS)
        yield from _relevant_messages(messages, file_name)
        if failed:
            return
        _, dump, _ = clang("-w", "-fsyntax-only", "-Xclang", "-ast-dump")
        _, ir, _ = clang("-w", "-O0", "-emit-llvm", "-S", "-o", "-")
    yield from _ast_findings(dump, file_name)
    yield from _ir_findings(ir)


def _relevant_messages(messages: str, file_name: str) -> Iterator[str]:
    for line in messages.split("\n"):
        is_own_warning = ": warning: " in line and line.startswith(file_name)
        is_harmful = is_own_warning and not any(words in line for words in _HARMLESS)
        if ": error: " in line or is_harmful:
            yield line


def _ast_findings(dump: str, file_name: str) -> list[str]:
    """Lints on clang's text AST dump, for source locations in ``file_name``."""
    findings = set()
    current_file, line_number = "", 0
    for line in dump.split("\n"):
        # The dump prints the file only when it changes: follow the locations.
        for file, number in re.findall(r"(<kernel>|[\w./+-]+):(\d+)(?::\d+)?(?=[,>\s])", line):
            if file == "col":
                continue
            if file != "line":
                current_file = file
            line_number = int(number)
        if current_file.endswith(file_name):
            place = f"{file_name}:{line_number}"
            findings.update(f"{place}: {message}" for message in _ast_messages(line))
    return sorted(findings)


def _ast_messages(line: str) -> Iterator[str]:
    for pattern, message in _AST_RULES:
        if re.search(pattern, line):
            yield message
    if _is_implicit_bfloat(line):
        yield "implicit float -> bfloat conversion (Metal: error; cast explicitly)"


def _is_implicit_bfloat(line: str) -> bool:
    """`bfloat x = 1.0f`: an error in Metal, accepted by clang."""
    cast = re.search(
        r"ImplicitCastExpr 0x\w+ <[^>]*> '([^']*)'(?::'([^']*)')?.*<FloatingCast>", line
    )
    if not cast or "part_of_explicit_cast" in line:
        return False
    return "__bf16" in (cast[2] or cast[1]) or bool(re.search(r"\bbfloat", cast[1]))


def _ir_findings(ir: str) -> Iterator[str]:
    """Rules on unoptimised LLVM IR: the call graph, and what threadgroup variables add up to."""
    for name in _recursive_functions(ir):
        yield f"recursion: {name}"
    sizes = re.findall(r"call .*@mol_threadgroup_alloc\(i32 [^,]*?\d+, i32 [^,]*?(\d+), ", ir)
    total = sum(map(int, sizes))
    if total > _MAX_THREADGROUP_BYTES:
        yield f"{total} bytes of threadgroup memory, the limit is {_MAX_THREADGROUP_BYTES}"


def _recursive_functions(ir: str) -> list[str]:
    """Functions that can reach themselves in the call graph."""
    calls, current = {}, set()
    for line in ir.split("\n"):
        if definition := re.match(r'define .*@"?([\w.$]+)"?\(', line):
            current = calls.setdefault(definition[1], set())
        else:
            current.update(re.findall(r'\bcall\b.*?@"?([\w.$]+)"?\(', line))
    return [name for name in calls if name in _reachable(calls, name)]


def _reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    """Functions called by ``start``, directly or not."""
    seen, todo = set(), [start]
    while todo:
        new = calls.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen
