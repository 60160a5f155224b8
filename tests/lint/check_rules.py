#!/usr/bin/env python3
"""House rules that a script can see. Each rule prints `path:line: rule: what`; any line makes the exit status 1.

Usage: check_rules.py [--rule NAME]   from anywhere inside the repository.
"""
import argparse
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Folder -> folders it may include (itself always). Longest prefix decides. DESIGN: server -> trainer, cache, kernels; ...
MAY_INCLUDE = {
    "kernels/base": [],
    "kernels/ops": ["kernels/base"],
    "kernels/cpu": ["kernels/ops", "kernels/base"],
    "kernels/cuda": ["kernels/ops", "kernels/base"],
    "kernels/model": ["kernels/ops", "kernels/base"],
    "cache": ["kernels/base"],
    "trainer": ["kernels/model", "kernels/ops", "kernels/base"],
    "server/metrics": [],
    "server/engine": ["server/metrics", "trainer", "cache", "kernels/model", "kernels/ops", "kernels/base"],
    "server/http": ["server/metrics", "kernels/base"],
    "server/rpc": ["server/engine", "server/metrics", "trainer", "cache", "kernels/model", "kernels/ops",
                   "kernels/base", "proto"],
    "server/placement": ["kernels/base"],
    "server/router": ["server/placement", "server/metrics", "kernels/base", "proto"],
    "server": ["server/rpc", "server/router", "server/placement", "server/engine", "server/http", "server/metrics",
               "trainer", "cache", "kernels/model", "kernels/ops", "kernels/base"],
    "proto": [],
}
# The one place that knows every backend: CreateOps.
FACTORY_PREFIX = "kernels/ops/ops_factory"
TOP_LEVEL = {"CMakeLists.txt", "README.md", "CONTRIBUTING.md", "LICENSE", "proto", "server", "cache", "kernels", "trainer",
             "client", "deploy", "tests"}
SOURCE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}
MAX_LINES = {"source": 500, "test": 800, "readme": 150}


def tracked_files():
    out = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
    return [pathlib.Path(line) for line in out.splitlines() if (ROOT / line).is_file()]


def sources(files):
    return [f for f in files if f.suffix in SOURCE_SUFFIXES]


def owner_of(path):
    """The key of MAY_INCLUDE that governs a path, or None (tests may include anything)."""
    parts = str(path)
    keys = [k for k in MAY_INCLUDE if parts.startswith(k + "/")]
    return max(keys, key=len) if keys else None


def check_includes(files):
    for f in sources(files):
        owner = owner_of(f)
        if str(f).startswith(FACTORY_PREFIX):
            continue
        for n, line in lines_of(f):
            m = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not m or owner is None:
                continue
            target = m.group(1)
            if target.startswith("coppice/v1/"):
                if owner not in ("server/rpc", "server/router"):
                    yield f, n, "generated proto code is visible in server/rpc, server/router and client only"
                continue
            target_owner = owner_of(target)
            if target_owner is None:
                if target.startswith("tests/"):
                    yield f, n, f"nobody includes tests ({target})"
                continue
            if target_owner != owner and target_owner not in MAY_INCLUDE[owner]:
                yield f, n, f"{owner} must not include {target}"


def check_cuda_headers(files):
    for f in sources(files):
        if str(f).startswith(("kernels/cuda/", "tests/")):
            continue
        for n, line in lines_of(f):
            if re.match(r"\s*#\s*include\s+<(cuda|cublas|nccl)", line):
                yield f, n, "CUDA headers stay under kernels/cuda"


def check_conditionals(files):
    for f in sources(files):
        if str(f).startswith(("kernels/base/", "kernels/cuda/", "tests/")):
            continue
        for n, line in lines_of(f):
            if re.match(r"\s*#\s*(if|ifdef|ifndef|elif)\b", line):
                yield f, n, "no preprocessor conditionals outside kernels/base and kernels/cuda"


def check_launches(files):
    for f in files:
        if f.suffix not in (".cu", ".cuh"):
            continue
        for n, line in lines_of(f):
            m = re.search(r"<<<(.*?)>>>", line)
            if m and m.group(1).count(",") < 3:
                yield f, n, "a launch names grid, block, shared memory and stream"


def check_sizes(files):
    for f in files:
        kind = "readme" if f.name == "README.md" else (
            "test" if str(f).startswith("tests/") else "source") if f.suffix in SOURCE_SUFFIXES | {".py"} else None
        if f.name == "README.md":
            kind = "readme"
        if kind is None:
            continue
        n = len((ROOT / f).read_text(errors="replace").splitlines())
        if n > MAX_LINES[kind]:
            yield f, n, f"{n} lines, limit {MAX_LINES[kind]}; split the file"


def check_marks(files):
    mark = re.compile(r"DISABLED_|TODO|FIXME|\bXXX\b|not implemented|GTEST_SKIP\(\)\s*;")
    for f in files:
        if f.suffix not in SOURCE_SUFFIXES | {".py", ".sh"} or str(f).startswith("tests/lint/"):
            continue
        for n, line in lines_of(f):
            if mark.search(line):
                yield f, n, "unfinished mark or disabled test"
            if re.search(r"(^|[^\w.])/(work|farm|tmp/golden)/", line):
                yield f, n, "a path of one machine"


def check_headers(files):
    for f in files:
        if f.suffix in (".h", ".cuh") and "#pragma once" not in (ROOT / f).read_text():
            yield f, 1, "missing #pragma once"


def check_names(files):
    banned = re.compile(r"(^|_)(util|utils|helper|helpers|manager|misc|new|v2|fast)(_|\.|$)")
    for f in sources(files):
        if banned.search(f.name):
            yield f, 1, "file name says nothing (util, helper, manager, fast, v2...)"


def check_layout(files):
    for top in sorted({f.parts[0] for f in files}):
        if not top.startswith(".") and top not in TOP_LEVEL:
            yield pathlib.Path(top), 1, "top-level entry outside the fixed list"


def check_format(files):
    names = [str(f) for f in sources(files)]
    if not names:
        return
    run = subprocess.run(["clang-format-14", "--dry-run", "-Werror", *names], cwd=ROOT, capture_output=True, text=True)
    for line in run.stderr.splitlines():
        m = re.match(r"(.*?):(\d+):\d+: error: (.*)", line)
        if m:
            yield pathlib.Path(m.group(1)), int(m.group(2)), m.group(3)


def lines_of(f):
    return enumerate((ROOT / f).read_text(errors="replace").splitlines(), start=1)


RULES = {
    "includes": check_includes, "cuda_headers": check_cuda_headers, "conditionals": check_conditionals,
    "launches": check_launches, "sizes": check_sizes, "marks": check_marks, "headers": check_headers,
    "names": check_names, "layout": check_layout, "format": check_format,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=sorted(RULES), action="append", help="run only this rule (repeatable)")
    args = parser.parse_args()
    files = tracked_files()
    found = 0
    for name in args.rule or RULES:
        for path, line, what in RULES[name](files):
            print(f"{path}:{line}: {name}: {what}")
            found += 1
    print(f"check_rules: {len(files)} files, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
