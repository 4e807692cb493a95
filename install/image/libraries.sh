#!/bin/sh
# What pyproject.toml names as dependencies, and what that brings, at the versions of
# requirements.txt, into folder $1. A .pth file there leads Python on to our own source.
set -eu
cd "$(dirname "$0")"
# shellcheck disable=SC2046
pip3 install -q --disable-pip-version-check --no-compile --target "$1" --constraint requirements.txt \
	$(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])')
rm -rf "$1/bin"
echo /opt/tcpip-bypass >"$1/tcpip-bypass.pth"
python3 -m compileall -q "$1"
