#!/usr/bin/env python3
"""Counts test cases in a `ctest -V` log: GoogleTest and pytest binaries by their own closing lines, everything else as one.

Usage: count_results.py LOG...   Prints the failing tests and `N passed, N failed`; exit status 1 if any failed or none ran.
"""
import collections
import re
import sys


def count(log_text):
    passed, failed, bad = 0, 0, []
    cases = collections.defaultdict(lambda: [0, 0])  # ctest number -> [passed, failed]
    for line in log_text.splitlines():
        m = re.match(r"(\d+): .*?\[  PASSED  \] (\d+) tests?", line)
        if m:
            cases[m.group(1)][0] += int(m.group(2))
        m = re.match(r"(\d+): .*?\[  FAILED  \] (\d+) tests?, listed below", line)
        if m:
            cases[m.group(1)][1] += int(m.group(2))
        m = re.match(r"(\d+): =+ .*?in [\d.]+s", line)
        if m:
            for n, what in re.findall(r"(\d+) (passed|failed|errors?)", line):
                cases[m.group(1)][0 if what == "passed" else 1] += int(n)
        m = re.match(r"\s*\d+/\d+ Test\s+#(\d+): (\S+) \.*\s*(.*)", line)
        if m:
            number, name, result = m.groups()
            ok = result.startswith("Passed")
            p, f = cases[number]
            if ok:
                passed += p if p else 1
            else:
                passed += p
                failed += max(f, 1)
                bad.append(f"{name}: {result.strip()}")
    return passed, failed, bad


def main():
    passed, failed = 0, 0
    for path in sys.argv[1:]:
        with open(path, errors="replace") as log:
            p, f, bad = count(log.read())
        for name in bad:
            print(f"FAILED {name}  (see {path})")
        passed += p
        failed += f
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
