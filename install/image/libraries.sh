#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Into folder $1: what pyproject.toml names as dependencies, and what that brings, at the versions
# of requirements.txt; a .pth file leads Python on to our own source. Into folder $2: the modules
# made of cri.proto. The compiler for that stays behind.
set -eu
cd "$(dirname "$0")"

project() { # a list of requirements in pyproject.toml, by the Python expression for it
	python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*$1)"
}

get() { # the requirements after the first argument, into the folder that it names
	pip3 install -q --disable-pip-version-check --no-compile --constraint requirements.txt --target "$@"
}

# shellcheck disable=SC2046
get "$1" $(project "project['dependencies']")
rm -rf "$1/bin"
# shellcheck disable=SC2046
get /compiler $(project "project['optional-dependencies']['build']")
mkdir -p "$2"
PYTHONPATH=/compiler install/program/agent/messages.sh python3 "$2"
echo /opt/tcpip-bypass >"$1/tcpip-bypass.pth"
python3 -m compileall -q "$1"
