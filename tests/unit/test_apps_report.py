# SPDX-License-Identifier: Apache-2.0
"""What the applications' page says of given results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apps import __main__ as command
from tests.apps import application, report, silence
from tests.apps.registry import APPLICATIONS
from tests.bench.results import Results, Sample, Section

MACHINE = {
    "date": "2026-11-28T12:00:00+00:00",
    "kernel": "6.18",
    "distribution": "Debian",
    "cpus": 2,
    "cpu": "a CPU",
    "measuring_cpu": "1",
    "congestion_control": "cubic",
    "failures": {},
}


def section(case: str, plain: dict[str, float], bypass: dict[str, float]) -> Section:
    """Three rounds that are all alike."""
    samples = [
        Sample(case, kind, number, values)
        for number in range(3)
        for kind, values in (("plain", plain), ("bypass", bypass))
    ]
    return Section(dict(MACHINE), samples)


def values(requests_per_s: float, p99_us: float, cpu_us: float) -> dict[str, float]:
    return {"requests_per_s": requests_per_s, "p99_us": p99_us, "cpu_us_per_request": cpu_us}


@pytest.fixture
def results() -> Results:
    return Results(
        {
            "redis": section("outbound/GET", values(1000, 50, 10), values(1500, 40, 7)),
            "gunicorn": section("mesh/1 KB", values(1000, 50, 10), values(960, 50, 10)),
        }
    )


def test_rows_beyond_a_limit_are_named(results: Results) -> None:
    (line,) = report.misses(results)
    assert line.startswith("gunicorn, mesh, 1 KB: requests/s")
    assert "0.96" in line


@pytest.mark.parametrize(
    ("bypass", "missed"),
    [(values(1000, 56, 10), "p99"), (values(1000, 50, 10.5), "CPU"), (values(975, 54, 10.2), None)],
)
def test_each_limit_is_looked_at(bypass: dict[str, float], missed: str | None) -> None:
    lines = list(report.misses(Results({"x": section("mesh/a", values(1000, 50, 10), bypass)})))
    assert [missed in line for line in lines if missed] == ([True] if missed else [])
    assert len(lines) == (missed is not None)


def test_the_page_has_each_application_and_its_reader(results: Results, tmp_path: Path) -> None:
    results.sections["gunicorn"].machine["failures"] = {"direct": "AssertionError: wrong"}
    page = tmp_path / "docs" / "applications.md"
    page.parent.mkdir()
    report.write(results, page, tmp_path / "docs" / "img" / "applications.png")
    text = page.read_text()
    assert "(img/applications.png)" in text
    assert "event loop: 1 applications, 1 rows, median **1.50**" in text
    redis, gunicorn = APPLICATIONS["redis"], APPLICATIONS["gunicorn"]
    assert "| reader | outbound | direct | mesh |" in text  # no row has the hop inbound
    assert f"| {redis.title} | event loop | 1.50 | – | – | 0.70 |  |" in text  # noqa: RUF001
    cells = f"| {gunicorn.title} | blocking | – | **failed** | 0.96 | 1.00 |"  # noqa: RUF001
    assert f"{cells} {gunicorn.advice} |" in text
    assert f"**{gunicorn.title} failed on direct: AssertionError: wrong**" in text
    assert report.is_incomplete(results, "gunicorn")
    assert not report.is_incomplete(results, "redis")
    assert report.is_incomplete(results, "nginx")


def test_only_what_was_measured_counts(results: Results, tmp_path: Path) -> None:
    fault = Section({**MACHINE, "faults": ["splice"]}, [])
    results.sections |= {"go-copy": fault, "half-close": Section(dict(MACHINE), [])}
    page = tmp_path / "applications.md"
    report.write(results, page, tmp_path / "applications.png")
    assert "2 of 4 applications were measured:" in page.read_text()
    assert "splice: " not in page.read_text()
    readme = tmp_path / "README.md"
    readme.write_text(
        "None of 33 was surely slower.\n[33 real applications](x), of 33 applications, bypass\n"
    )
    report.write_readme(readme, page)
    assert readme.read_text() == (
        "1 of 2 was surely slower.\n[2 real applications](x), of 2 applications, bypass\n"
    )
    with pytest.raises(ValueError, match="README has 0 sentences"):
        report.with_counts("None of 33 was surely slower.", page.read_text())


def test_readme_counts_as_the_page_does() -> None:
    readme = command.README.read_text()
    assert report.with_counts(readme, command.DOCUMENT.read_text()) == readme


def test_the_median_of_event_loops_is_judged(results: Results) -> None:
    """Blocking readers may be at 1.0."""
    assert not any(line.startswith("event loops") for line in report.misses(results))
    alike = values(1000, 50, 10)
    for name in ("nginx", "node"):
        results.sections[name] = section("direct/1 KB", alike, values(1200, 50, 10))
    said = list(report.misses(results))
    assert said[-1] == "event loops: their median is 1.20, not 1.3"


@pytest.mark.parametrize(
    ("counted", "share"),
    [
        ({"bypassed_bytes": 750, "tcp_bytes": 250}, "75 %"),
        ({"bypassed_bytes": 0, "tcp_bytes": 250}, "0 %"),
        ({"bypassed_bytes": 0, "tcp_bytes": 0}, "0 %"),
        ({}, "–"),  # noqa: RUF001 - of results from before it was counted
    ],
)
def test_a_row_says_how_much_has_bypassed(
    counted: dict[str, float], share: str, tmp_path: Path
) -> None:
    plain = values(1000, 50, 10)
    found = Results({"redis": section("outbound/GET", plain, {**plain, **counted})})
    report.write_tables(found, tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    assert "| CPU per request, us | bypassed |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| outbound | GET |")]
    assert row.endswith(f"| {share} |")


def test_a_check_that_takes_much_longer_than_over_tcp_is_refused() -> None:
    command.refuse_stalls({"plain": 1.0, "bypass": 5.9})
    with pytest.raises(AssertionError, match=r"took 6\.1 s, over TCP 1\.0 s"):
        command.refuse_stalls({"plain": 1.0, "bypass": 6.1})


def test_what_a_run_says_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    with path.open("w", buffering=1) as file:
        command.Logged(file).print("[bold]redis[/bold]", 1)
    assert path.read_text() == capsys.readouterr().out == "redis 1\n"


@pytest.mark.parametrize(
    ("moved", "longest"),
    [
        ((0, 5000, 10_000, 15_000), 0),
        ((0, 5000, 5000, 5000), 2),
        ((0, 5000, 5500, 6000, 11_000, 11_000), 2),  # probes are no bytes
        ((0,), 0),
    ],
)
def test_a_silence_lasts_from_byte_to_byte(moved: tuple[int, ...], longest: float) -> None:
    assert silence.longest_s([(float(at), size) for at, size in enumerate(moved)]) == longest


def test_a_silence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENCE_S", 0)
    with pytest.raises(AssertionError, match="no byte has moved"), silence.refused(lambda: 0):
        pass


def test_a_silence_does_not_hide_what_went_wrong() -> None:
    def check() -> None:
        with silence.refused(lambda: 0):
            raise ValueError("wrong byte")

    with pytest.raises(ValueError, match="wrong byte"):
        check()


def test_figures_are_of_all_requests() -> None:
    found = application.figures(range(1, 101), 2.0, payload=10)
    assert (found.requests, found.seconds, found.bytes) == (100, 2.0, 1000)
    assert (found.p50_us, found.p99_us) == (51, 100)
    with pytest.raises(ValueError, match="no request"):
        application.figures([], 1.0)


def test_every_application_says_what_to_expect() -> None:
    assert len(APPLICATIONS) >= 20
    for each in APPLICATIONS.values():
        assert len(each.hops) >= 2
        assert each.reader == "event loop" or each.advice, each.name
