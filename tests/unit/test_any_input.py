# SPDX-License-Identifier: Apache-2.0
"""For any input: one valid JSON document of the right shape, never a traceback.

In this process, on descriptors and folders of its own; the cases of tests/fixtures show that a
process of its own behaves the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni_plugin import names
from cni_plugin.main import run
from cni_plugin.state import Attachment, Key, State
from tests.bed.bed import FROZEN_PLUGIN

RUNS = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
versions = st.sampled_from([*names.CNI_VERSIONS, "0.2.0", "2.0.0", ""])


def spoiled(good: dict[str, Any], needed: tuple[str, ...] = ()) -> st.SearchStrategy[Any]:
    """A good object, or one with any values in up to two of its keys or of unknown keys."""
    wrong = st.dictionaries(st.sampled_from(sorted(good)) | st.text(), anything, max_size=2)
    return st.builds(
        lambda right, spoil, values: {**right, **(values if spoil else {})},
        st.fixed_dictionaries(
            {key: good[key] for key in needed},
            optional={key: value for key, value in good.items() if key not in needed},
        ),
        st.booleans(),
        wrong,
    )


addresses = st.sampled_from(["10.22.0.7/16", "fd00::7/64", "::ffff:10.0.0.1/128"])
ips = st.lists(
    spoiled(
        {
            "address": addresses,
            "interface": st.integers(-1, 3),
            "version": st.sampled_from(["4", "6"]),
            "gateway": st.just("10.22.0.1"),
        },
        needed=("address",),
    ),
    max_size=10,
)
results = spoiled(
    {
        "cniVersion": versions,
        "ips": ips,
        "interfaces": st.lists(
            spoiled({"name": st.just("eth0"), "sandbox": st.just("/x"), "mtu": st.just(1)}),
            max_size=3,
        ),
        "routes": st.lists(st.just({"dst": "0.0.0.0/0"}), max_size=2),
        "ip4": st.fixed_dictionaries({"ip": addresses}),
    },
    needed=("ips",),
)
pod_annotations = spoiled(
    {
        names.SIDECAR_STATUS: st.just("{}"),
        names.ENABLED: st.sampled_from(["true", "false", "?"]),
        names.PROXY_ONLY: st.sampled_from(["true", "false"]),
        names.EXCLUDE_PORTS: st.sampled_from(["", "80,443-500", "0"]) | st.text(),
    },
)
confs = spoiled(
    {
        "cniVersion": st.sampled_from(names.CNI_VERSIONS),
        "name": st.just("pods"),
        "type": st.just(names.PLUGIN),
        "prevResult": results,
        "scope": st.sampled_from(["mesh", "all"]),
        "mode": st.sampled_from(["auto", "full", "proxy-only", "off"]),
        "excludePorts": st.lists(st.integers(1, 65535) | st.just("1-2"), max_size=3),
        "excludeNamespaces": st.lists(st.sampled_from(["shop", "kube-system"])),
        "proxyUID": st.integers(0, 4294967294),
        "proxyUIDs": st.lists(st.sampled_from(["7", "1-5", "9-2", "4294967295"]), max_size=2),
        "runtimeConfig": spoiled({names.POD_ANNOTATIONS: pod_annotations}),
        names.VALID_ATTACHMENTS: st.lists(
            st.fixed_dictionaries({"containerID": st.text(), "ifname": st.text()}), max_size=3
        ),
    },
    needed=("cniVersion", "name", "type", "prevResult", "runtimeConfig"),
)
stdins = st.binary() | confs.map(lambda conf: json.dumps(conf).encode())
environments = st.builds(
    lambda good, spoil, bad: {**good, **(bad if spoil else {})},
    st.fixed_dictionaries(
        {
            "CNI_COMMAND": st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]),
            "CNI_CONTAINERID": st.just("4f2a"),
            "CNI_NETNS": st.sampled_from(["/proc/self/ns/net", "/no/such", "\udcff"]),
            "CNI_IFNAME": st.just("eth0"),
            "CNI_PATH": st.just("/opt/cni/bin"),
            "CNI_ARGS": st.just("K8S_POD_NAMESPACE=shop;K8S_POD_UID=1"),
            "CNI_NETNS_OVERRIDE": st.sampled_from(["1", "TRUE", "0", ""]),
        }
    ),
    st.booleans(),
    st.dictionaries(
        st.sampled_from(["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH", "CNI_ARGS"]),
        st.text(),
        max_size=2,
    ),
)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "BPFFS", str(tmp_path / "bpffs"))
    monkeypatch.setattr(names, "STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "bpffs").mkdir()
    (tmp_path / "state").mkdir()


def ask(env: dict[str, str], stdin: bytes) -> tuple[str, int]:
    fd = os.memfd_create("stdin")
    try:
        os.write(fd, stdin)
        os.lseek(fd, 0, os.SEEK_SET)
        return run(env, fd)
    finally:
        os.close(fd)


def no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} on stdout is not JSON")


def check_shape(env: dict[str, str], document: str, code: int) -> None:
    answer: Any = json.loads(document, parse_constant=no_constant) if document else None
    if code:
        assert code == 1
        assert answer["cniVersion"] in names.CNI_VERSIONS
        assert answer["msg"]
        assert set(answer) <= {"cniVersion", "code", "msg", "details"}
        # 999 is for mistakes of ours.
        assert answer["code"] in {1, 2, 3, 4, 5, 6, 7, 8, 100}, answer
        assert "Traceback" not in document
    elif env["CNI_COMMAND"] == "VERSION":
        assert answer["cniVersion"] in answer["supportedVersions"]
    elif env["CNI_COMMAND"] == "ADD":
        assert answer["cniVersion"] in names.CNI_VERSIONS
    else:
        assert answer is None


@RUNS
@given(env=environments, stdin=stdins)
def test_any_environment_and_stdin(env: dict[str, str], stdin: bytes) -> None:
    check_shape(env, *ask(env, stdin))


@RUNS
@given(conf=confs)
def test_add_gives_back_what_it_got(conf: dict[str, Any]) -> None:
    """Unless it is an error, and but for the keys that differ between versions."""
    env = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": "/x", "CNI_IFNAME": "eth0"}
    document, code = ask(env, json.dumps(conf).encode())
    check_shape(env, document, code)
    previous: Any = conf.get("prevResult")
    if code or "ip4" in previous or "ip6" in previous:
        return
    # Through JSON once, for the numbers that Python writes in another way than it got them.
    expected = json.loads(json.dumps(previous))
    expected["cniVersion"] = conf["cniVersion"]
    answer: Any = json.loads(document)
    old = conf["cniVersion"] in names.CNI_VERSIONS[:3]
    for ip in answer.get("ips") or []:
        assert (ip.pop("version", None) is not None) == old
    for ip in expected.get("ips") or []:
        ip.pop("version", None)
    if old:
        for interface in expected.get("interfaces") or []:
            interface.pop("mtu", None)
    assert answer == expected


blank = Attachment("c", "eth0", "pods", "/x", "", "", "", "/x", 1, 1, 1, "gen-1", 0, 0, [], [])
records = spoiled(
    {field: st.just(value) for field, value in blank._asdict().items()}, needed=blank._fields
).map(lambda record: json.dumps(record).encode())


@RUNS
@given(content=st.binary() | records, command=st.sampled_from(["DEL", "CHECK", "GC"]))
def test_any_record(content: bytes, command: str) -> None:
    """A record of any content is read, checked and removed without an internal error."""
    state = State(names.STATE_DIR)
    state.make()
    file = Path(names.STATE_DIR, names.ATTACHMENTS, "c:eth0.json")
    file.write_bytes(content)
    env = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c",
        "CNI_NETNS": "/x",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/x",
    }
    conf = {"cniVersion": "1.1.0", "name": "pods", "type": names.PLUGIN, "prevResult": {}}
    conf[names.VALID_ATTACHMENTS] = []
    read = state.read(Key("c", "eth0"))
    check_shape(env, *ask(env, json.dumps(conf).encode()))
    if command == "DEL" or (command == "GC" and (read is None or read.network == "pods")):
        assert not file.exists()
    else:
        assert file.read_bytes() == content


@RUNS
@given(content=st.binary() | anything.map(lambda each: json.dumps(each).encode()))
def test_any_node_json(content: bytes) -> None:
    folder = Path(names.STATE_DIR)
    (folder / names.NODE_JSON).write_bytes(content)
    mode, reason = State(str(folder)).node_mode()
    assert mode in names.MODES
    assert reason


@RUNS
@given(value=anything)
def test_start_passes_any_result_on(value: object, tmp_path: Path) -> None:
    """start.c, where there is no plugin: as it stands in the call, wherever that is."""
    starter = Path(shutil.copy(FROZEN_PLUGIN / names.PLUGIN, tmp_path))
    call = {"a": value, "prevResul": [value], "prevResult": {"x": value}, "z": {"prevResult": 1}}
    for indent in (None, 1):
        done = subprocess.run(
            [starter],
            env={"CNI_COMMAND": "ADD"},
            input=json.dumps(call, indent=indent),
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.dumps(json.loads(done.stdout)) == json.dumps({"x": value})
