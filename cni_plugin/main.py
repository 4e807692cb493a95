# SPDX-License-Identifier: Apache-2.0
"""The program: one CNI call, one JSON document on stdout, one exit code.

It is exec'd for every pod of the node, also for those that are not accelerated. So each command
imports only what it needs, where it needs it.
"""

# ruff: noqa: PLC0415 - imports inside functions are this module's purpose

from __future__ import annotations

import os

from cni_plugin import names

TYPE_CHECKING = False  # as typing has it, without importing typing (2.5 ms)
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni_plugin.protocol import Json, Request

MUST_WORK = ("DEL", "STATUS", "CHECK")  # whatever has become of the program


def main() -> int:
    """Returns the exit code: 0, or 1 with an error result on stdout.

    Raises ImportError if not even the call can be read: start.c then answers.
    """
    _occupy_standard_descriptors()
    document, code = run(os.environ, 0)
    if document and not _write(1, document + "\n"):
        return 1
    return code


def run(env: Mapping[str, str], stdin: int) -> tuple[str, int]:
    """What goes to stdout, and the exit code; ``stdin`` is a file descriptor."""
    if env.get("CNI_COMMAND") == "VERSION":
        from cni_plugin.version import answer

        return answer(stdin), 0
    import json

    from cni_plugin import protocol

    version = names.NEWEST_CNI_VERSION
    conf: Json = {}
    try:
        call = protocol.parse_environment(env)
        conf = protocol.decode(protocol.read_all(stdin))
        version = protocol.version_in_use(conf)
        result = _dispatch(protocol.parse_request(call, conf))
        return ("" if result is None else json.dumps(result)), 0
    except protocol.CniError as error:
        return json.dumps(protocol.error_document(error, version)), 1
    except Exception as error:
        return _after_mistake(env.get("CNI_COMMAND", ""), conf, version, error)


def _after_mistake(command: str, conf: Json, version: str, error: Exception) -> tuple[str, int]:
    """No mistake of ours keeps a pod from starting or ending: as a plugin that does nothing."""
    import json

    from cni_plugin import log, protocol

    text = " ".join(str(error).partition("Traceback")[0].split())  # a runtime shows it in events
    mistake = protocol.CniError(f"internal error: {type(error).__name__}", f"{text:.300}")
    previous = conf.get("prevResult")
    passed_on = isinstance(previous, dict) and {**previous, "cniVersion": version}
    if command in MUST_WORK or (command == "ADD" and passed_on):
        log.say(f"warning: {mistake}")
        return (json.dumps(passed_on) if command == "ADD" else ""), 0
    return json.dumps(protocol.error_document(mistake, version)), 1


def _dispatch(request: Request) -> Json | None:
    from cni_plugin import log

    call = request.call
    pod = (call.args.get("K8S_POD_NAMESPACE"), call.args.get("K8S_POD_NAME"))
    attachment = filter(None, (call.container_id, call.ifname))
    log.about(" ".join([call.command, "/".join(attachment), "/".join(filter(None, pod))]))
    if call.command == "ADD":
        from cni_plugin.add import add

        return add(request)
    if call.command == "DEL":
        from cni_plugin.delete import delete

        delete(request)
    elif call.command == "CHECK":
        from cni_plugin.check import check

        check(request)
    elif call.command == "GC":
        from cni_plugin.gc import collect

        collect(request)
    elif call.command == "STATUS":
        from cni_plugin.status import status

        status(request)
    return None


def _occupy_standard_descriptors() -> None:
    """Keep a closed 0, 1 or 2 from being given to the next file opened, and written into."""
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", flags)


def _write(fd: int, text: str) -> bool:
    """Whether all of it could be written."""
    data = text.encode("utf-8")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True
