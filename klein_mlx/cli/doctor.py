"""`klein-mlx doctor`: whether this machine, this MLX and this installation compute what they should.

A table on stdout, or one JSON object (`--json`), or text to paste into an issue (`--report`); progress and one line per
failing check on stderr.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.output import note, printable, say, say_json

if TYPE_CHECKING:
    from klein_mlx.bench.checks import Check, Setting
    from klein_mlx.bench.doctor import Finding

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `klein-mlx doctor`."""
    add = parser.add_argument
    add(
        "--only",
        action="append",
        metavar="NAME",
        help="run one check or section only, such as attention (repeat for more)",
    )
    add("-m", "--model", help="check real weights too: files, configs, published pixels, bits; takes minutes more")
    add("-y", "--yes", action="store_true", help="download the model without asking")
    add("--offline", action="store_true", help="use only what is on disk")
    add("--dtype", help="the compute dtype under test: bfloat16, float16, float32 (default: as in generate)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    kinds.add_argument("--report", action="store_true", help="print text for an issue, without user name and paths")


def run(args: argparse.Namespace) -> int:
    """Run the checks. Returns 0 if all hold, 2 if one does not; raises KleinError."""
    from klein_mlx.bench.doctor import chosen, make_setting

    model = None
    if args.model:
        from klein_mlx.cli.download import Consent, obtain

        model = obtain(args.model, consent=Consent(args.offline, args.yes, quiet=args.json))
    checks, start = chosen(args.only, model), time.perf_counter()
    setting, findings = make_setting(args.dtype), []
    table = not (args.json or args.report)
    for finding in _findings(checks, setting):
        if table:
            _print_row(finding, findings[-1].section if findings else "")
        findings.append(finding)
    seconds = time.perf_counter() - start
    failing = [finding.row for finding in findings if finding.row.holds is False]
    verdict = f"{len(failing)} of {len(findings)} rows fail" if failing else "all checks hold"
    if args.json:
        say_json(_as_json(findings, setting, seconds))
    elif args.report:
        say(*_report(findings, verdict, seconds).split("\n"))
    else:
        say("", f"{verdict} ({seconds:.0f} s)")
    for row in failing:
        note(f"error: {row.name}: {row.text}: {row.remedy}")
    return 2 if failing else 0


def _findings(checks: "list[Check]", setting: "Setting") -> "Iterator[Finding]":
    """The checks' findings as they come, with the running check's name on a terminal's last line."""
    from klein_mlx.bench.checks import Row
    from klein_mlx.bench.doctor import Finding, examine

    for number, check in enumerate(checks, start=1):
        shown = f"[{number}/{len(checks)}] {check.name} ..."
        _progress(shown)
        for finding in examine(check, setting):
            _progress("")
            yield finding
            _progress(shown)
        _progress("")
        if check.name == "environment":
            from klein_mlx.cli.terminal import protocol

            kind = protocol(os.environ) if sys.stdout.isatty() else None
            yield Finding("environment", Row("environment", f"pictures in this terminal: {kind or 'none'}"))


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{printable(line)}")
        sys.stderr.flush()


def _mark(holds: bool | None) -> str:
    return {None: "    ", True: "ok  ", False: "FAIL"}[holds]


def _print_row(finding: "Finding", before: str) -> None:
    if finding.section != before:
        say(*[""] * bool(before), finding.section)
    row = finding.row
    say(f"  {_mark(row.holds)}  {row.name:<14}  {row.text}")
    if row.holds is False:
        say(f"        {'':<14}  -> {row.remedy}")


def _as_json(findings: "list[Finding]", setting: "Setting", seconds: float) -> dict[str, Any]:
    rows = [
        {
            "section": section,
            "name": row.name,
            "text": row.text,
            "holds": row.holds,
            **({"remedy": row.remedy} if row.holds is False else {}),
            **({"figures": row.figures} if row.figures else {}),
        }
        for section, row in findings
    ]
    return {
        "ok": not any(row["holds"] is False for row in rows),
        "dtype": str(setting.dtype).removeprefix("mlx.core."),
        "gpu": setting.gpu,
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def _report(findings: "list[Finding]", verdict: str, seconds: float) -> str:
    """Markdown that an issue takes as it is."""
    from klein_mlx.bench.doctor import private

    lines = ["```", f"klein-mlx doctor: {verdict} ({seconds:.0f} s)"]
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(f"[{section}]")
        lines.append(f"{_mark(finding.row.holds)} {finding.row.name}: {private(finding.row.text)}")
    return "\n".join([*lines, "```"])
