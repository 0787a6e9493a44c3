"""Sessions that run the tests with other versions of torch, transformers, PEFT and accelerate: docs/versions.md.

Each session has a virtual environment on top of the one that nox is installed in (`make` has it in .venv). pip installs only the
packages that differ; the compiled modules of this checkout serve every version.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import nox

from rode.versions import TRIED

nox.options.default_venv_backend = "venv"
nox.options.sessions = [
    "oldest",
    "newest",
    "transformers",
    "peft",
    "accelerate",
]  # `torch` downloads gigabytes

OLDEST = {name: tried.oldest for name, tried in TRIED.items() if name != "torch"}
NEWEST = {name: tried.newest for name, tried in TRIED.items() if name != "torch"}
# what lies between the oldest and the newest
TRANSFORMERS = ("5.9.0", "5.13.1", "5.18.0", "5.23.0")
PEFT = ("0.21.1",)
ACCELERATE = ("1.6.0", "1.11.0")
TORCH = (TRIED["torch"].oldest, "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.14.1", TRIED["torch"].newest)

KERNELS = (
    "tests/rode_kernels/test_autograd.py",
    "tests/rode_kernels/test_fast_path.py",
    "tests/rode_kernels/test_fast_path_watchers.py",
    "tests/rode_kernels/test_transforms.py",
)
TRAINING = ("tests/rode/training/test_train.py", "tests/rode/training/test_finite.py")
MODELS = ("tests/rode/tuner", "tests/rode/vlm", "tests/rode/baselines", *TRAINING)


def run_tests(session: nox.Session, tests: tuple[str, ...], *requirements: str, **versions: str) -> None:
    """Installs the versions over nox's own environment, and runs `tests`, or what follows `--` on the command line."""
    environment = Path(session.virtualenv.location)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    below = sysconfig.get_path("purelib")
    # .pth files of an environment below are read too: this checkout is installed there with one
    (site_packages / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    session.install("--quiet", *requirements, *(f"{name}=={version}" for name, version in versions.items()))
    session.run("python", "-m", "pip", "list", "--path", str(site_packages))
    session.run(
        *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"),
        *(session.posargs or tests),
        env={"RODE_EMULATE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )


@nox.session(venv_params=["--without-pip"])
def oldest(session: nox.Session) -> None:
    """The oldest versions but torch's"""
    run_tests(session, MODELS, **OLDEST)


@nox.session(venv_params=["--without-pip"])
def newest(session: nox.Session) -> None:
    """The newest versions but torch's"""
    run_tests(session, MODELS, **NEWEST)


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("version", TRANSFORMERS, ids=TRANSFORMERS)
def transformers(session: nox.Session, version: str) -> None:
    """One transformers, the rest as installed"""
    run_tests(session, MODELS, transformers=version)


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("version", PEFT, ids=PEFT)
def peft(session: nox.Session, version: str) -> None:
    """One PEFT, the rest as installed"""
    run_tests(session, MODELS, peft=version)


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("version", ACCELERATE, ids=ACCELERATE)
def accelerate(session: nox.Session, version: str) -> None:
    """One accelerate, the rest as installed"""
    tests = ("tests/rode/tuner/test_placement.py", "tests/rode/tuner/test_aux_losses.py", *TRAINING)
    run_tests(session, tests, accelerate=version)


@nox.session(venv_params=["--without-pip"])
@nox.parametrize("version", TORCH, ids=TORCH)
def torch(session: nox.Session, version: str) -> None:
    """One torch, by hand: from PyPI it comes with CUDA"""
    # Triton 3.5 and older, which torch before 2.10 brings, interprets no kernel with numpy 2.4
    old = ("numpy<2.4",) if version.startswith(("2.8.", "2.9.")) else ()
    run_tests(session, (*KERNELS, *MODELS), *old, torch=version)
