# SPDX-License-Identifier: Apache-2.0
"""Real applications, plain and bypassed: is each byte right, and how fast are they.

An application is a module: how it starts, is loaded and is checked. `python -m tests.apps`
measures, test_apps.py checks.
"""
