#!/bin/sh
# Everything that building, testing and the demo need on a bare Debian 12 or 13:
# distribution packages, then a venv on the distribution's own Python (bcc lives there).
# libpython3-dev brings its shared library, which PyInstaller needs, whatever its version.
set -eu
cd "$(dirname "$0")/.."

packages="
	python3-venv python3-bpfcc libbpf1 linux-libc-dev
	libpython3-dev binutils gcc libc6-dev
	iproute2 iptables conntrack openssl strace tcpdump
	containernetworking-plugins nginx-light wrk nghttp2-client
	containerd runc busybox-static
	debootstrap debian-archive-keyring
"
missing=""
for package in $packages; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
		missing="$missing $package"
done
if [ -n "$missing" ]; then
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	# RUNLEVEL=1: nginx and containerd are test subjects here, no service must start.
	# shellcheck disable=SC2086
	RUNLEVEL=1 apt-get install -y -q --no-install-recommends $missing
fi

[ -x .venv/bin/python ] || /usr/bin/python3 -m venv --system-site-packages .venv
.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
.venv/bin/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
install/agent/messages.sh .venv/bin/python .
