# SPDX-License-Identifier: Apache-2.0
"""The parts of the kernel tests that need no other kernel."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from tests.bed.apt import AptError
from tests.kernels import __main__ as command
from tests.kernels import images, modules, report
from tests.kernels.images import Kernel, Qemu, newest
from tests.kernels.machine import Machine, Run
from tests.kernels.suites import SUITES, USUAL, Outcome

AVAILABLE = frozenset(
    {
        "linux-image-6.1-cloud-amd64",  # a meta package
        "linux-image-6.1.0-9-cloud-amd64",
        "linux-image-6.1.0-56-cloud-amd64",
        "linux-image-6.1.0-56-cloud-amd64-unsigned",
        "linux-image-6.12.5+deb13-cloud-amd64",
        "linux-binary-6.19.14+deb13-cloud-amd64",
        "linux-image-7.1.1+deb13-cloud-amd64",
        "linux-binary-7.1.1+deb13-cloud-amd64",
        "linux-modules-7.1.1+deb13-cloud-amd64",
        "linux-binary-7.2.0+deb13-cloud-amd64",
    }
)


@pytest.mark.parametrize(
    ("series", "release", "packages"),
    [
        ("6.1", "6.1.0-56-cloud-amd64", ["image"]),
        ("6.12", "6.12.5+deb13-cloud-amd64", ["image"]),
        ("7", "7.1.1+deb13-cloud-amd64", ["binary", "modules"]),
    ],
)
def test_the_newest_kernel_that_is_there_whole(
    series: str, release: str, packages: list[str]
) -> None:
    assert newest(AVAILABLE, series) == (release, [f"linux-{one}-{release}" for one in packages])


@pytest.mark.parametrize("series", ["6.19", "7.2", "5.10"])
def test_a_kernel_that_is_missing_or_has_no_modules_is_an_error(series: str) -> None:
    with pytest.raises(AptError, match=series):
        newest(AVAILABLE, series)


def test_modules_come_after_those_they_depend_on(tmp_path: Path) -> None:
    def module(name: str, depends: str) -> bytes:
        return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=" + name.encode()

    (tmp_path / "net").mkdir()
    (tmp_path / "net/veth.ko").write_bytes(module("veth", ""))
    (tmp_path / "net/tls.ko.xz").write_bytes(lzma.compress(module("tls", "aes-lib,base")))
    (tmp_path / "net/aes-lib.ko").write_bytes(module("aes_lib", "base"))
    (tmp_path / "net/base.ko").write_bytes(module("base", ""))
    (tmp_path / "net/unwanted.ko").write_bytes(module("unwanted", ""))
    assert list(modules.in_load_order(tmp_path)) == ["base", "aes_lib", "tls", "veth"]
    assert modules.in_load_order(tmp_path)["base"] == module("base", "")


def test_modules_that_were_stored_for_another_list_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not modules.has_stored(tmp_path)
    modules.store(tmp_path / "no modules here", tmp_path)
    assert modules.has_stored(tmp_path)
    monkeypatch.setattr(modules, "WANTED", (*modules.WANTED, "another"))
    assert not modules.has_stored(tmp_path)


def outcome(suite: str, printed: object, exit_code: int | None = 0) -> Outcome:
    stdout = printed if isinstance(printed, str) else json.dumps(printed)
    return Outcome(suite, exit_code, 1.0, stdout, "the last line")


def selftest(mode: str) -> Outcome:
    return outcome("selftest", {"mode": mode, "checks": []})


def semantics(
    *differing: str, undocumented: tuple[str, ...] = (), troubles: tuple[str, ...] = ()
) -> Outcome:
    return outcome(
        "semantics",
        {
            "differing": {name: {} for name in differing},
            "scenarios": 9,
            "undocumented": undocumented,
            "troubles": troubles,
        },
        int(bool(undocumented or troubles)),
    )


def probed(outbound: int = 10, mptcp: int = 2) -> Outcome:
    return outcome(
        "probe",
        {
            "load_s": 1,
            "sent_bytes": 10,
            "bypassed_bytes": {"inbound": 10, "outbound": outbound},
            "mptcp_joined": {"AF_INET": 2, "AF_INET6": mptcp} if outbound else {},
        },
    )


def problems(*outcomes: Outcome, complaints: tuple[str, ...] = ()) -> list[str]:
    run = Run(Kernel("1.2", Path("1.2.3")), list(outcomes), list(complaints))
    return report.judge(run, [SUITES[one.suite] for one in outcomes]).problems


@pytest.mark.parametrize(
    ("mode", "differing", "agree"),
    [
        ("full", [], True),
        ("full", ["unread_bytes"], False),
        ("proxy-only", ["unread_bytes", "splice_from"], True),
        ("proxy-only", ["splice_from"], False),
        ("off", [], False),
    ],
)
def test_the_selftest_must_agree_with_the_semantics(
    mode: str, differing: list[str], agree: bool
) -> None:
    assert (problems(selftest(mode), semantics(*differing)) == []) is agree


@pytest.mark.parametrize(("name", "agree"), [("zerocopy_set_late", True), ("recv", False)])
def test_what_differs_must_be_documented(name: str, agree: bool) -> None:
    assert (problems(selftest("full"), semantics(name, undocumented=(name,))) == []) is agree


def test_no_bypassed_bytes_agree_with_off_only() -> None:
    none = probed(outbound=0)
    assert problems(selftest("off"), none) == []
    assert problems(selftest("full"), none) != []


@pytest.mark.parametrize(("ends", "is_right"), [(2, True), (1, False), (0, False)])
def test_both_ends_of_mptcp_s_fallback_join(ends: int, is_right: bool) -> None:
    assert (problems(probed(mptcp=ends)) == []) is is_right


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        (outcome("probe", "", exit_code=1), "exit status 1"),
        (outcome("probe", "", exit_code=None), "ran out of time"),
        (semantics(troubles=("x: HANG",)), "x: HANG"),
    ],
)
def test_a_suite_that_fails_is_a_problem(failed: Outcome, said: str) -> None:
    assert any(said in problem for problem in problems(failed))


def test_a_kernel_that_allows_less_has_an_exit_status_of_its_own() -> None:
    printed = {"mode": "proxy-only", "checks": [{"name": "fionread_tcp", "ok": False}]}
    assert problems(outcome("selftest", printed, exit_code=1)) == []


def test_a_kernel_that_goes_down_is_a_problem() -> None:
    run = Run(Kernel("1.2", Path("1.2.3")), [selftest("full")])
    found = report.judge(run, [SUITES["selftest"], SUITES["probe"]])
    assert found.problems == ["probe: the kernel went down"]


def test_what_the_kernel_complains_about_is_a_problem() -> None:
    assert problems(selftest("full"), complaints=("WARNING: at x",)) == ["WARNING: at x"]


@pytest.mark.parametrize(
    ("options", "series", "suites"),
    [
        ([], "6.1", USUAL),
        ([], "6.1-lockdown", ["selftest"]),
        (["--suite", "fuzz"], "6.1-lockdown", ["fuzz"]),
    ],
)
def test_what_runs_on_a_kernel(options: list[str], series: str, suites: list[str]) -> None:
    arguments = command.build_parser().parse_args(options)
    kernel = Kernel(series, Path("1.2.3"))
    assert [suite.name for suite in command.suites_on(kernel, arguments)] == suites


def test_lockdown_is_a_row_of_its_own_on_the_same_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "6.1/6.1.9"
    modules.store(tmp_path / "no modules here", folder / "modules")
    plain, locked = images.get_kernels(tmp_path, ["6.1", "6.1-lockdown"], None)
    assert (plain.folder, locked.folder) == (folder, folder)
    assert (plain.title, locked.title) == ("6.1.9", "6.1.9 lockdown=integrity")
    machine = Machine(Qemu(Path("qemu")), Path("initramfs"), lambda *_: None)
    asked = [
        "lockdown=integrity" in machine._command(kernel, [], Path("log"))[-1].split(" -- ")[0]
        for kernel in (plain, locked)
    ]
    assert asked == [False, True]
