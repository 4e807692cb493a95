#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The base's packages as they are now, and these beside them: no recommendations, documentation,
# translations or package lists.
set -eu
export DEBIAN_FRONTEND=noninteractive
cat >/etc/dpkg/dpkg.cfg.d/lean <<-END
	path-exclude=/usr/share/doc/*
	path-exclude=/usr/share/locale/*
	path-exclude=/usr/share/man/*
END
apt-get update -q
apt-get upgrade -y -q
apt-get install -y -q --no-install-recommends "$@"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/debconf/*-old
