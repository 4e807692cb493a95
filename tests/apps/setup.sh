#!/bin/sh
# The applications that tests/apps runs: distribution packages, and Python's into .venv.
# No service starts, now or at boot: they are test subjects.
set -eu
cd "$(dirname "$0")/../.."

packages="
	redis-server redis-tools memcached postgresql mariadb-server sysbench
	nginx-light haproxy apache2 php-fpm nodejs node-ws default-jdk-headless
	mosquitto mosquitto-clients nghttp2-server nghttp2-client rsync curl netcat-openbsd
"
services="redis-server memcached postgresql mariadb haproxy apache2 mosquitto nghttpx rsync"

missing=""
for package in $packages; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
		missing="$missing $package"
done
if [ -n "$missing" ]; then
	# invoke-rc.d and deb-systemd-invoke ask this program before they start anything.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		trap 'rm -f "$policy"' EXIT
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	# shellcheck disable=SC2086
	apt-get install -y -q --no-install-recommends $missing
	if command -v systemctl >/dev/null; then
		for service in $services "$(basename "$(ls -d /etc/php/*/ | tail -1)" | sed 's/.*/php&-fpm/')"; do
			case "$missing" in
			*"${service%%-*}"*) systemctl disable --quiet "$service" 2>/dev/null || true ;;
			esac
		done
	fi
fi
.venv/bin/pip install -q --disable-pip-version-check -r tests/apps/requirements.txt
.venv/bin/python -c 'from tests.apps import tools; tools.go(); tools.java()'
