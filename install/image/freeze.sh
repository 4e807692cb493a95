#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Into folder $1: the frozen plugin, and in `libraries` which Python packages went into it or made it,
# at the versions of requirements.txt.
set -eu
cd "$(dirname "$0")/../.."

pip3 install -q --disable-pip-version-check --constraint requirements.txt --target /freeze \
	jsonschema pyinstaller pyroute2
export PYTHONPATH=/freeze
python3 -m PyInstaller --noconfirm --log-level WARN --distpath "$1" --workpath /freeze/work build.spec
pip3 freeze --path /freeze >"$1/libraries"
