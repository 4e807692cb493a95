"""tcpip-bypass-node: what an operator, or the agent, does to one node."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bpf.loader import LoadError
from cni_plugin import names
from cni_plugin.attachment import NotLoaded
from install import commands


def build_parser() -> argparse.ArgumentParser:
    """The command line; every command takes the two folders."""
    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument(
        "--bpffs", type=Path, default=Path(names.BPFFS), metavar="DIR", help="default: %(default)s"
    )
    folders.add_argument(
        "--state-dir",
        type=Path,
        default=Path(names.STATE_DIR),
        metavar="DIR",
        help="default: %(default)s",
    )
    parser = argparse.ArgumentParser(prog="tcpip-bypass-node", description=__doc__)
    commands_of = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands_of.add_parser(
            name, parents=[folders], help=help_text, description=help_text
        )

    command("load", "Compile the programs for this kernel and pin them; running pods move over.")
    command("unload", "Send all connections back to TCP, detach every pod and unpin everything.")
    status = command("status", "Show whether this node accelerates, and its pods' counters.")
    status.add_argument("--json", action="store_true", help="for machines")
    selftest = command("selftest", "Try this kernel and say what may be switched on here.")
    selftest.add_argument("--json", action="store_true", help="for machines")
    command("pause", "Send all bytes by TCP, from the next message on, until `resume`.")
    command("resume", "Let connections bypass TCP/IP again.")
    return parser


def main() -> int:
    """The entry point; returns the exit status."""
    arguments = build_parser().parse_args()
    said = f"tcpip-bypass-node {arguments.command}:"
    if os.geteuid() != 0:
        print(f"{said} this must run as root", file=sys.stderr)
        return 1
    node = commands.Node(arguments.bpffs, arguments.state_dir)
    command = getattr(commands, arguments.command)
    try:
        if arguments.command in ("status", "selftest"):
            command(node, as_json=arguments.json)
        else:
            command(node)
    except (commands.NodeError, LoadError, NotLoaded, OSError) as error:
        print(f"{said} {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
