#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The CNI plugin frozen on the oldest distribution it shall run on, Debian 11: glibc 2.31, as
# Ubuntu 20.04 has it, and Python 3.9. A frozen program asks for the glibc of the machine that
# froze it, so the folder that `make build` makes here runs only on distributions as new as
# this one.
#
# usage: freeze.sh FOLDER
#   FOLDER/tcpip-bypass/  the result
#   FOLDER/root/          the Debian 11 it was made in; kept, the next freeze takes seconds
# environment:
#   FREEZE_ROOT    a Debian 11 that is there already, "/" in the build stage of an image
#                  (those of $packages below, and python3-pip for "/")
#   FREEZE_MIRROR  where to get Debian 11 from; else this machine's own Debian mirror
#   FREEZE_PIP     the pip that fetches the packages; else .venv/bin/pip
set -eu

repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
root=${FREEZE_ROOT:-$folder/root}
pip=${FREEZE_PIP:-$repository/.venv/bin/pip}

packages="binutils,gcc,libpython3.9,linux-libc-dev,python3"

# Everything that goes into the bundle or makes it; the newest that still know Python 3.9.
requirements="
	altgraph==0.17.5
	attrs==26.1.0
	importlib-metadata==8.7.1
	jsonschema==4.25.1
	jsonschema-specifications==2025.9.1
	packaging==26.3
	pyinstaller==6.22.3
	pyinstaller-hooks-contrib==2026.9
	pyroute2==0.9.7
	referencing==0.36.2
	rpds-py==0.27.1
	setuptools==82.0.1
	typing-extensions==4.16.0
	zipp==3.23.1
"

die() {
	echo "freeze.sh: $*" >&2
	exit 1
}

own_mirror() { # this machine's Debian mirror, or nothing on another distribution
	(. /etc/os-release && [ "$ID" = debian ] &&
		apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
		awk -v release="$VERSION_CODENAME" '$1 == release { print $2; exit }') || true
}

make_root() {
	command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
	rm -rf "$root"
	mirror=${FREEZE_MIRROR:-$(own_mirror)} # without one, debootstrap knows Debian's own
	debootstrap --variant=minbase "--include=$packages" \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		bullseye "$root" ${mirror:+"$mirror"} >"$folder/debootstrap.log" 2>&1 ||
		die "debootstrap failed: $(tail -n 3 "$folder/debootstrap.log")"
	echo "$packages" >"$root/.complete"
}

install_packages() {
	rm -rf "$root/opt/freeze"
	# For the Python in there, whatever runs pip; so all of them are named, with --no-deps.
	# shellcheck disable=SC2086
	"$pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: \
		--implementation cp --python-version 3.9 --platform "manylinux2014_$(uname -m)" \
		--target "$root/opt/freeze" $requirements
	echo "$requirements" >"$root/opt/freeze/.requirements"
}

freeze() {
	rm -rf "$root/src"
	mkdir -p "$root/src/bpf"
	cp -r "$repository/build.spec" "$repository/conf" "$repository/cni_plugin" "$root/src/"
	(cd "$repository/bpf" && cp __init__.py abi.py bpfsys.py pins.py "$root/src/bpf/")
	chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root \
		PYTHONPATH=/opt/freeze PYTHONDONTWRITEBYTECODE=1 \
		sh -c 'cd /src && exec python3 -m PyInstaller --noconfirm --log-level WARN build.spec' \
		>"$folder/pyinstaller.log" 2>&1 || die "PyInstaller failed: see $folder/pyinstaller.log"
	rm -rf "$folder/tcpip-bypass"
	mv "$root/src/dist/tcpip-bypass" "$folder/tcpip-bypass"
	rm -rf "$root/src"
}

[ "$(id -u)" = 0 ] || die "it needs root, for chroot"
exec 9>"$folder/.lock" && flock 9
[ -n "${FREEZE_ROOT:-}" ] || [ "$(cat "$root/.complete" 2>/dev/null)" = "$packages" ] || make_root
[ "$(cat "$root/opt/freeze/.requirements" 2>/dev/null)" = "$requirements" ] || install_packages
freeze
