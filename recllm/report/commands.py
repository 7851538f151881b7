"""What `recllm report` does: reads, measures, draws, and writes one folder."""

from __future__ import annotations

from pathlib import Path

from recllm.evaluation import tables
from recllm.evaluation.commands import report_table
from recllm.evaluation.inputs import stem
from recllm.files import MANIFEST, staged_folder, write_json
from recllm.report import page, pooled, results
from recllm.report.examples import examples_section
from recllm.report.facts import data_section, making_section, protocol_section, sources_section
from recllm.report.headline import answer
from recllm.report.inputs import Inputs, read_inputs
from recllm.report.ledger import Ledger
from recllm.report.options import ReportOptions
from recllm.report.text import clean, escape, plural, shown_names
from recllm.report.training import training_section
from recllm.runs.provenance import describe_run

KIND = "report"


def report(options: ReportOptions) -> Path:
    """Runs `ReportOptions`; returns the page that it wrote.

    Beside report.html it writes metrics.json, .csv and .tex (as `recllm eval ranks --out`), the same of the
    ablation, sources.json, manifest.json and figures/*.svg.

    Raises:
        DataError: As `read_inputs` says; or the folder exists. Nothing is written then.
    """
    inputs = read_inputs(options)
    table = report_table(inputs.systems, options.ks, resamples=options.resamples, seed=options.seed)
    ablation = None
    if inputs.ablation:
        ablation = report_table(inputs.ablation, options.ks, resamples=options.resamples, seed=options.seed)
    shown = shown_names([system.records.system for system in inputs.systems])
    ledger = Ledger()
    title = options.title or f"How well does {clean(shown[inputs.systems[0].records.system], 60)} rank?"
    html = page.document(
        clean(title, 160),
        _lead(inputs, table, shown),
        _sections(options, inputs, table, ablation, shown, ledger),
    )
    out = options.out or Path("reports") / _name(inputs)
    with staged_folder(out, kind=KIND, overwrite=options.overwrite) as folder:
        (folder / "report.html").write_text(html, encoding="utf-8")
        tables.write(table, folder, "metrics")
        if ablation is not None:
            tables.write(ablation, folder, "ablation")
        (folder / "figures").mkdir()
        for name, svg in ledger.figures.items():
            (folder / "figures" / f"{name}.svg").write_text(svg, encoding="utf-8")
        write_json(folder / "sources.json", ledger.entries)
        settings = {name: _plain(value) for name, value in vars(options).items()}
        write_json(folder / MANIFEST, {"kind": KIND, "settings": settings, "run": describe_run()})
    print(f"{out / 'report.html'}: open it in any browser; {plural(len(ledger.figures), 'figure')}")
    return out / "report.html"


def _sections(
    options: ReportOptions,
    inputs: Inputs,
    table: tables.Table,
    ablation: tables.Table | None,
    shown: dict[str, str],
    ledger: Ledger,
) -> list[page.Section]:
    return [
        results.main_section(inputs, table, shown, ledger),
        protocol_section(inputs),
        data_section(inputs, ledger),
        training_section(inputs, ledger),
        results.cutoff_section(inputs, shown, ledger),
        results.history_section(inputs, table, shown, ledger, options.resamples, options.seed),
        results.ablation_section(inputs, ablation, table, ledger),
        pooled.curves_section(inputs, shown, ledger),
        pooled.calibration_section(inputs, shown, ledger),
        pooled.trust_section(inputs, table, shown, ledger),
        examples_section(inputs, shown, options.examples, options.seed, ledger),
        making_section(inputs),
        sources_section(ledger),
    ]


def _lead(inputs: Inputs, table: tables.Table, shown: dict[str, str]) -> str:
    made = describe_run()
    by = f"Made {escape(made['time'])} by recllm {escape(made['recllm'])}."
    byline = f"Protocol <code>{escape(inputs.protocol)}</code>. {by}"
    return answer(table, inputs.systems[0].records.system, shown) + f'<p class="byline">{byline}</p>'


def _name(inputs: Inputs) -> str:
    return stem(inputs.systems[0].path)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
