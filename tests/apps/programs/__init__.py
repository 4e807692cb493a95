# SPDX-License-Identifier: Apache-2.0
"""Programs that run in pods: servers, clients, proxies."""
