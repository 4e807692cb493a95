# SPDX-License-Identifier: Apache-2.0
"""Every path, annotation and key that the plugin shares with other programs.

Constants only and no imports: every command of the plugin loads this module.
"""

from __future__ import annotations

PLUGIN = "tcpip-bypass"

# What the runtime may speak to us. ADD in a chain exists since 0.3.0.
CNI_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST_CNI_VERSION = CNI_VERSIONS[-1]

# Defaults of the configuration keys ``bpffs``, ``stateDir`` and ``proxyUID``.
BPFFS = "/sys/fs/bpf/tcpip-bypass"
STATE_DIR = "/run/tcpip-bypass"
PROXY_UID = 1337  # istio-proxy's user in every Istio release
NO_UID = 2**32 - 1  # (uid_t) -1, which no user has

# Below the state folder.
ATTACHMENTS = "attachments"
FAILURES = "failures"
VALIDATED = "validated"
NODE_JSON = "node.json"
JOINER_JSON = "joiner.json"
TAKE_IN_JSON = "take-in.json"  # IDs of the pods whose older connections are not paired yet
PLUGIN_PROBLEM = "plugin-problem"  # text: why the node cannot run the plugin, if so
SWITCH_JSON = "switch.json"  # what holds for the whole cluster, as the agent has read it
AGENT_LOGS = ("agent.log.1", "agent.log")  # older lines, newer ones
JOINER_LOGS = ("joiner.log.1", "joiner.log")

MODES = ("full", "proxy-only", "off")
FIONREAD_CHOICES = ("mend", "leave")  # of the configuration key ``fionread``, the default first

# On the pod.
SIDECAR_STATUS = "sidecar.istio.io/status"
ENABLED = "tcpip-bypass/enabled"
PROXY_ONLY = "tcpip-bypass/proxy-only"
EXCLUDE_PORTS = "tcpip-bypass/exclude-ports"
PROXY_UID_OF_POD = "tcpip-bypass/proxy-uid"

# In runtimeConfig, asked for by our ``capabilities``.
CGROUP_PATH = "cgroupPath"
POD_ANNOTATIONS = "io.kubernetes.cri.pod-annotations"

VALID_ATTACHMENTS = "cni.dev/valid-attachments"
