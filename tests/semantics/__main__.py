# SPDX-License-Identifier: Apache-2.0
"""python -m tests.semantics: what an application can see of the bypass on this kernel."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.semantics import report
from tests.semantics.runner import run_all, troubles
from tests.semantics.scenario import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.semantics", description=__doc__)
    parser.add_argument("scenario", nargs="*", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="bring the page docs/limits.md up to date"
    )
    parser.add_argument("--jobs", type=int, default=4, help="scenarios run at once (default 4)")
    arguments = parser.parse_args()
    unknown = set(arguments.scenario) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    findings, runs = run_all(arguments.scenario, jobs=arguments.jobs)
    if arguments.json:
        print(report.as_json(findings, runs))
    else:
        report.print_table(findings, runs)
    if arguments.write:
        page = report.limits_page(arguments.write.read_text(), findings)
        arguments.write.write_text(page)
    return 1 if troubles(runs) or report.undocumented(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
