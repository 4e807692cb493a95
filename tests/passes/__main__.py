# SPDX-License-Identifier: Apache-2.0
"""python -m tests.passes NAME [SECONDS]: what passes cost and whether they harm, as JSON.

docs/design/late-join.md has the results. The exit status is 1 if there are problems.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.passes", description=__doc__)
    parser.add_argument("name", choices=("cost", "close", "latency", "churn", "mptcp", "leaving"))
    parser.add_argument("rest", nargs="*", help="SECONDS, and the like")
    arguments = parser.parse_args()
    module = importlib.import_module(f"tests.passes.{arguments.name}")
    numbers = [float(word) if word[0].isdigit() else word for word in arguments.rest]
    found = module.main(*numbers)
    json.dump(found, sys.stdout, indent=1)
    print()
    return bool(found.get("problems"))


if __name__ == "__main__":
    sys.exit(main())
