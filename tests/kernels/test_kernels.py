# SPDX-License-Identifier: Apache-2.0
"""The parts of the kernel tests that need no other kernel."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from install.program.probes import PROBES
from install.program.selftest import OFF, SPLICE, Check, Verdict, decide
from tests.bed.apt import AptError
from tests.kernels import __main__ as command
from tests.kernels import images, modules, page, report
from tests.kernels.images import SERIES, Kernel, Qemu, newest
from tests.kernels.machine import Machine, Run
from tests.kernels.suites import SUITES, USUAL, Failed, Outcome

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


def probed(outbound: int = 10, mptcp: int = 2, from_before: int = 2) -> Outcome:
    return outcome(
        "probe",
        {
            "load_s": 1,
            "sent_bytes": 10,
            "bypassed_bytes": {"inbound": 10, "outbound": outbound},
            "mptcp_joined": {"AF_INET": 2, "AF_INET6": mptcp} if outbound else {},
            "from_before": from_before,
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


def test_what_is_left_without_the_mend_agrees_with_any_mode() -> None:
    left = replace(selftest("proxy-only"), suite="selftest-left")
    assert problems(selftest("full"), left, semantics(), probed()) == []


@pytest.mark.parametrize(("ends", "is_right"), [(2, True), (1, False), (0, False)])
def test_both_ends_of_mptcp_s_fallback_join(ends: int, is_right: bool) -> None:
    assert (problems(probed(mptcp=ends)) == []) is is_right


@pytest.mark.parametrize(("ends", "is_right"), [(2, True), (1, False), (0, True)])
def test_both_ends_of_a_connection_from_before_join_or_none(ends: int, is_right: bool) -> None:
    assert (problems(probed(from_before=ends)) == []) is is_right


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


def mend_life(**changed: object) -> Outcome:
    """What suite `mend-life` prints when all is well, but for what is changed."""
    asked = ("member", "joiner_killed", "member_again", "member_of_the_second", "paused", "resumed")
    loss = {"noticed_s": 1.0, "left_s": 1.0, "then": 700}
    unloaded = {"members": 2, "is_sockhash_empty": True, "pins": [], "links": 0, "then": 700}
    printed = {
        **dict.fromkeys((each.replace("_", " ") for each in asked), 700),
        **dict.fromkeys(("silenced", "unpinned", "unmounted"), loss),
        "upgraded": {"members": 2, "generations": ["gen-2"], "then": 700},
        "unloaded": {**unloaded, **changed},
    }
    return outcome("mend-life", printed)


@pytest.mark.parametrize(
    "left", [{"links": 1}, {"pins": ["gen-2"]}, {"is_sockhash_empty": False}, {"then": 0}]
)
def test_an_unload_leaves_nothing(left: dict[str, object]) -> None:
    assert problems(mend_life()) == []
    (problem,) = problems(mend_life(**left))
    assert problem.startswith("mend-life: unloaded: ")


@pytest.mark.parametrize(
    ("options", "series", "suites"),
    [
        ([], "6.1", USUAL),
        ([], "7", USUAL),
        ([], "5.10", ["selftest", "selftest-left", "probe"]),
        ([], "6.1-lockdown", ["selftest"]),
        (["--page"], "6.1", ["selftest", "selftest-left", "probe"]),
        (["--page"], "6.1-lockdown", ["selftest"]),
        (["--suite", "fuzz"], "6.1-lockdown", ["fuzz"]),
    ],
)
def test_what_runs_on_a_kernel(options: list[str], series: str, suites: list[str]) -> None:
    arguments = command.build_parser().parse_args(options)
    kernel = Kernel(series, Path("1.2.3"))
    assert [suite.name for suite in command.suites_on(kernel, arguments)] == suites


def test_programs_and_fionread_are_usual() -> None:
    assert {"apps", "fionread"} <= set(USUAL)
    assert not {"apps", "fionread"} & set(page.SUITES)


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


def verdict(*wrong: str, mended: bool = False) -> dict[str, Any]:
    """What a self-test prints that has loaded; `wrong` names the checks that failed."""
    found = "0 (not mended:\nrefused) | said the verifier"
    checks = [Check(name, "", "1", found, name not in wrong) for name in PROBES]
    return replace(decide(checks), is_mended=mended).as_json()


LOADS = Check("load", "", "both load", "no", ok=False)
NOT_BYPASSED = ("fionread_bypassed", "fionread_ipv6")
NOT_TCP = ("fionread_tcp", "fionread_ipv6")


def a_run(series: str, selftest: object, *others: Outcome) -> Run:
    return Run(
        Kernel(series, Path(f"{series.partition('-')[0]}.9")),
        [outcome("selftest", selftest), *others],
    )


def left(*wrong: str) -> Outcome:
    return outcome("selftest-left", verdict(*wrong), exit_code=1 if wrong else 0)


def test_the_page() -> None:
    off = Verdict(OFF, ["load: no"], [LOADS]).as_json()
    runs = [
        a_run("5.10", off, replace(outcome("selftest-left", off), exit_code=2), probed(outbound=0)),
        a_run("6.1", verdict(mended=True), left(*NOT_BYPASSED), probed(from_before=0)),
        a_run("6.1-lockdown", verdict(*NOT_BYPASSED)),
        a_run("6.12", verdict(), left(), probed()),
        a_run("6.18", verdict(mended=True), left(*NOT_TCP), probed(mptcp=1)),
        a_run("7", verdict(SPLICE), left(SPLICE), probed()),
    ]
    head, _, rest = page.written(runs).partition("\n|-|-|-|-|-|-|-|-|-|\n")
    assert head.startswith("# Kernels\n\nWritten by `make test-kernels`; do not edit.")
    assert (
        rest
        == """\
|5.10.9|Debian 11|-|-|-|-|-|`off`|none|
|6.1.9|Debian 12, AL2023|A|yes|yes|yes|no|`full`|all three|
|6.1.9 lockdown=integrity|Debian 12, AL2023|A|no|yes|-|-|`proxy-only`|sidecar to sidecar|
|6.12.9|Debian 13, RHEL 10, AL2023 (6.12)|C|not needed|yes|yes|yes|`full`|all three|
|6.18.9|Debian 13's backports|B|yes|yes|no|yes|`full`|all three|
|7.9|Debian 13's backports|C|not needed|no|yes|yes|`proxy-only`|sidecar to sidecar|

Not `full`, because:

- 5.10.9: `load: no`
- 6.1.9 lockdown=integrity: `fionread_bypassed: expected 1, found 0 (not mended: refused) ...`
- 7.9: `splice: expected 1, found 0 (not mended: refused) ...`
"""
    )


def programs(*errors: str) -> Outcome:
    """Suite `apps`: a program of one hop each, and nginx right on another hop, too."""
    found = [
        {"name": name, "hop": hop, "error": error, "bypassed_bytes": 9}
        for name, hop, error in (
            ("nginx", "outbound", ""),
            *zip(("nginx", "node", "go"), ("inbound",) * 3, (*errors, "", "", "")),
        )
    ]
    return outcome("apps", {"mode": "full", "found": found, "go_share": 0.99})


def test_the_page_says_how_many_programs_are_right() -> None:
    runs = [
        a_run("6.1", verdict(), left(), probed(), programs()),
        a_run("6.12", verdict(), left(), probed(), programs("wrong", "", "wrong")),
        a_run("6.1-lockdown", verdict(*NOT_BYPASSED)),
    ]
    table = [line for line in page.written(runs).splitlines() if line.startswith("|")]
    assert [line.split("|")[-2] for line in table] == [page.PROGRAMS, "-", "3/3", "1/3", "-"]
    assert {line.count("|") for line in table} == {11}
    assert problems(programs("wrong")) == ["apps: nginx on inbound: wrong"]


def test_no_page_of_programs_that_did_not_end() -> None:
    ended = outcome("apps", "", exit_code=None)
    with pytest.raises(Failed):
        page.written([a_run("6.1", verdict(), left(), probed(), ended)])


@pytest.mark.parametrize(
    ("wrong", "letters"),
    [
        (("fionread_bypassed", "fionread_tcp", "fionread_ipv6"), "AB"),
        (("fionread_ipv6",), "IPv6 wrong"),
        (("edge_behind",), "C"),
    ],
)
def test_the_class_of_fionread(wrong: tuple[str, ...], letters: str) -> None:
    assert page.fionread_class(verdict(*wrong)) == letters


@pytest.mark.parametrize(
    "run",
    [
        a_run("6.1", verdict(mended=True), probed()),
        a_run("6.1", verdict(), outcome("selftest-left", "", exit_code=None), probed()),
        Run(Kernel("6.1-lockdown", Path("6.1.9"))),
    ],
)
def test_no_page_of_a_suite_that_did_not_run(run: Run) -> None:
    with pytest.raises(Failed):
        page.written([run])


def test_every_series_has_its_distributions() -> None:
    assert {images.plain(one) for one in SERIES} == page.SHIPPED_BY.keys()


@pytest.mark.parametrize(
    ("options", "failures", "is_written"),
    [
        ([], 0, True),
        ([], 1, False),
        (["--suite", "selftest"], 0, False),
        (["6.12"], 0, False),
        (["--page", "6.12"], 0, True),
        (["--page"], 1, True),
    ],
)
def test_when_the_page_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    failures: int,
    is_written: bool,
) -> None:
    monkeypatch.setattr(page, "PATH", tmp_path / "kernels.md")
    arguments = command.build_parser().parse_args(options)
    runs = [a_run("6.12", verdict(), left(), probed())]
    assert command.write_page(arguments, runs, failures) == failures
    assert page.PATH.exists() is is_written


def test_a_page_that_cannot_be_written_stays_and_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PATH", tmp_path / "kernels.md")
    page.PATH.write_text("as it was")
    arguments = command.build_parser().parse_args(["--page"])
    assert command.write_page(arguments, [a_run("6.12", verdict())], 0) == 1
    assert page.PATH.read_text() == "as it was"
