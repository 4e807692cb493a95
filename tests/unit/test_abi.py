# SPDX-License-Identifier: Apache-2.0
"""bpf/abi.py agrees with tcpip_bypass.h, as the C compiler lays it out; values of all CPUs."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest

from bpf import abi, stats
from bpf.stats import HopCounters

HEADER = Path(abi.__file__).with_name("tcpip_bypass.h")

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "tb_addr": abi.Addr,
    "tb_port_range": abi.PortRange,
    "tb_pod": abi.Pod,
    "tb_control": abi.Control,
    "tb_due": abi.Due,
    "tb_found": abi.Found,
    "tb_fionread": abi.Fionread,
    "tb_counter_key": abi.CounterKey,
    "tb_counters": abi.Counters,
}
ENUMS = {"TB_HOP_": abi.HOPS, "TB_REASON_": abi.REASONS, "TB_OUTCOME_": abi.OUTCOMES}
CONSTANTS = {
    "TB_MAX_IPS": abi.MAX_IPS,
    "TB_MAX_PORT_RANGES": abi.MAX_PORT_RANGES,
    "TB_FIRST_COST": abi.FIRST_COST,
    "TB_SILENCE_S": abi.SILENCE_S,
    "TB_VISIT_AGAIN": abi.VISIT_AGAIN,
    "TB_LOOK_UP": abi.LOOK_UP,
    "TB_NO_FILE": abi.NO_FILE,
    "TB_NEEDS_EDGE": abi.NEEDS_EDGE,
    "TB_NEEDS_VISIT": abi.NEEDS_VISIT,
    "TB_TAKE_IN": abi.TAKE_IN,
    "TB_POD_PROXY_ONLY": abi.POD_PROXY_ONLY,
    "TB_POD_FORCED": abi.POD_FORCED,
    "TB_POD_SERVICES": abi.POD_SERVICES,
    "TB_CONTROL_PAUSED": abi.CONTROL_PAUSED,
    "TB_CONTROL_PODS_PAUSED": abi.CONTROL_PODS_PAUSED,
    "TB_CONTROL_LEAVE": abi.CONTROL_LEAVE,
    "TB_CONTROL_TRIAL": abi.CONTROL_TRIAL,
    "TB_CANARY": abi.CANARY,
    "TB_CANARY_ANSWER": abi.CANARY_ANSWER,
}


def members(struct: type[ctypes.Structure]) -> list[str]:
    return [field[0] for field in struct._fields_]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Every size, offset and constant, as gcc sees them."""
    expressions = list(CONSTANTS)
    for name, struct in STRUCTS.items():
        expressions.append(f"sizeof(struct {name})")
        for member in members(struct):
            expressions.append(f"offsetof(struct {name}, {member})")
            expressions.append(f"sizeof(((struct {name} *)0)->{member})")
    for prefix, names in ENUMS.items():
        expressions += [prefix + name.upper() for name in names]
    lines = "\n".join(
        f'printf("%s\\"%s\\": %lld", c, "{e}", (long long){e}); c = ", ";' for e in expressions
    )
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "abi.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        f'int main(void) {{ const char *c = "{{"; {lines} puts("}}"); return 0; }}\n'
    )
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", folder / "abi", source], check=True)
    output = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    values: dict[str, int] = json.loads(output)
    return values


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_layout(name: str, compiled: dict[str, int]) -> None:
    struct = STRUCTS[name]
    assert ctypes.sizeof(struct) == compiled[f"sizeof(struct {name})"]
    for member in members(struct):
        descriptor = getattr(struct, member)
        assert descriptor.offset == compiled[f"offsetof(struct {name}, {member})"], member
        assert descriptor.size == compiled[f"sizeof(((struct {name} *)0)->{member})"], member


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_has_no_padding(name: str) -> None:
    struct = STRUCTS[name]
    assert ctypes.sizeof(struct) == sum(getattr(struct, m).size for m in members(struct))


def test_every_struct_and_member_of_the_header_is_known() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = dict(re.findall(r"^struct (\w+) \{(.*?)^\};", text, flags=re.DOTALL | re.MULTILINE))
    assert set(found) == set(STRUCTS)
    for name, body in found.items():
        assert re.findall(r"(\w+)(?:\[\w+\])?;", body) == members(STRUCTS[name])


def test_constants(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in CONSTANTS} == CONSTANTS


@pytest.mark.parametrize("prefix", ENUMS)
def test_enumerators_are_named_in_order(prefix: str, compiled: dict[str, int]) -> None:
    names = ENUMS[prefix]
    assert [compiled[prefix + name.upper()] for name in names] == list(range(len(names)))
    text = HEADER.read_text()
    last = prefix.rstrip("_") + "S"
    in_header = re.findall(rf"^\t({prefix}\w+)", text, flags=re.MULTILINE)
    assert len(in_header) == len(names), f"{last}: a name is missing in bpf/abi.py"


def test_all_cpus_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "possible_cpus", lambda: 3)
    per_cpu = (abi.Counters * 3)()
    for cpu, value in enumerate(per_cpu, 1):
        value.bypassed_messages = cpu
        value.bypassed_bytes = 10 * cpu
        value.tcp_messages[1] = cpu
        value.tcp_bytes = 2**62
        value.connections[6] = 1

    def lookup(key: bytes, size: int) -> bytes:
        assert size == 3 * ctypes.sizeof(abi.Counters)
        if abi.CounterKey.from_buffer_copy(key).hop != 2:
            raise FileNotFoundError
        return bytes(per_cpu)

    assert stats.pod_counters(1, lookup) == {
        "outbound": HopCounters(6, 60, 3 * 2**62, {"waiting": 6}, {"blocking": 3})
    }


def test_possible_cpus_is_the_last_ones_number_plus_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    possible = tmp_path / "possible"
    monkeypatch.setattr(stats, "POSSIBLE_CPUS", possible)
    for text, count in (("0\n", 1), ("0-3\n", 4), ("0,2-5\n", 6), ("0-1,8\n", 9)):
        possible.write_text(text)
        assert stats.possible_cpus.__wrapped__() == count
