"""The command line: `python -m experiments list | run NAME… | report DIR`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.data import DataError
from experiments.parallel import cores
from experiments.provenance import CHECKOUT
from experiments.records import RecordError, read_records
from experiments.registry import PRESETS, Experiment, experiments
from experiments.report import found_records, write_report
from experiments.report_text import print_sections
from experiments.runner import record_folder, run_experiment
from experiments.watch import BarWatch, LineWatch, Watch

# What runs where no name is given: needs no download, and some minutes on two cores.
EMBEDDED_SUITE = ("digits", "p22-fig7", "p22-fig4-left")
COMMITTED = CHECKOUT / "experiments" / "results"  # the records that tell how long each takes
INTERRUPTED = 130  # what a shell expects after Ctrl-C


def main(
    arguments: Sequence[str] | None = None, catalogue: Mapping[str, Experiment] | None = None
) -> int:
    """Run the command line; 0 means that all that was asked for was done, 1 that some failed.

    Args:
        arguments: The words after the program's name; those of this process where None.
        catalogue: The experiments to choose from; the registered ones where None.
    """
    catalogue = experiments() if catalogue is None else catalogue
    options = _parser(catalogue).parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        return options.command(options, catalogue, console)
    except (DataError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser(catalogue: Mapping[str, Experiment]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="list | run | report")
    listing = commands.add_parser("list", help="show every experiment")
    listing.set_defaults(command=_list)
    run = commands.add_parser("run", help="run experiments, then report")
    run.set_defaults(command=_run)
    run.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        type=_name_in(catalogue),
        help=f"experiments of `list`; without any: {', '.join(EMBEDDED_SUITE)}",
    )
    run.add_argument(
        "--preset", choices=PRESETS, default="default", help="scale (default: %(default)s)"
    )
    run.add_argument(
        "--seeds",
        type=_positive("--seeds", "for the preset's own number."),
        metavar="N",
        help="how many seeds (default: the preset's)",
    )
    run.add_argument(
        "--jobs",
        type=_positive("--jobs", "for as many as there are cores."),
        metavar="N",
        help="how many trials at a time, each with one thread where there are several (default: "
        "the number of cores; 1 on another device than the CPU)",
    )
    run.add_argument(
        "--device", type=_device, default="cpu", help="torch device (default: %(default)s)"
    )
    run.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s/"
    )
    report = commands.add_parser("report", help="write the report of recorded trials again")
    report.set_defaults(command=_report)
    report.add_argument("out", type=Path, metavar="DIR", help="the folder that `run` had as --out")
    return parser


def _list(
    options: argparse.Namespace, catalogue: Mapping[str, Experiment], console: Console
) -> int:
    del options
    table = Table("name", "what", "source", "data", "claims", "one core", title="Experiments")
    for name, one in catalogue.items():
        data = ", ".join(one.datasets) or "synthetic"
        table.add_row(
            name,
            one.title,
            one.source,
            data if one.embedded else f"{data} (downloaded)",
            ", ".join(one.claims),
            _minutes(name),
        )
    console.print(table)
    console.print('"one core": the time of all trials of the preset `default` on one core.')
    return 0


def _minutes(name: str) -> str:
    """The time of the committed records, "–" where there are none."""
    records = read_records(record_folder(COMMITTED, "default", name)).values()
    minutes = round(sum(record.seconds for record in records) / 60)
    return f"{max(minutes, 1)} min" if records else "–"


def _run(options: argparse.Namespace, catalogue: Mapping[str, Experiment], console: Console) -> int:
    names = list(dict.fromkeys(options.names or EMBEDDED_SUITE))
    watch: Watch = (
        BarWatch(console)
        if console.is_terminal
        else LineWatch(lambda text: print(text, flush=True))
    )
    failures: list[str] = []
    try:
        for name in names:
            try:
                tally = run_experiment(
                    catalogue[name],
                    options.preset,
                    options.out,
                    watch,
                    seeds=options.seeds,
                    device=options.device,
                    jobs=options.jobs or (cores() if options.device == "cpu" else 1),
                )
            except DataError as error:
                failures.append(f"{name} did not run: {error}")
            else:
                failures += [f"trial {trial} of {name} failed" for trial in tally.failed]
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. The finished trials are recorded in {options.out}; the same command "
            "resumes with the first that is not.",
            file=sys.stderr,
        )
        return INTERRUPTED
    if found_records(options.out):
        failures += _write_report(options.out, catalogue, console, only=names)
    return _told(failures)


def _report(
    options: argparse.Namespace, catalogue: Mapping[str, Experiment], console: Console
) -> int:
    return _told(_write_report(options.out, catalogue, console, only=None))


def _write_report(
    out: Path,
    catalogue: Mapping[str, Experiment],
    console: Console,
    only: Sequence[str] | None,
) -> list[str]:
    """Report on all records below `out`, print the tables of `only`; return what failed."""
    report = write_report(out, catalogue)
    shown = [one for one in report.sections if only is None or one.experiment in only]
    print_sections(shown, console)
    console.print(f"Report: {report.page}", highlight=False, soft_wrap=True)
    return report.failures


def _told(failures: Sequence[str]) -> int:
    """Print what failed; the exit code."""
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _name_in(catalogue: Mapping[str, Experiment]):
    def name(text: str) -> str:
        if text in catalogue:
            return text
        near = difflib.get_close_matches(text, catalogue, n=1)
        raise argparse.ArgumentTypeError(
            f"`NAME` must be an experiment, one of {', '.join(catalogue)}, got {text!r}"
            + (f"; did you mean {near[0]}?" if near else "; `list` describes them.")
        )

    return name


def _positive(option: str, otherwise: str):
    def positive(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) > 0:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"`{option}` must be a whole number of at least 1, got {text!r}; leave it out "
            f"{otherwise}"
        )

    return positive


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        choices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(
            f"`--device` must be a device of this machine, one of {', '.join(choices)}, got "
            f"{text!r}; leave it out to run on the CPU."
        ) from error
    return text


if __name__ == "__main__":
    sys.exit(main())
