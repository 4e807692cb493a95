"""ADD: accelerate the pod if that is what is wanted, and hand prevResult on in any case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_plugin import log, policy, results
from cni_plugin.protocol import CniError

if TYPE_CHECKING:
    from cni_plugin.protocol import Json, Request


def add(request: Request) -> Json:
    """The result for the runtime; raises CniError for what the runtime or operator got wrong."""
    answer = results.convert(results.previous(request), request.version)
    pod = policy.pod_of(request)
    if not policy.may_concern_us(request.conf, pod):
        return answer

    from cni_plugin.accelerate import accelerate  # noqa: PLC0415 - 8 ms, not for other pods

    try:
        accelerate(request, pod, answer)
    except CniError:
        raise
    except Exception as error:  # whatever it is, the pod can live without us
        log.say(f"warning: not accelerated: {type(error).__name__}: {error}")
    return answer
