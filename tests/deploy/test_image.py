"""Dockerfile and scripts, as far as they can be judged without building an image."""

import pathlib
import re
import sys

import pytest
import yaml
from conftest import CHART, ROOT, run

DOCKERFILE = ROOT / "deploy/Dockerfile"


def instructions():
    """(keyword, arguments) of every instruction, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, arguments = line.strip().partition(" ")
            yield keyword, arguments.strip()


def stages():
    """Stage name -> (parent, its instructions)."""
    found = {}
    for keyword, arguments in instructions():
        if keyword == "FROM":
            parent, _, name = arguments.partition(" AS ")
            found[name] = (parent, [])
        else:
            found[name][1].append((keyword, arguments))
    return found


def apt_packages(stage):
    """What the stage itself installs."""
    for keyword, arguments in stages()[stage][1]:
        for command in arguments.split("&&") if keyword == "RUN" else ():
            if "apt-get install" in command:
                yield from (w for w in command.split()[2:] if not w.startswith("-"))


def copied_from_context():
    """Sources of COPY that come from the repository."""
    for keyword, arguments in instructions():
        if keyword == "COPY" and not arguments.startswith("--from="):
            yield from arguments.split()[:-1]


def test_hadolint_finds_nothing():
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    result = run(hadolint, "--failure-threshold", "style", DOCKERFILE)
    assert (result.code, result.stdout) == (0, "")


def test_shell_scripts_are_clean():
    scripts = [*ROOT.glob("deploy/*.sh"), *ROOT.glob("tests/**/*.sh"), ROOT / ".ci/run"]
    result = run("shellcheck", "--severity=warning", *scripts)
    assert (result.code, result.stdout) == (0, "")


def test_every_copied_path_exists_and_is_let_into_the_build():
    ignore = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source.rstrip("/") for source in copied_from_context()}
    assert copied == let_in
    for source in copied:
        assert (ROOT / source).exists(), source


def test_every_folder_that_the_build_needs_is_copied():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    needed = set(re.findall(r"^add_subdirectory\((\w+)\)", cmake, re.MULTILINE))
    assert {"kernels", "server"} <= needed
    assert needed <= {source.rstrip("/") for source in copied_from_context()}


def test_stages_exist_and_images_run_as_the_charts_user():
    found = stages()
    for parent, content in found.values():
        assert parent in found or re.fullmatch(r"[\w./-]+:[\w.-]+", parent)
        for keyword, arguments in content:
            source = re.match(r"--from=(\S+)", arguments) if keyword == "COPY" else None
            assert source is None or source[1] in found
    chart = yaml.safe_load(
        run("sed", "-n", "/podSecurityContext/,/end/p", CHART / "templates/_helpers.tpl")
        .stdout.split("-}}", 1)[1]
        .split("{{")[0]
    )
    for target in ("cpu", "cuda", "model-smollm2"):
        users = [arguments for keyword, arguments in found[target][1] if keyword == "USER"]
        assert users == [f"{chart['runAsUser']}:{chart['runAsGroup']}"], target


def installed(package):
    """The package's dependencies if it is installed, else None."""
    query = run("dpkg-query", "-W", "-f=${db:Status-Status} ${Depends}", package)
    status, _, depends = query.stdout.partition(" ")
    if query.code != 0 or status != "installed":
        return None
    return re.findall(r"(?:^|[,|])\s*([\w.+-]+)", depends)


@pytest.mark.parametrize("package", sorted(apt_packages("runtime")))
def test_every_package_of_the_image_exists(package):
    assert installed(package) is not None or run("apt-cache", "show", package).code == 0


def test_the_image_holds_every_library_of_the_daemon(coppiced):
    in_image, todo = {"libc6"}, list(apt_packages("runtime"))
    while todo:
        package = todo.pop()
        if package not in in_image:
            in_image.add(package)
            todo += installed(package) or []
    linked = re.findall(r"=> (/\S+)", run("ldd", coppiced).stdout)
    linked = [path.removeprefix("/usr") for path in linked if "/cuda" not in path]  # cuda image
    assert len(linked) > 20
    # Debian lists some libraries below /lib, some below /usr/lib.
    found = run("dpkg", "-S", *linked, *("/usr" + path for path in linked)).stdout
    owners = {
        path.removeprefix("/usr"): line.partition(":")[0]
        for line in found.splitlines()
        for path in [line.split()[-1]]
    }
    assert {path: owners.get(path) for path in linked if owners.get(path) not in in_image} == {}


def test_the_smollm2_values_name_the_file_that_the_script_fetches():
    script = (ROOT / "deploy/fetch_model.sh").read_text()
    (model,) = re.findall(r"MODEL='build(/models/\S+)'", script)
    values = yaml.safe_load((CHART / "values-cpu.yaml").read_text())
    assert values["model"]["path"] == model
