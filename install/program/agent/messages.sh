#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The modules cri_pb2.py and cri_pb2_grpc.py, made of cri.proto below folder $2 by the
# grpcio-tools of Python $1.
set -eu
python=$1
root=$(cd "$(dirname "$0")/../../.." && pwd)
"$python" -m grpc_tools.protoc -I "$root" "--python_out=$2" "--pyi_out=$2" "--grpc_python_out=$2" \
	install/program/agent/cri.proto
