"""The commands: `nox -s verify`, experiments, conformance, oracle, peers, mutate, detect, coverage,
lint."""

from __future__ import annotations

import os

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

    Takes pytest's arguments, `--profile NAME` for Hypothesis' (quick, ci, random, thorough), and
    writes results/ledger.json and .html: `nox -s verify -- -k dense --profile thorough`.
    """
    install(session, "-e", ".[peers]")
    profile = [
        argument.replace("--profile", "--hypothesis-profile") for argument in session.posargs
    ]
    # Parallel workers, one thread each: the tests' matrices are small. `-n 0` turns them off.
    arguments = ["-n", "auto", "--dist", "worksteal", "--verify-report=results", *profile]
    session.run("pytest", *arguments, env=ONE_THREAD)


@nox.session
def peers(session: nox.Session) -> None:
    """Compare with other people's code alone: curvlinops, TorchOpt."""
    install(session, "-e", ".[peers]")
    session.run("pytest", "verification/differential", *session.posargs, env=ONE_THREAD)


@nox.session
def experiments(session: nox.Session) -> None:
    """Run experiments and write their report to results/.

    Takes names and options: `nox -s experiments -- p22-fig3 --preset smoke`; without names the
    default suite, which needs no download. Population based training brings Ray, 0.5 GB.
    """
    extra = "sweep" if "p18-fig15" in session.posargs else "experiments"
    install(session, "-e", f".[{extra}]")
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
def mutate(session: nox.Session) -> None:
    """Change one operation of the numerical core at a time, and see whether a test notices.

    An interrupted run goes on. Takes the budget in minutes, a sample and more:
    `nox -s mutate -- --budget 20 --sample 500 --seed 1 --jobs 4`.
    """
    install(session, "-e", ".[verify]")
    arguments = session.posargs or ["--budget", "120", "--jobs", str(os.cpu_count() or 1)]
    session.run("python", "-m", "verification.mutation", *arguments, env=ONE_THREAD)


@nox.session
def detect(session: nox.Session) -> None:
    """Measure the smallest relative error of each core quantity that the suite notices.

    Takes options: `nox -s detect -- --only EKFAC --report results/detection`.
    """
    install(session, "-e", ".[verify]")
    arguments = session.posargs or ["--jobs", str(os.cpu_count() or 1)]
    session.run("python", "-m", "verification.detection", *arguments, env=ONE_THREAD)


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure which lines and branches of the engine and the oracle the suite runs.

    Writes results/coverage and verification/reports/coverage.md, and fails where a line has neither
    run nor a reason. Takes pytest's arguments, and then only prints:
    `nox -s coverage -- verification/l0_oracle`.
    """
    install(session, "-e", ".[peers,coverage]")
    session.run("coverage", "erase")
    arguments = ["-n", "auto", "--dist", "worksteal", "--hypothesis-profile", "quick"]
    session.run("coverage", "run", "-m", "pytest", *arguments, *session.posargs, env=ONE_THREAD)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "html", "--quiet", "--directory", "results/coverage")
    session.run("coverage", "report")
    if not session.posargs:
        session.run("coverage", "json", "--quiet", "-o", "results/coverage.json")
        session.run("python", "-m", "verification.coverage_report", "results/coverage.json")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, the import rule and types."""
    install(session, "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("pyright")
