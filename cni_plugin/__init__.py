# SPDX-License-Identifier: Apache-2.0
"""The CNI plugin: a chained plugin that accelerates pods of an Istio mesh (docs/cni.md)."""
