"""Stands in for NVIDIA's libraries, so that the CUDA build of torch imports on a machine without.

The wheel on PyPI links a dozen libraries of several gigabytes in all, of which Gloo uses none. For
each one that is missing this makes an empty library of that name with the symbol versions that
torch asks for, and one library with all the missing functions: each returns 100, "no device".
"""

import re
import subprocess
from pathlib import Path

NO_DEVICE = 100
MARK = "compare_none"
# Bound at run time by the interpreter, or by the C and C++ runtimes.
FOREIGN = re.compile(r"_?Py|_ITM_|__gmon_start__|__cxa_|_Unwind|__tls_get_addr")
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so|ld-linux")
SYSTEM_VERSIONS = re.compile(r"GLIBC|GCC|CXXABI|GOMP|OMP|GFORTRAN|OACC")


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed_libraries(readelf_text):
    """Names in a `readelf -d` listing."""
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf_text))


def symbols(nm_text):
    """Undefined and defined names of an `nm -D` listing; undefined ones as (name, version)."""
    undefined, defined = set(), set()
    for line in nm_text.splitlines():
        *_, kind, symbol = line.split()
        name, _, version = symbol.partition("@")
        if kind == "U":
            undefined.add((name, version.lstrip("@")))
        elif kind not in "vw":
            defined.add(name)
    return undefined, defined


def missing_functions(undefined, defined):
    """Functions that no present library has, and the versions that go with them."""
    names, versions = set(), set()
    for name, version in undefined:
        if name in defined or FOREIGN.match(name) or SYSTEM_VERSIONS.match(version):
            continue
        names.add(name)
        versions.update({version} - {""})
    return names, versions


def source(names):
    """C text of the library with the functions."""
    lines = [f"long {MARK}(void) {{ return {NO_DEVICE}; }}"]
    lines += [f'long {name}(void) __attribute__((alias("{MARK}")));' for name in sorted(names)]
    return "\n".join(lines) + "\n"


def version_script(library, versions):
    """Versions that belong to a library: torch's are called like it, nvshmem's is not."""
    stem = library.split(".so")[0].removeprefix("lib").split("_")[0].lower()
    own = [version for version in sorted(versions) if stem in version.lower()]
    return "".join(f"{version} {{ }};\n" for version in own)


def installed_libraries(ldconfig_text):
    """Name to path, of an `ldconfig -p` listing."""
    return dict(re.findall(r"^\s+(\S+) \(.*\) => (\S+)$", ldconfig_text, re.M))


def make(torch_lib, out):
    """Makes the stand-ins in `out` for a torch whose libraries lie in `torch_lib`."""
    out.mkdir(parents=True, exist_ok=True)
    libraries = sorted(path for path in Path(torch_lib).glob("*.so*") if path.is_file())
    needed, undefined, defined = set(), set(), set()
    for library in libraries:
        needed |= needed_libraries(output("readelf", "-dW", str(library)))
        unmet, met = symbols(output("nm", "-D", str(library)))
        undefined, defined = undefined | unmet, defined | met
    present = {library.name for library in libraries}
    installed = installed_libraries(output("ldconfig", "-p"))
    for name in needed & installed.keys():
        defined |= symbols(output("nm", "-D", installed[name]))[1]
    absent = {name for name in needed - present - installed.keys() if not SYSTEM.match(name)}
    names, versions = missing_functions(undefined, defined)
    everything = compile_library(out, "libcompare_stubs.so", source(names), [])
    for name in sorted(absent):
        script = version_script(name, versions)
        options = ["-Wl,--no-as-needed", str(everything), "-Wl,-rpath,$ORIGIN"]
        if script:
            (out / f"{name}.map").write_text(script)
            options.append(f"-Wl,--version-script={out / f'{name}.map'}")
        compile_library(out, name, f"int {name.split('.')[0]}_stub;\n", options)
    return sorted(absent)


def compile_library(out, name, text, options):
    path = out / name
    code = out / f"{name}.c"
    code.write_text(text)
    soname = f"-Wl,-soname,{name}"
    subprocess.run(
        ["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", str(path), str(code), soname, *options],
        check=True,
    )
    return path
