# SPDX-License-Identifier: Apache-2.0
"""ADD: accelerate the pod if that is what is wanted, and hand prevResult on in any case.

It fails only for a malformed call: nothing else is worth a pod that does not start, a configuration
that the operator got wrong included.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cni_plugin import log, policy, results
from cni_plugin.protocol import InvalidNetns

if TYPE_CHECKING:
    from cni_plugin.policy import Pod
    from cni_plugin.protocol import Json, Request


def add(request: Request) -> Json:
    """The result for the runtime; raises CniError for what the runtime got wrong."""
    answer = results.convert(results.previous(request), request.version)
    pod = policy.pod_of(request)
    if not policy.may_concern_us(request.conf, pod):
        return answer

    try:
        from cni_plugin.accelerate import accelerate  # noqa: PLC0415 - 8 ms, not for other pods

        accelerate(request, pod, answer)
    except InvalidNetns:
        raise
    except Exception as error:  # whatever it is, the pod can live without us
        reason = f"{type(error).__name__}: {error}"
        log.say(f"warning: not accelerated: {reason}")
        _note(request, pod, reason)
    return answer


def _note(request: Request, pod: Pod, reason: str) -> None:
    """Leave the reason where the node program finds it, if that can be done."""
    from cni_plugin import netconf, state  # noqa: PLC0415 - loaded by now if all is well

    key = state.Key(request.call.container_id, request.call.ifname)
    with contextlib.suppress(OSError):
        folder = netconf.folders(request.conf)[1]
        state.State(folder).note_failure(key, pod.namespace, pod.name, reason)
