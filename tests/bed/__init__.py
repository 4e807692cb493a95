# SPDX-License-Identifier: Apache-2.0
"""A mesh on one machine: the testbed of the integration tests, the demo and the benchmark.

A network namespace plays the node; pods are namespaces and cgroups as kubelet and a runtime make
them, joined by the real bridge and host-local plugins, then our frozen plugin in the same chain.
Everything is named after the run (`tb-<pid>-<n>`) and is gone when the run ends, however it ends.
"""

from tests.bed.bed import Bed, open_bed
from tests.bed.pod import APP_UID, OPTED_OUT, PROXY_UID, Pod

__all__ = ["APP_UID", "OPTED_OUT", "PROXY_UID", "Bed", "Pod", "open_bed"]
