# SPDX-License-Identifier: Apache-2.0
"""tcpip-bypass-node: what an operator, or the agent, does to one node."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bpf.loader import LoadError
from cni_plugin import names
from cni_plugin.attachment import NotLoaded
from install.program import (
    VERSION,
    bugreport,
    commands,
    examples,
    exits,
    host,
    installer,
    log,
    paths,
)
from install.program.check import command as check
from install.program.lock import FolderLock
from install.program.node import Node, NodeError
from install.program.plugin_files import InstallError

_CONF_JSON_HELP = (
    "keys of our entry, see docs/cni.md; without this option those of an entry that is there stay"
)


def _places() -> argparse.ArgumentParser:
    """Where the node's CNI folders are."""
    places = argparse.ArgumentParser(add_help=False)
    for option, default, help_text in (
        ("--cni-conf-dir", paths.CNI_CONF_DIR, "the network configurations"),
        ("--cni-bin-dir", paths.CNI_BIN_DIR, "the plugins' programs"),
        ("--plugin-dir", paths.plugin_dir(), "the frozen plugin to install"),
    ):
        _folder_option(places, option, default, help_text)
    _host_proc_option(places)
    return places


def _folder(text: str) -> Path:
    """The runtime starts the plugin in another folder, and the agent starts its child in one."""
    return Path(text).absolute()


def _folder_option(
    parser: argparse.ArgumentParser, option: str, default: Path, help_text: str
) -> None:
    parser.add_argument(
        option,
        type=_folder,
        default=default,
        metavar="DIR",
        help=f"{help_text}; default: %(default)s",
    )


def _host_proc_option(parser: argparse.ArgumentParser) -> None:
    _folder_option(parser, "--host-proc", host.node_proc(), "the /proc of the host")


def places_of(arguments: argparse.Namespace) -> installer.Places:
    """What the options of _places() say."""
    return installer.Places(
        arguments.cni_conf_dir, arguments.cni_bin_dir, arguments.plugin_dir, arguments.host_proc
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("expected 0.1 to 3600 seconds")
    return seconds


def _cri_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cri-socket",
        metavar="PATH",
        help="the container runtime's; default: the first of the well-known ones that is there",
    )


def _measuring_options(parser: argparse.ArgumentParser, seconds: float, seconds_help: str) -> None:
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=seconds,
        metavar="N",
        help=f"{seconds_help}; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def _mending() -> argparse.ArgumentParser:
    """The options of commands that try the kernel: a parent of theirs."""
    parser = argparse.ArgumentParser(add_help=False)
    _folder_option(parser, "--cni-conf-dir", paths.CNI_CONF_DIR, "the network configurations")
    parser.add_argument(
        "--fionread",
        choices=names.FIONREAD_CHOICES,
        help="what to do where the kernel gets FIONREAD wrong; default: as our entry says, or mend",
    )
    return parser


def _agent_options(parser: argparse.ArgumentParser) -> None:
    _cri_option(parser)
    parser.add_argument("--conf-json", metavar="FILE|JSON", help=_CONF_JSON_HELP)
    parser.add_argument(
        "--daemonset",
        metavar="NAMESPACE/NAME",
        help="the DaemonSet that the agent is of: when it is deleted, uninstall on SIGTERM",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="serve probes (/startupz, /healthz, /readyz) and /metrics there",
    )
    parser.add_argument(
        "--per-pod-metrics", action="store_true", help="also series for each pod, in /metrics"
    )
    parser.add_argument(
        "--switch-dir",
        type=_folder,
        metavar="DIR",
        help="where the ConfigMap is mounted that holds for the whole cluster",
    )
    parser.add_argument("--once", action="store_true", help="do everything once, and end")


def build_parser() -> argparse.ArgumentParser:
    """The command line; every command takes the two folders and the form of log lines."""
    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument(
        "--bpffs",
        type=_folder,
        default=Path(names.BPFFS),
        metavar="DIR",
        help="default: %(default)s",
    )
    folders.add_argument(
        "--state-dir",
        type=_folder,
        default=Path(names.STATE_DIR),
        metavar="DIR",
        help="default: %(default)s",
    )
    folders.add_argument(
        "--log-format",
        choices=log.FORMATS,
        help="of the lines on stderr; default: logfmt for the agent, else plain",
    )
    folders.add_argument(
        "--log-level",
        choices=log.LEVELS,
        default=log.LEVELS[0],
        help="the least grave lines on stderr; default: %(default)s",
    )
    parser = argparse.ArgumentParser(prog="tcpip-bypass-node", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    commands_of = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, help_text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        return commands_of.add_parser(
            name, parents=[folders, *parents], help=help_text, description=help_text
        )

    load = command(
        "load",
        "Compile the programs for this kernel and pin them; running pods move over.",
        _mending(),
    )
    _host_proc_option(load)
    command("unload", "Send all connections back to TCP, detach every pod and unpin everything.")
    status = command("status", "Show whether this node accelerates, and its pods' counters.")
    _folder_option(status, "--cni-conf-dir", paths.CNI_CONF_DIR, "the network configurations")
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="live, with what is counted per second; anew every SECONDS, default 2",
    )
    selftest = command(
        "selftest", "Try this kernel and say what may be switched on here.", _mending()
    )
    selftest.add_argument("--json", action="store_true", help="for machines")
    places = _places()
    checking = command("check", "Say whether this node is well, and what to do if not.", places)
    _cri_option(checking)
    check.options(checking)
    reporting = command(
        "bugreport", "Put what is needed to find a fault here into one archive.", places
    )
    _cri_option(reporting)
    bugreport.options(reporting)
    estimating = command(
        "estimate", "Say what would bypass here; loads and writes nothing.", places
    )
    _cri_option(estimating)
    estimating.add_argument("--conf-json", metavar="FILE|JSON", help=_CONF_JSON_HELP)
    _measuring_options(estimating, 10.0, "how long to look")
    comparing = command("compare", "Pause and resume a few times, and say what the bypass brings.")
    _host_proc_option(comparing)
    _measuring_options(comparing, 120.0, "how long it may take")
    install = command("install", "Put the plugin and its entry in place, or repair them.", places)
    install.add_argument("--conf-json", metavar="FILE|JSON", help=_CONF_JSON_HELP)
    uninstall = command(
        "uninstall", "Take our entry, then the programs, then the plugin off this node.", places
    )
    uninstall.add_argument(
        "--purge",
        action="store_true",
        help="leave not even the stub with which pods can end that the plugin has seen",
    )
    gc = command("gc", "Undo what is recorded for pods that the runtime no longer has.", places)
    _cri_option(gc)
    gc.add_argument("--adopt", action="store_true", help="and accelerate those that we missed")
    gc.add_argument("--json", action="store_true", help="for machines")
    join = command("join", "Let connections join the bypass as they become known, until ended.")
    join.add_argument(
        "--parent", type=int, metavar="PID", help="end with this process, which has started it"
    )
    _agent_options(command("agent", "Do all of this, and keep it so until it is ended.", places))
    one_pod = argparse.ArgumentParser(add_help=False)
    one_pod.add_argument(
        "--pod", metavar="NAMESPACE/NAME", help="only what goes to and from this pod"
    )
    command("pause", "Send all bytes by TCP, from the next message on, until `resume`.", one_pod)
    command("resume", "Let connections bypass TCP/IP again, those of single pods too.", one_pod)
    examples.add_to(parser, commands_of.choices)
    return parser


def main() -> int:
    """The entry point; returns the exit status."""
    arguments = build_parser().parse_args()
    said = f"tcpip-bypass-node {arguments.command}:"
    failed = exits.NOT if arguments.command in exits.REPORTING else 1
    if os.geteuid() != 0:
        print(f"{said} this must run as root", file=sys.stderr)
        return failed
    is_agent = arguments.command == "agent"
    arguments.log_format = arguments.log_format or ("logfmt" if is_agent else "plain")
    log.setup(arguments.log_format, arguments.log_level)
    conf_dir = getattr(arguments, "cni_conf_dir", None)
    fionread = getattr(arguments, "fionread", None)
    node = Node(arguments.bpffs, arguments.state_dir, conf_dir, fionread)
    try:
        return _run(node, arguments)
    except (NodeError, InstallError, LoadError, NotLoaded, OSError) as error:
        log.error("failed", f"{said} {error}", command=arguments.command)
        return failed


def _run(node: Node, arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    command = arguments.command
    if command in ("uninstall", "unload"):
        _refuse_beside_an_agent(node)
    if command in _LOOKING:
        return _LOOKING[command](node, arguments)
    if command in ("agent", "gc"):
        from install.program.agent import command as of_agent  # noqa: PLC0415 - brings a web server

        run = of_agent.agent if command == "agent" else of_agent.gc
        return run(node, places_of(arguments), arguments)
    if command == "compare":
        from install.program import compare  # noqa: PLC0415 - pyroute2: 130 ms

        return compare.run(node, arguments.host_proc, arguments)
    if command == "load":
        commands.load(node, arguments.host_proc)
    elif command == "install":
        options = installer.options_of(arguments.conf_json)
        commands.install(node, places_of(arguments), options)
    elif command == "uninstall":
        commands.uninstall(node, places_of(arguments), purge=arguments.purge)
    elif command == "join":
        log.keep(node.state_dir, names.JOINER_LOGS)
        commands.join(node, parent=arguments.parent)
    elif command in ("pause", "resume"):
        (commands.pause if command == "pause" else commands.resume)(node, arguments.pod)
    else:
        getattr(commands, command)(node)
    return 0


def _estimate(node: Node, arguments: argparse.Namespace) -> int:
    from install.program.estimate import command as estimate  # noqa: PLC0415 - pyroute2: 130 ms

    return estimate.run(node, places_of(arguments), arguments)


# Those that change nothing on the node.
_LOOKING: dict[str, Callable[[Node, argparse.Namespace], int]] = {
    "bugreport": lambda node, given: bugreport.run(node, places_of(given), given),
    "check": lambda node, given: check.run(node, places_of(given), given),
    "estimate": _estimate,
    "selftest": lambda node, given: commands.selftest(node, as_json=given.json),
    "status": lambda node, given: commands.status(node, as_json=given.json, watch_s=given.watch),
}


def _refuse_beside_an_agent(node: Node) -> None:
    """It would put everything back at once. Raises NodeError."""
    if not node.state_dir.exists():
        return
    lock = FolderLock(node.state_dir)
    try:
        if not lock.take():
            raise NodeError(
                "an agent runs on this node, and would put everything back; "
                "to switch off: pause; to remove: delete the agent's DaemonSet"
            )
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
