"""What the results say, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.byte_table import STEP_DTYPES
from bench.cache_model import PassPlan, bounds, chunk_of, plan_in_use, predict, window_chunks
from bench.contenders import ADAMW, BASELINE, FUSED
from bench.host import cost_table
from bench.report.results import CounterFile, Results, StepFile
from bench.shapes import MODELS, SHAPES
from bench.step_table import notes, step_cells, title, waits_for_host
from bench.table import results_table
from bench.timing import StepRow, ratios
from bench.traffic import MOST_CHUNKS, TRIES_ON, USABLE

NO_GPU = "There is no GPU figure yet."
HOW_TO_READ = (
    "One step in milliseconds, medians. In brackets the time in units of a baseline's, round by round: all contenders "
    "took their samples in turn, but for lists that memory did not hold for all of them, one by one. fp32: all "
    "numbers; mixed: bfloat16 parameters and gradients with float32 state; bf16: state too. *: the GPU waited for the "
    "host, whose time it is."
)
#: Lists of tensors beside each other in one table of the README; more are a table for each set of dtypes.
MOST_COLUMNS = 6
#: Bytes per second, where bytes alone are asked for: the order of the items depends on it, if little.
SOME_BANDWIDTH = 4e12


# -- README.md -------------------------------------------------------------------------------------------------------


def readme_speed(results: Results) -> str:
    """Medians, contenders by lists of tensors, for each file; and what a step costs the host.

    Of a device's later files, whom an earlier one has not shown, and the baseline.
    """
    blocks = [HOW_TO_READ] if results.steps else []
    if not any(found.on_gpu for found in results.steps):
        blocks.append(NO_GPU)
    seen: set[tuple[str, ...]] = set()
    for found in results.steps:
        device, baseline = found.environment["device"], ADAMW if found.on_gpu else BASELINE
        keys = [(device, row.model, row.dtypes, row.contender) for row in found.rows]
        others = {key[:3] for key in keys if key not in seen}
        new = [
            row
            for row, key in zip(found.rows, keys, strict=True)
            if key not in seen or (row.contender == baseline and key[:3] in others)
        ]
        seen |= {key for row, key in zip(found.rows, keys, strict=True) if row.device_s is not None}
        if not new:
            continue
        blocks.append(
            f"{described(found.environment)}, [the file](bench/results/{found.name}); in brackets times {baseline}:"
        )
        # Lists of equal tensors are for the plot of bandwidth, and for docs/speed.md; so are those for which there was
        # too little memory to have anything to compare with.
        compared = {(row.model, row.dtypes) for row in new if row.contender == baseline and row.device_s is not None}
        shown = [row for row in new if row.model in MODELS and (row.model, row.dtypes) in compared] or new
        if len({(row.model, row.dtypes) for row in shown}) <= MOST_COLUMNS:
            blocks.append(_pivot(shown, baseline))
        else:
            for dtypes in dict.fromkeys(row.dtypes for row in shown):
                blocks.append(_pivot([row for row in shown if row.dtypes == dtypes], baseline))
        absent = [name for name in dict.fromkeys(row.contender for row in shown) if not _ran(name, shown)]
        if absent:
            blocks.append(f"No figures of {', '.join(absent)}: [docs/speed.md](docs/speed.md) says why.")
    drawn = [found for found in results.steps if has_picture(found)]
    if drawn:
        blocks.append(f"![Step time, bandwidth and host time](docs/{picture_of(drawn[0].name)})")
    for host in results.hosts:
        blocks.append(
            "What a fused step costs the host, launches left out (`python -m bench host`), in microseconds. "
            f"{described(host.environment)}, [the file](bench/results/{host.name}):"
        )
        blocks.append(_preformatted(cost_table(host.costs)))
    blocks.append("All tables, with spread and bandwidth, and plots: [docs/speed.md](docs/speed.md).")
    return "\n\n".join(blocks)


def demo_block(results: Results) -> str:
    """The table that the demonstration prints."""
    return _preformatted(results_table(results.demo, with_published=True))


def has_picture(found: StepFile) -> bool:
    """Whether a file has lists of tensors enough to draw a line through: three with a baseline, of a GPU two."""
    lists = {row.model for row in found.rows if row.device_s is not None and row.contender == BASELINE}
    return len(lists) >= (2 if found.on_gpu else 3)


def picture_of(name: str) -> str:
    """The picture that belongs to a file of results."""
    return f"{name.removesuffix('.json')}.png"


def described(environment: dict[str, Any]) -> str:
    """The machine and the versions in one line."""
    parts = [environment["device"]]
    if environment.get("driver"):
        parts.append(f"driver {environment['driver']}")
    if "multiprocessors" not in environment:
        parts.append(f"{environment['threads']} threads")
    parts.append(f"torch {environment['torch']}")
    if environment.get("triton"):
        parts.append(f"triton {environment['triton']}")
    return ", ".join([*parts, environment["date"][:10]])


def _pivot(rows: Sequence[StepRow], baseline: str) -> str:
    """Contenders by model and dtypes; a dash where there is no figure."""
    lists = list(dict.fromkeys((row.model, row.dtypes) for row in rows))
    of_list = {key: [row for row in rows if (row.model, row.dtypes) == key] for key in lists}
    relative = {key: ratios(members, baseline) for key, members in of_list.items()}
    lines = []
    for contender in dict.fromkeys(row.contender for row in rows):
        cells = []
        for key in lists:
            row = next((row for row in of_list[key] if row.contender == contender), None)
            ratio = None if row is None or contender == baseline else relative[key].get(contender)
            cells.append(_milliseconds(row, ratio, of_list[key]))
        if _ran(contender, rows):
            lines.append([contender, *cells])
    # Contenders that had the memory to themselves are not to be compared in earnest.
    together = {key for key, members in of_list.items() if members[0].side_by_side}
    header = [" ".join(key) if key in together else f"{' '.join(key)}, one by one" for key in lists]
    return markdown_table(["", *header], lines)


def _ran(contender: str, rows: Sequence[StepRow]) -> bool:
    return any(row.contender == contender and row.device_s is not None for row in rows)


def _milliseconds(row: StepRow | None, ratio: Any, beside: Sequence[StepRow]) -> str:
    if row is None or row.device_s is None:
        return "-"
    time = f"{1e3 * row.device_s.median:.3g}" if row.device_s.median < 1 else f"{1e3 * row.device_s.median:.0f}"
    time += "*" * waits_for_host(row, beside)
    return time if ratio is None else f"{time} ({ratio.median:.2f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _preformatted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


# -- docs/speed.md ---------------------------------------------------------------------------------------------------


def speed_page(results: Results) -> str:
    """All tables, and who is missing in them and why."""
    blocks = ["# Speed", "Made by `python -m bench report` from the files in bench/results/."]
    if not any(found.on_gpu for found in results.steps):
        blocks.append(NO_GPU)
    for found in results.steps:
        blocks += [f"## {found.name}", described(found.environment) + "."]
        if has_picture(found):
            blocks.append(f"![Step time, bandwidth and host time]({picture_of(found.name)})")
        if found.copy_bandwidth is not None:
            blocks.append(
                f"Copy bandwidth in the same run, read plus written: {found.copy_bandwidth / 1e9:.1f} GB/s, the best "
                f"of {len(found.copies)} samples (median {median(found.copies) / 1e9:.1f})."
            )
        blocks += [*_step_tables(found, found.rows), *_step_tables(found, found.beside_compiled)]
        compared = list(_predicted_beside_measured(found))
        if compared:
            header = ["DALS fused", "bytes per parameter, PREDICTED", "ms, PREDICTED", "ms, measured"]
            blocks += [f"What the cache model predicts {_of_which(found.plan)}:", markdown_table(header, compared)]
        blocks.append(_preformatted(notes(found.on_gpu)))
        if found.targets:
            blocks += ["What the run was held against:", _targets_table(found)]
    for counted in results.counters:
        blocks += [f"## {counted.name}", f"{described(counted.environment)}. {counted.what}"]
        blocks.append(
            "Bytes per parameter by the memory's counters, and what the cache model predicts "
            f"{_of_which(counted.plan)}:"
        )
        blocks.append(markdown_table(["DALS fused", "PREDICTED", "measured"], list(_predicted_beside_counted(counted))))
    for name, record in results.training:
        blocks += [f"## {name}", described(record["environment"]) + ".", training_table(record)]
    return "\n\n".join(blocks) + "\n"


def _step_tables(found: StepFile, all_rows: Sequence[StepRow]) -> Iterator[str]:
    for key in dict.fromkeys((row.model, row.dtypes) for row in all_rows):
        rows = [row for row in all_rows if (row.model, row.dtypes) == key]
        header, cells = step_cells(rows, found.copy_bandwidth)
        yield f"**{title(rows[0])}**"
        if cells:
            yield markdown_table(header, cells)
        failures = [f"- {row.contender}: {row.error}" for row in rows if row.error is not None]
        if failures:
            yield "\n".join(["No figures:", "", *failures])


def _predicted_beside_measured(found: StepFile) -> Iterator[list[str]]:
    """Steps of the fused path on a GPU, whose cache and size the file tells."""
    if not found.on_gpu or found.copy_bandwidth is None:
        return
    plan = found.plan if _can_be_replayed(found.plan) else None
    for row in found.rows:
        if row.contender == FUSED and row.device_s is not None:
            moved, times = _prediction(row.model, row.dtypes, found.environment, found.copy_bandwidth, plan)
            yield [f"{row.model} {row.dtypes}", moved, times, f"{1e3 * row.device_s.median:.3f}"]


def _predicted_beside_counted(counted: CounterFile) -> Iterator[list[str]]:
    for row in counted.rows:
        moved, _ = _prediction(row["model"], row["dtypes"], counted.environment, SOME_BANDWIDTH, counted.plan)
        yield [f"{row['model']} {row['dtypes']}", moved, f"{row['bytes_per_parameter']:.1f}"]


def _can_be_replayed(plan: dict[str, Any] | None) -> bool:
    """Whether work lists are still made as this plan wants them; the windows of older files were counted otherwise."""
    return "window_per_program" in (plan or {})


def _of_which(plan: dict[str, Any] | None) -> str:
    share = " to ".join(f"{100 * usable:.0f}" for usable in USABLE)
    of = "of that plan" if _can_be_replayed(plan) else "of the plan in use now, which is another than the measured one"
    return f"{of}, with {share} % of the L2 cache"


def _prediction(
    model: str, dtypes_name: str, gpu: dict[str, Any], bandwidth: float, plan: dict[str, Any] | None
) -> tuple[str, str]:
    """Bytes per parameter and milliseconds of the fused pass, for either usable share of the cache."""
    used = dict(plan or plan_in_use())
    multiple, chunk_bytes = used.pop("window_per_program"), used.pop("chunk_bytes")
    used.pop("same_runs", None)  # of no account for bytes
    programs = used.pop("programs_per_sm") * gpu["multiprocessors"]
    dtypes = STEP_DTYPES[dtypes_name]
    sizes = tuple(math.prod(shape) for _, shape in SHAPES[model]())
    window, chunk = window_chunks(multiple, programs), chunk_of(dtypes, chunk_bytes)
    replayed = PassPlan(sizes, dtypes, window, chunk, programs=programs, bandwidth=bandwidth, **used)
    predicted = predict(replayed.coarser(MOST_CHUNKS), *(int(usable * gpu["l2_bytes"]) for usable in USABLE))
    fastest = bounds(replayed)[0] * sum(sizes) / bandwidth
    times = [f"{1e3 * traffic.slowness * fastest:.3f}" for traffic in predicted]
    return " to ".join(f"{traffic.per_parameter:.1f}" for traffic in predicted), " to ".join(times)


def _targets_table(found: StepFile) -> str:
    rows = [
        [target["label"], target["bound"], target["value"], {True: "yes", False: "NO"}.get(target["passed"], "-")]
        for target in found.targets
    ]
    return markdown_table(["", "bound", "value", "holds"], rows)


def training_table(record: dict[str, Any]) -> str:
    """Whole training steps and the optimizer's share of them."""
    rows = []
    failures = []
    has_state = record["settings"].get("peak_of_steps", 1) > 1  # the peak of a first eager step leaves it out
    for row in record["training_steps"]:
        parameters = f", {row['parameters'] / 1e6:.1f} million parameters" if row["parameters"] else ""
        label = [f"{row['model']} {row['size']}{parameters}", row["contender"], row["mode"]]
        if row["error"] is not None:
            failures.append(f"- {', '.join(label)}: {row['error']}")
        if row["step_s"] is None:
            continue
        step, optimizer = row["step_s"]["median"], row["optimizer_s"]
        share = "-" if optimizer is None else f"{100 * optimizer['median'] / step:.0f} %"
        known = row["peak_bytes"] is not None and has_state
        memory = f"{row['peak_bytes'] / 2**20:.0f}" if known else "-"
        rows.append([*label, f"{1e3 * step:.2f}", share, memory])
    header = ["model", "optimizer", "mode", "step ms", "optimizer's share", "peak MiB"]
    return "\n".join([markdown_table(header, rows), "", *failures]).rstrip()


# -- docs/design.md --------------------------------------------------------------------------------------------------


def traffic_block(results: Results) -> str:
    """The predictions for float32 parameters."""
    if results.traffic is None:
        return "Nothing was predicted yet: `python -m bench traffic --json bench/results/traffic.json`."
    cells = [cell for cell in results.traffic["modes"] if cell["dtypes"] == "fp32"]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    modes = list(dict.fromkeys(cell["mode"] for cell in cells))
    found = {(cell["mode"], cell["model"], cell["usable"]): cell for cell in cells}

    def pairs(mode: str, figure: str, digits: int) -> list[str]:
        both = [[f"{found[mode, model, usable][figure]:.{digits}f}" for usable in USABLE] for model in models]
        return [f"{full} ({less})" for full, less in both]

    moved = [
        [mode, f"{found[mode, models[0], USABLE[0]]['uncached']:.0f}", *pairs(mode, "predicted", 1)] for mode in modes
    ]
    times = [[mode, *pairs(mode, "slowness", 2)] for mode in modes]
    intro = f"PREDICTED bytes per float32 parameter, {cells[0]['least']:.0f} at least. "
    assumptions = f"{results.traffic['assumptions']}; [all predictions](../bench/results/traffic.json):"
    blocks = [intro + assumptions, markdown_table(["", "no cache", *models], moved)]
    blocks += ["PREDICTED time over that of the least bytes at full bandwidth:", markdown_table(["", *models], times)]
    tries = [
        [some["name"], *(f"{some[figure]:.2f}" for figure in ("excess", "slowness"))]
        for some in results.traffic["tries"]
    ]
    blocks.append(
        f"PREDICTED for plans that differ in one thing, on {TRIES_ON}, as multiples of the least, means over these "
        "models and three sets of dtypes:"
    )
    blocks.append(markdown_table(["", "bytes", "time"], tries))
    return "\n\n".join(blocks)
