"""The project's commands: `nox -s verify`, `experiments`, `conformance`, `oracle`, `lint`."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["verify", "oracle", "lint"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def install(session: nox.Session, *requirements: str) -> None:
    """Install at the versions that constraints.txt pins."""
    session.install("-c", "constraints.txt", *requirements)


@nox.session
def verify(session: nox.Session) -> None:
    """Hold the engine to the reference, and print the ledger of the papers' claims.

    Takes pytest's arguments: `nox -s verify -- -k dense --hypothesis-profile=thorough`.
    """
    install(session, "-e", ".[verify]")
    # Parallel workers, one thread each: the tests' matrices are small.
    arguments = session.posargs or ["-n", "auto", "--dist", "worksteal"]
    session.run("pytest", *arguments, env=ONE_THREAD)


@nox.session
def experiments(session: nox.Session) -> None:
    """Run experiments and write their report to results/.

    Takes names and options: `nox -s experiments -- p22-fig3 --preset smoke`; without names the
    default suite, which needs no download.
    """
    install(session, "-e", ".[experiments]")
    session.run("python", "-m", "experiments", "run", *session.posargs, env=ONE_THREAD)


@nox.session
def conformance(session: nox.Session) -> None:
    """Run the conformance kit's deep suite on an update rule, a third party's for example.

    Takes the rule and pytest's arguments: `PYTHONPATH=folder nox -s conformance --
    --rule=package.module:Class`; without a rule a handful of the engine's.
    """
    install(session, "-e", ".[verify]")
    session.run("pytest", "verification/conformance", *session.posargs, env=ONE_THREAD)


@nox.session
def oracle(session: nox.Session) -> None:
    """Run the reference's own tests, and the theory that it decides, without torch."""
    install(session, "numpy", "scipy", "hypothesis", "mpmath", "pytest", "pytest-xdist", "rich")
    session.run(
        "python",
        "-c",
        "import importlib.util as u; assert u.find_spec('torch') is None, 'torch is installed'",
    )
    levels = [f"verification/{level}" for level in ("l0_oracle", "l4_asymptotics", "necessity")]
    session.run(
        "pytest", *levels, "-n", "auto", "--dist", "worksteal", *session.posargs, env=ONE_THREAD
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, the import rule and types."""
    install(session, "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("pyright")
