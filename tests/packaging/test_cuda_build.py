"""The build of _C_cuda: what becomes of a package where nvcc is not there, fails, or is unwanted.

The compilers are scripts that write down how they are called and leave empty files.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import installs
import pytest

_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_CPU, _CUDA, _NOTE = f"_C_cpu{_SUFFIX}", f"_C_cuda{_SUFFIX}", "_C_cuda.missing"
_WRITES = """
before=
for word; do
  if [ "$before" = -o ]; then echo made > "$word"; fi
  before=$word
done
"""
_NVCC = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.7"; exit;;
  *--list-gpu-code*) printf 'sm_%s\\n' {knows}; exit;;
  *--dryrun*)
    echo '#$ TOP={top}/bin/..' >&2
    echo '#$ LIBRARIES=  "-L{top}/elsewhere/stubs" "-L{top}/elsewhere"' >&2
    exit;;
esac
"""


class Compilers(NamedTuple):
    """A C++ compiler and a toolkit, neither of which compiles."""

    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        """The environment variables that name them."""
        return {
            "CXX": shlex.quote(str(self.folder / "c++")),
            "STEPPO_NVCC": str(self.folder / "toolkit/bin/nvcc"),
        }

    def write(
        self, *, release: str = "13.0", knows: str = "80 90 100 120", fails: str = ""
    ) -> None:
        """Write the scripts; nvcc answers a call for an object with a script of its own."""
        top = self.folder / "toolkit"
        for folder in (top / "bin", top / "elsewhere"):
            folder.mkdir(parents=True, exist_ok=True)
        (top / "elsewhere/libcudart_static.a").touch()
        self._script("c++", 'case "$*" in *--version*) echo "c++ 1.0"; exit;; esac\n' + _WRITES)
        answers = _NVCC.format(release=release, knows=knows, top=top)
        self._script("toolkit/bin/nvcc", answers + (fails or _WRITES))

    def calls(self, name: str) -> list[list[str]]:
        """Return the words of the calls that asked a compiler for a file."""
        log = self.folder / f"{name}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [words for words in map(shlex.split, lines) if "-o" in words]

    def _script(self, name: str, text: str) -> None:
        path = self.folder / name
        # shlex reads what printf quotes. A line is written at once: ninja calls several at a time.
        quoted = 'words=$(printf "\'%s\' " "$@")'
        note = f"{quoted}; printf '%s\\n' \"$words\" >> '{self.folder / path.name}.log'"
        path.write_text(f"#!/bin/sh\n{note}\n{text}")
        path.chmod(0o755)


@pytest.fixture
def compilers(tmp_path: Path) -> Compilers:
    made = Compilers(tmp_path / "the compilers")
    made.folder.mkdir()
    made.write()
    return made


@pytest.fixture
def build(source: Path, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess, dict]]:
    """Builds the package as it would be installed; returns its files that are no Python."""
    made = tmp_path / "made"

    def run(*words: str, **settings: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
        words = words or ("build", "--build-base", str(tmp_path / "base"), "--build-lib", str(made))
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", *words],
            cwd=source,
            env=installs.outer(**settings),
            capture_output=True,
            text=True,
            check=False,
        )
        package = made / "steppo_kernels"
        files = (path for path in package.glob("*") if path.is_file())
        return done, {
            path.name: path.read_text() for path in files if path.suffix not in (".py", ".pyi")
        }

    return run


def note_of(files: dict[str, str]) -> str:
    """The reason in the note; the module is not there, and the one for the CPU is."""
    assert files.keys() == {_CPU, _NOTE, "py.typed"}
    (line,) = files[_NOTE].splitlines()
    assert line.startswith("not built: ")
    return line.removeprefix("not built: ")


def test_the_module_is_built_where_nvcc_is(build, compilers, source):
    done, files = build(**compilers.settings)
    assert done.returncode == 0, done.stderr
    assert files.keys() == {_CPU, _CUDA, "py.typed"}
    kernels = {path.name for path in (source / "csrc/cuda").glob("*.cu")}
    assert {Path(words[words.index("-c") + 1]).name for words in compilers.calls("nvcc")} == kernels
    (link,) = [words for words in compilers.calls("c++") if _CUDA in words]
    assert str(compilers.folder / "toolkit/elsewhere/libcudart_static.a") in link
    assert not [word for word in link if word.startswith("-lcuda")]


@pytest.mark.parametrize(
    ("settings", "knows", "codes", "told"),
    [
        ({}, "75 80 86 90 100 120", ["80", "90", "100"], "80 90 100+PTX"),
        # An nvcc of CUDA 12.0.
        ({}, "80 86 90", ["80", "90"], "80 90+PTX"),
        ({"STEPPO_CUDA_ARCHS": "86"}, "80 86 90", ["86"], "86+PTX"),
        ({"STEPPO_CUDA_ARCHS": "100, 86"}, "80 86 90 100", ["86", "100"], "86 100+PTX"),
    ],
)
def test_architectures(build, compilers, settings, knows, codes, told):
    compilers.write(knows=knows)
    done, files = build(**compilers.settings, **settings)
    assert done.returncode == 0, done.stderr
    assert _CUDA in files
    wanted = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    wanted += [f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}"]
    for words in compilers.calls("nvcc"):
        assert [word for word in words if word.startswith("-gencode")] == wanted
    (bindings,) = [words for words in compilers.calls("c++") if words[-1] == "bindings_cuda.o"]
    assert f'-DSTEPPO_ARCHITECTURES="{told}"' in bindings
    assert '-DSTEPPO_COMPILER="nvcc 13.0.7"' in bindings


_COMPLAINS = """
echo "gae.cu(3): warning: a variable is not used" >&2
echo "gae.cu(7): error: no such thing" >&2
echo "gae.cu(9): error: nor such" >&2
exit 2
"""


def _is_missing(compilers: Compilers) -> str:
    path = compilers.folder / "toolkit/bin/nvcc"
    path.unlink()
    return f"no nvcc when it was installed: STEPPO_NVCC is '{path}', which is no program"


def _fails(compilers: Compilers) -> str:
    compilers.write(fails=_COMPLAINS)
    return "a compiler failed when it was installed: gae.cu(7): error: no such thing"


def _does_not_answer(compilers: Compilers) -> str:
    (compilers.folder / "toolkit/bin/nvcc").write_text(
        "#!/bin/sh\necho 'nvcc fatal   : no host compiler' >&2\nexit 1\n"
    )
    return "nvcc failed when it was installed: nvcc fatal   : no host compiler"


def _is_no_program(compilers: Compilers) -> str:
    path = compilers.folder / "toolkit/bin/nvcc"
    path.write_bytes(b"\x7fELF of another machine")
    return f"nvcc failed when it was installed: [Errno 8] Exec format error: '{path}'"


def _knows_no_such_gpu(compilers: Compilers) -> str:
    compilers.write(knows="30 75 35")
    return "nvcc 13.0.7 did not know 80, 90, 100 when it was installed, but 30, 35, 75"


def _has_no_runtime(compilers: Compilers) -> str:
    top = compilers.folder / "toolkit"
    (top / "elsewhere/libcudart_static.a").unlink()
    looked = ", ".join(f"{top}/{name}" for name in ("elsewhere/stubs", "elsewhere", "lib64", "lib"))
    return f"no libcudart_static.a of nvcc 13.0.7 when it was installed ({looked})"


_FAULTS = (
    _is_missing,
    _fails,
    _does_not_answer,
    _is_no_program,
    _knows_no_such_gpu,
    _has_no_runtime,
)


@pytest.mark.parametrize("fault", _FAULTS)
def test_without_nvcc_a_note_is_in_the_place_of_the_module(build, compilers, fault):
    why = fault(compilers)
    done, files = build(**compilers.settings)
    assert done.returncode == 0, done.stderr
    assert note_of(files) == why
    assert f"steppo_kernels._C_cuda is not built: {why}" in done.stderr


@pytest.mark.parametrize("fault", _FAULTS)
def test_without_nvcc_a_module_that_is_asked_for_is_an_error(build, compilers, fault):
    why = fault(compilers)
    done, files = build(**compilers.settings, STEPPO_BUILD_CUDA="1")
    assert done.returncode == 1
    assert f"error: steppo_kernels._C_cuda is not built: {why}" in done.stderr
    assert _NOTE not in files


def test_an_architecture_that_nvcc_does_not_know(build, compilers):
    """The others that are named are not built alone."""
    done, files = build(**compilers.settings, STEPPO_CUDA_ARCHS="90,200")
    assert done.returncode == 0, done.stderr
    assert note_of(files) == (
        "nvcc 13.0.7 did not know 200 when it was installed, but 80, 90, 100, 120"
    )


def test_a_module_that_is_unwanted(build, compilers):
    done, files = build(**compilers.settings, STEPPO_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert note_of(files) == "STEPPO_BUILD_CUDA=0 when it was installed"
    assert not (compilers.folder / "nvcc.log").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("STEPPO_BUILD_CUDA", "yes", "0, 1, auto"),
        ("STEPPO_BUILD_CUDA", "2", "0, 1, auto"),
        ("STEPPO_CUDA_ARCHS", "sm_90", "numbers such as 80,90,100"),
        ("STEPPO_CUDA_ARCHS", "90a", "numbers such as 80,90,100"),
    ],
)
def test_a_setting_that_means_nothing_is_an_error(build, compilers, name, value, expected):
    """Before anything is compiled."""
    done, _ = build(**compilers.settings, **{name: value})
    assert done.returncode == 1
    assert f"error: {name}: got '{value}', expected {expected}" in done.stderr
    assert compilers.calls("c++") == []


def test_a_cpp_compiler_that_fails_is_an_error(build, compilers):
    (compilers.folder / "c++").write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "c++ 1.0"; exit;; esac\n'
        'echo "a.cpp:1: error: no" >&2; exit 1\n'
    )
    done, _ = build(CXX=compilers.settings["CXX"], STEPPO_BUILD_CUDA="0")
    assert done.returncode == 1
    assert "error: steppo_kernels._C_cpu is not built: a compiler failed" in done.stderr


def test_the_compiler_that_is_named_is_that_of_nvcc(build, compilers):
    build(**compilers.settings)
    named = f"-ccbin={compilers.folder / 'c++'}"
    assert all(named in words for words in compilers.calls("nvcc"))
    # nvcc takes one word, and a launcher of compilers is not one.
    (compilers.folder / "nvcc.log").unlink()
    build(**compilers.settings | {"CXX": f"env {compilers.settings['CXX']}"})
    assert compilers.calls("nvcc")
    assert not any("-ccbin" in word for words in compilers.calls("nvcc") for word in words)


def test_a_build_leaves_nothing_for_the_next(build, compilers, source):
    """The module or its note, in what is installed and in the package of an editable install."""
    inplace = "build_ext", "--inplace"
    package = source / "steppo_kernels"
    for switch, kept, gone in (("1", _CUDA, _NOTE), ("0", _NOTE, _CUDA), ("1", _CUDA, _NOTE)):
        settings = {**compilers.settings, "STEPPO_BUILD_CUDA": switch}
        _, files = build(**settings)
        assert files.keys() == {_CPU, kept, "py.typed"}
        assert build(*inplace, **settings)[0].returncode == 0
        assert (package / kept).exists()
        assert not (package / gone).exists()


def test_nothing_is_compiled_twice(build, compilers, source):
    """An editable install keeps what it compiled for the build after it, which adds the kernels."""
    installed = {**compilers.settings, "STEPPO_BUILD_CUDA": "0"}
    program = "from setuptools.build_meta import build_editable; build_editable('..')"
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env=installs.outer(**installed),
        capture_output=True,
        check=True,
    )
    count = len(compilers.calls("c++"))
    assert count > 0
    build("build_ext", "--inplace", **compilers.settings)
    added = compilers.calls("c++")[count:]
    assert [words[words.index("-o") + 1] for words in added] == ["bindings_cuda.o", _CUDA]


def test_the_source_archive_has_what_it_is_built_with(source, tmp_path, compilers):
    for note in (_NOTE, "_C_cpu.missing"):
        (source / "steppo_kernels" / note).write_text("not built: elsewhere\n")
    program = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=source,
        env=installs.outer(),
        capture_output=True,
        check=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("building", "csrc", "python"):
        held = {
            str(path.relative_to(source))
            for path in (source / folder).rglob("*.*")
            if path.suffix != ".pyc"
        }
        assert held <= names
    assert [name for name in names if name.endswith((".missing", ".pyc", ".so"))] == []
    # pip builds as PEP 517 says: nothing is imported from the folder by itself.
    installs.pip(
        sys.executable, "wheel", "--wheel-dir", str(tmp_path), str(archive), **compilers.settings
    )
    assert len(list(tmp_path.glob("*.whl"))) == 1
    assert compilers.calls("nvcc")


# Where nvcc is looked for.


def make_nvcc(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text("#!/bin/sh\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    cuda = installs.builder()
    named = make_nvcc(tmp_path / "named")
    home, other_home = make_nvcc(tmp_path / "home/bin"), make_nvcc(tmp_path / "other/bin")
    path, usual = make_nvcc(tmp_path / "path"), make_nvcc(tmp_path / "usual")
    old, wheel = (make_nvcc(tmp_path / f"site/nvidia/{name}/bin") for name in ("cu12", "cu13"))
    beside = make_nvcc(tmp_path / "beside/nvidia/cu13/bin")
    monkeypatch.setenv("STEPPO_NVCC", named)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    monkeypatch.setenv("PATH", f":{tmp_path / 'empty'}:{tmp_path / 'path'}")
    monkeypatch.setattr(cuda, "USUAL", str(tmp_path / "usual"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(cuda.sysconfig, "get_path", lambda _: str(tmp_path / "beside"))
    # The nvidia that is imported already is that of the environment.
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)

    assert cuda.find_nvcc() == named
    monkeypatch.delenv("STEPPO_NVCC")
    for found in (home, other_home, path, usual, wheel, beside, old):
        assert cuda.find_nvcc() == found
        Path(found).unlink()
    with pytest.raises(cuda.CannotBuild, match=r"no nvcc .*STEPPO_NVCC, CUDA_HOME, .*nvidia-cuda"):
        cuda.find_nvcc()


def test_a_name_is_looked_for_in_the_path(tmp_path, monkeypatch):
    cuda = installs.builder()
    found = make_nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("STEPPO_NVCC", "nvcc")
    assert cuda.find_nvcc() == found
    monkeypatch.setenv("STEPPO_NVCC", "nvcc-12")
    with pytest.raises(cuda.CannotBuild, match="STEPPO_NVCC is 'nvcc-12', which is no program"):
        cuda.find_nvcc()


def test_a_toolkit_is_found_through_links_and_scripts(tmp_path, monkeypatch):
    """nvcc is asked where its library is: what stands in PATH may be neither it nor beside it."""
    cuda = installs.builder()
    try:
        monkeypatch.delenv("CXX", raising=False)
        real = cuda.find_toolkit()
    except cuda.CannotBuild as why:
        pytest.skip(str(why))
    assert re.fullmatch(r"\d+\.\d+\.\d+", real.version)
    assert {"80", "90"} <= set(real.knows)
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nexec {real.nvcc[0]} "$@"\n')
    script.chmod(0o755)
    (tmp_path / "link").symlink_to(script)
    for path in (script, tmp_path / "link"):
        monkeypatch.setenv("STEPPO_NVCC", str(path))
        assert cuda.find_toolkit() == real._replace(nvcc=[str(path)])


def test_the_package_nvidia_cuda_nvcc_is_a_toolkit(monkeypatch):
    cuda = installs.builder()
    if not cuda.wheels():
        pytest.skip("the package nvidia-cuda-nvcc is not installed")
    monkeypatch.setenv("STEPPO_NVCC", shutil.which("nvcc", path=cuda.wheels()[0]))
    assert cuda.find_toolkit().runtime.is_file()
