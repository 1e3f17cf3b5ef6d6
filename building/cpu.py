"""The module _C_cpu: every kernel once per instruction set.

Environment: CXX the compiler; STEPPO_SANITIZE e.g. "address,undefined" or "thread".
"""

import os
import platform
import sys
from pathlib import Path

from . import CannotBuild, CompilerFailed
from .compiler import binding_flags, find_compiler, version_of
from .ninja_file import NinjaFile

X86 = platform.machine().lower() in ("x86_64", "amd64")
BINDINGS = "python/bindings_cpu.cpp"

# Chosen at run time (csrc/cpu/dispatch.cpp); never -march=native.
ISAS: dict[str, list[str]] = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
    ISAS["avx512"] = [
        *ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mprefer-vector-width=512",
    ]  # fmt: skip

# The sources that are compiled once.
ONCE = ("dispatch", "pages", "parallel")


def is_fatal(why: CannotBuild) -> bool:
    """Whether the package is not to be installed without the module."""
    return isinstance(why, CompilerFailed)


def ninja_file(root: Path, includes: list[str], module: str) -> NinjaFile:
    """Return how the module is built of the sources in `root`.

    Raises:
        CannotBuild: there is no C++ compiler.
    """
    compiler = find_compiler()
    common = [
        "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
        "-fno-trapping-math", "-fopenmp-simd", "-pthread", "-Wall", "-Wextra", "-Wno-psabi",
        f"-I{root / 'csrc/include'}", f"-I{root / 'csrc/cpu'}",
        *(["-DSTEPPO_X86"] if X86 else []),
    ]  # fmt: skip
    link = ["-shared", "-pthread"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    if sanitizers := os.environ.get("STEPPO_SANITIZE"):
        checks = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g", "-O1"]
        common += [*checks, "-fno-sanitize-recover=undefined"]
        link += checks

    file = NinjaFile(module)
    file.rule("compile", compiler, "-MMD -MF $out.d $flags -c $in -o $out")
    file.rule("link", compiler, "$in $flags -o $out", has_depfile=False)
    sources = sorted((root / "csrc/cpu").glob("*.cpp"))
    for path in sources:
        for isa, flags in ISAS.items() if path.stem not in ONCE else ():
            own = [*common, *flags, f"-DSTEPPO_ISA={isa}"]
            file.compile("compile", path, f"{path.stem}.{isa}.o", own)
    for path in sources:
        if path.stem in ONCE:
            file.compile("compile", path, f"{path.stem}.o", common)
    bindings = root / BINDINGS
    glue = binding_flags(includes, version_of(compiler))
    file.compile("compile", bindings, f"{bindings.stem}.o", [*common, *glue])
    file.link("link", link)
    return file
