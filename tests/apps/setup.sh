#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The applications that tests/apps runs: distribution packages, Python's into .venv, and what is
# compiled. No service starts, now or at boot: they are test subjects.
set -eu
cd "$(dirname "$0")/../.."

packages="
	redis-server redis-tools memcached postgresql mariadb-server sysbench
	nginx-light haproxy apache2 lighttpd php-fpm nodejs node-ws default-jdk-headless
	mosquitto mosquitto-clients nghttp2-server nghttp2-client wrk
	rsync curl netcat-openbsd openssl
"

enabled_units() {
	command -v systemctl >/dev/null || return 0
	systemctl list-unit-files --state=enabled --plain --no-legend | cut -d ' ' -f 1 | sort
}

install_packages() {
	work=$(mktemp -d)
	policy=/usr/sbin/policy-rc.d # asked by invoke-rc.d and deb-systemd-invoke before they start any
	if [ -e "$policy" ]; then
		trap 'rm -rf "$work"' EXIT
	else
		trap 'rm -rf "$work" "$policy"' EXIT
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	enabled_units >"$work/before"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	apt-get install -y -q --no-install-recommends "$@"
	enabled_units | comm -13 "$work/before" - | xargs -r systemctl disable --quiet
}

missing=""
for package in $packages; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
		missing="$missing $package"
done
# shellcheck disable=SC2086
[ -z "$missing" ] || install_packages $missing

.venv/bin/pip install -q --disable-pip-version-check -r tests/apps/requirements.txt
.venv/bin/python -c 'from tests.apps import tools; tools.go(); tools.java()'
