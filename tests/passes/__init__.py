# SPDX-License-Identifier: Apache-2.0
"""What a pass costs and may break: measurements that run from one command, outside CI."""
