# SPDX-License-Identifier: Apache-2.0
"""What the benchmark makes of its measurements: statistics, verdicts, the report."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from install.program import intervals
from install.program.intervals import Interval
from tests.bed import wrk
from tests.bed.bed import REPOSITORY
from tests.bed.pairs import Bytes, alternated
from tests.bench import figures, limits, report, results, stats, tables
from tests.bench.__main__ import SECTIONS
from tests.bench.limits import LIMITS, Base, Limit
from tests.bench.metrics import METRICS
from tests.bench.results import Results, Sample, Section

MACHINE = {
    "date": "2026-11-20T08:00:00+00:00",
    "kernel": "6.18.44",
    "distribution": "Debian GNU/Linux 12 (bookworm)",
    "cpu": "AMD EPYC",
    "cpus": 2,
    "measuring_cpu": "1",
    "memory_gib": 23.4,
    "congestion_control": "cubic",
    "mode": "full",
    "auto": {"mode": "proxy-only", "reason": "fionread"},
    "versions": {"envoy": "1.40.0", "tcpip-bypass": "5ac426b"},
    "busy_before": {"1": 0.01, "0": 0.2},
    "stolen_share": 0.0,
    "took_s": 137,
}


def section(case: str, metric: str, plain: list[float], bypass: list[float]) -> Section:
    """A section in which one case was measured."""
    samples = [
        Sample(case, variant, number, {metric: value}, {10.0: 3, 20.0: 1})
        for variant, values in (("plain", plain), ("bypass", bypass))
        for number, value in enumerate(values)
    ]
    return Section(dict(MACHINE), samples)


def canned() -> Results:
    """Results of every section, a case or two of each."""
    found = Results(
        {
            "hops": section("inbound/v4/64", "median_us", [10, 10.2, 9.8], [5, 5.2, 5.1]),
            "streaming": section("inbound/fresh/same/64", "bytes_per_s", [2e8, 2e8], [1e8, 1.1e8]),
            "mesh": section("fixed/none/small/200", "p50_us", [200, 210], [150, 149]),
            "churn": section("inbound", "connections_per_s", [10_000, 10_100], [9_900, 10_200]),
            "others": section("out", "median_us", [12.0, 12.1], [12.0, 12.1]),
            "scale": section("connections/100000", "median_us", [12.0, 12.1], [6.0, 6.1]),
        }
    )
    hops = found.sections["hops"].samples
    hops += [Sample("unix/64", "unix", each, {"median_us": 8.0}) for each in range(3)]
    next(each for each in hops if each.variant == "bypass").values["joined_ms"] = 61.5
    found.sections["hops"].payload = {"inbound": Bytes(999, 1), "none": Bytes(0, 0)}
    found.sections["hops"].outcomes = {"paired": 1234, "no_peer": 0}
    scale = found.sections["scale"].samples
    scale += [Sample("connections/1", "bypass", each, {"median_us": 6.0}) for each in range(2)]
    return found


def test_summary_is_median_and_half_the_interquartile_range() -> None:
    assert stats.summary([1, 2, 3, 4, 100]) == stats.Summary(3, 1)
    assert stats.summary([7]) == stats.Summary(7, 0)


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians() -> None:
    plain = {0: 10.0, 1: 20.0, 2: 40.0}  # the machine became slower: pairs know, medians do not
    bypass = {0: 5.0, 1: 10.0, 2: 20.0, 3: 1.0}
    assert stats.ratio(bypass, plain) == Interval(0.5, 0.5, 0.5)


def test_interval_of_five_pairs_is_nearly_their_range() -> None:
    interval = intervals.bootstrap_median([0.5, 0.6, 0.7, 0.8, 0.9])
    assert interval.middle == 0.7
    assert interval.low in {0.5, 0.6}
    assert interval.high in {0.8, 0.9}
    assert interval == intervals.bootstrap_median([0.5, 0.6, 0.7, 0.8, 0.9])


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    series = [[draw.gauss(1, 0.1) for _ in range(11)] for _ in range(300)]
    held = sum(found.low <= 1 <= found.high for found in map(intervals.bootstrap_median, series))
    assert held > 0.9 * len(series)


def test_interval_narrows_with_more_pairs() -> None:
    draw = random.Random(2)
    few, many = ([draw.gauss(1, 0.1) for _ in range(count)] for count in (7, 200))
    narrow, wide = intervals.bootstrap_median(many), intervals.bootstrap_median(few)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2


def test_percentile_of_a_histogram() -> None:
    histogram = {10.0: 90, 20.0: 9, 1000.0: 1}
    assert [stats.percentile(histogram, each) for each in (50, 90, 99, 99.9)] == [10, 10, 20, 1000]
    with pytest.raises(ValueError, match="nothing"):
        stats.percentile({}, 50)


def test_histogram_keeps_three_digits() -> None:
    assert results.histogram([12.344, 12.341, 98_765]) == {12.3: 2, 98_800.0: 1}
    assert results.histogram({1234: 5, 1233: 2}) == {1230.0: 7}


def test_results_survive_the_file(tmp_path: Path) -> None:
    canned().save(tmp_path / "deep" / "results.json")
    assert results.load(tmp_path / "deep" / "results.json") == canned()


def test_latencies_of_all_rounds_are_added_up() -> None:
    assert canned().sections["hops"].latencies("inbound/v4/64", "plain") == {10.0: 9, 20.0: 3}


def test_alternated_reverses_every_other_round() -> None:
    order = [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert list(alternated("ab", 3)) == order


def test_wrk_output_adds_up_equal_latencies() -> None:
    load, errors, failures = wrk.parse(
        "totals 3 2000000 1 0\nlatency 5 1\nlatency 5 1\nlatency 9 1"
    )
    assert (load.latencies, load.duration_s, errors, failures) == ({5: 2, 9: 1}, 2.0, 1, 0)
    assert load.latency_us(50) == 5


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (Limit("", "hops", ("inbound/*/64",), "median_us", at_most=0.57), True),
        (Limit("", "hops", ("inbound/*/64",), "median_us", at_most=0.45), False),
        (Limit("", "hops", ("inbound/*/64",), "median_us", at_most=0.9, to=limits.AF_UNIX), True),
        (Limit("", "hops", ("outbound/*/64",), "median_us", at_most=0.57), None),
        (Limit("", "streaming", ("*/fresh/*",), "bytes_per_s", at_least=1.0), False),
        (Limit("", "streaming", ("*",), "bytes_per_s", at_least=0.54, surely=True), True),
        (Limit("", "streaming", ("*",), "bytes_per_s", at_least=0.56, surely=True), False),
        (Limit("", "hops", ("inbound/*/64",), "median_us", at_most=0.505, surely=True), True),
        (Limit("", "hops", ("inbound/*/64",), "median_us", at_most=0.49, surely=True), False),
        (Limit("", "mesh", ("fixed/none/*",), "p50_us", at_most=1, clear=True), True),
        (Limit("", "churn", ("inbound",), "connections_per_s", at_least=0.9, clear=True), False),
        (Limit("", "scale", ("connections/100000",), "median_us", at_most=1.05), True),
        (
            Limit(
                *("", "scale", ("connections/100000",), "median_us"),
                at_most=1.05,
                to=Base("bypass", "connections/1"),
            ),
            True,
        ),
    ],
)
def test_verdicts(limit: Limit, kept: bool | None) -> None:
    (judged,) = limits.verdicts(canned(), [limit])
    assert judged.kept is kept


def test_a_verdict_names_the_worst_case() -> None:
    found = canned()
    samples = section("sidecars/v4/64", "median_us", [10, 10], [9, 9]).samples
    found.sections["hops"].samples += samples
    (judged,) = limits.verdicts(found, [Limit("", "hops", ("*/v4/64",), "median_us", at_most=0.6)])
    assert (judged.case, judged.cases, judged.broken, judged.kept) == (
        "sidecars/v4/64",
        2,
        1,
        False,
    )


def test_every_limit_is_of_a_section_and_a_known_value() -> None:
    for limit in LIMITS:
        assert limit.section in SECTIONS
        assert limit.metric in METRICS
        assert (limit.at_most is None) != (limit.at_least is None)


def test_every_section_has_its_chapter() -> None:
    assert list(tables.CHAPTERS) == list(SECTIONS)


def written(results: Results, folder: Path) -> tuple[str, str]:
    """The page, and the file with every table."""
    page, every_table = folder / "benchmarks.md", folder / "build" / "tables.md"
    report.write(results, page, folder / "img", every_table)
    return page.read_text(), every_table.read_text()


def test_report(tmp_path: Path) -> None:
    page, every_table = written(canned(), tmp_path)
    assert "| Round trip of 64 B, inbound, to TCP | median, us | <= 0.6 | 0.510" in page
    claim = "Stream one way, on a fresh connection"
    assert f"| {claim} | MB/s | not surely < 0.97 | 0.525 [0.500, 0.550] | **no** |" in page
    assert "| streaming | MB/s | 1 of 1 | 0.525 [0.500, 0.550] (inbound/fresh/same/64) |" in page
    assert "Commit 5ac426b, mode full, forced (auto decides on proxy-only); Linux" in page
    assert "| inbound, all sizes | 61.5 | 61.5 | 1 of 3 |" in page
    assert "other programs kept this machine busy (CPU 0 20%)" in page
    assert "not measured" in page
    assert "| streaming | inbound/fresh/same/64 | MB/s | 0.525 [0.500, 0.550] |" in every_table
    assert "10.0 ±0.10 → 5.10 ±0.05: **0.51** [0.50, 0.52]" in every_table
    assert "| hops | 2026-11-20T08:00:00+00:00 | 137 |" in every_table
    assert "| inbound 99.9% | 1,234 paired |\n" in every_table
    for picture in ("size", "latency", "cpu"):
        assert f"(img/bench-{picture}.png)" in page or picture == "cpu"
        assert (tmp_path / "img" / f"bench-{picture}.png").stat().st_size < 60_000


def test_the_page_is_short_and_what_the_generator_writes() -> None:
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert page.startswith(report.HEAD)
    titles = re.findall(r"^## (.*)", page, re.MULTILINE)
    measured = [each for each in tables.CHAPTERS.values() if each.title in titles]
    for chapter in measured:
        assert f"## {chapter.title}\n\n{chapter.text}\n" in page
    assert (
        measured or report.NOTHING in page
    )  # a run of some sections says of the others: not measured
    for limit in LIMITS:
        title = METRICS[limit.metric].title
        assert f"| {limit.claim} | {title} | {limit.bound} | " in page
    assert len(page.splitlines()) <= 150


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("full", "mode full, which is what auto decides on this kernel"),
        ("off", "mode full, forced (auto decides on off)"),
    ],
)
def test_report_says_the_mode(tmp_path: Path, verdict: str, said: str) -> None:
    found = canned()
    for each in found.sections.values():
        each.machine["auto"] = {"mode": verdict, "reason": "kernel"}
    page, _ = written(found, tmp_path)
    assert said in page


def hops_of(*names: str) -> Section:
    """Round trips of 64 bytes on these hops."""
    made = [section(f"{name}/v4/64", "median_us", [15, 16, 17], [8, 8.125, 9]) for name in names]
    return Section(dict(MACHINE), [sample for each in made for sample in each.samples])


def test_figures_of_estimate_are_the_medians_of_the_run(tmp_path: Path) -> None:
    module = tmp_path / "figures.py"
    module.write_text(figures.MODULE.read_text())
    figures.write(hops_of("inbound", "outbound", "sidecars"), module)
    text = module.read_text()
    assert re.findall(r"RoundTrip\((\d.*)\)", text) == ["16.0, 8.12"] * 3
    with pytest.raises(ValueError, match="outbound"):
        figures.write(hops_of("inbound"), module)
    assert module.read_text() == text


def test_report_of_nothing(tmp_path: Path) -> None:
    assert "not measured" in written(Results(), tmp_path)[0]


def test_report_says_that_a_section_is_incomplete(tmp_path: Path) -> None:
    found = canned()
    found.sections["churn"].machine["incomplete"] = "interrupted (SIGINT)"
    page, _ = written(found, tmp_path)
    assert "Section churn is incomplete: interrupted (SIGINT)" in page
