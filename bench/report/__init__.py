"""``python -m bench report``: tables and plots of README.md and docs/, from the files in bench/results/ alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import extras
from bench.options import HelpFormatter
from bench.report.results import Results, load
from bench.report.text import demo_block, readme_speed, speed_page, traffic_block

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {}: made by `python -m bench report` -->", "<!-- end of {} -->"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Write the performance tables of README.md, docs/design.md and docs/speed.md, and the plots in "
        "docs/, from the JSON files in bench/results/.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a text is not up to date")
    parser.add_argument("--no-plots", action="store_true", help="texts only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.check and not args.no_plots:
        extras.require("matplotlib")
    results = load(RESULTS)
    stale = [path for path, text in texts(results, ROOT).items() if not path.exists() or path.read_text() != text]
    if args.check:
        for path in stale:
            print(f"not up to date: {path.relative_to(ROOT)}; run python -m bench report", file=sys.stderr)
        return 1 if stale else 0
    for path, text in texts(results, ROOT).items():
        path.write_text(text)
        print(f"{'written' if path in stale else 'unchanged'}: {path.relative_to(ROOT)}")
    if not args.no_plots:
        from bench.report.plots import draw

        for path in draw(results, ROOT / "docs"):
            print(f"drawn: {path.relative_to(ROOT)}")
    return 0


def texts(results: Results, root: Path) -> Mapping[Path, str]:
    """What every file that holds results should read, given what stands around the results now."""
    readme, design = root / "README.md", root / "docs" / "design.md"
    demo = replaced(readme.read_text(), "demo", demo_block(results))
    return {
        readme: replaced(demo, "speed", readme_speed(results)),
        design: replaced(design.read_text(), "traffic", traffic_block(results)),
        root / "docs" / "speed.md": speed_page(results),
    }


def replaced(text: str, name: str, block: str) -> str:
    """The text with another block between its markers. Raises ValueError where they are missing or twice there."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"there must be one pair of markers, {begin} and {end}")
    before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
    stripped = block.strip("\n")
    return f"{before}{begin}\n\n{stripped}\n\n{end}{after}"
