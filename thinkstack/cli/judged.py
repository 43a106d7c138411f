"""Commands that judge a finished evaluation by what comes from outside: reports of a harness, standings of contests."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from thinkstack.cli.arguments import N, Name
from thinkstack.types import ConfigError


def swe_bench(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    /,
    predictions: Annotated[Path | None, arg(metavar="FILE")] = None,
    name: Name = "",
    reports: Annotated[tuple[Path, ...], arg(metavar="FILE")] = (),
    logs: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    task: Name = "",
    report: Annotated[Path | None, arg(metavar="FOLDER")] = None,
) -> None:
    """Write the patches of an evaluation as predictions for SWE-bench's harness, and read its reports as verdicts.

    First --predictions, then run the official harness on the written files, then --reports. Nothing is run here.

    Args:
        run: The folder of an evaluation of swe_bench_verified, swe_bench_multilingual or swe_bench.
        predictions: File to write, NAME.jsonl; with several completions per instance NAME-1.jsonl, NAME-2.jsonl, ...
        name: With --predictions: start of model_name_or_path; default the name of the model.
        reports: Reports that the harness wrote, MODEL.RUN_ID.json, one for each file of predictions.
        logs: Folder logs/run_evaluation/RUN_ID of the harness, which says which patches could not be applied.
        task: The task; needed if the evaluation has several of SWE-bench.
        report: Folder for report.html, report.md, report.json and plots.
    """
    from thinkstack.pipeline.evaluation import print_results
    from thinkstack.stages.swe_bench import apply_reports, write_predictions

    if (predictions is None) == (not reports):
        raise ConfigError("give one of --predictions, to write them, and --reports, to read the verdicts")
    if predictions is not None:
        write_predictions(run, predictions, name, task)
        return
    print_results(apply_reports(run, reports, logs, task), report)


def codeforces(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    /,
    standings: Annotated[Path, arg(metavar="FILE")],
    seed: N = 0,
    report: Annotated[Path | None, arg(metavar="FOLDER")] = None,
) -> None:
    """Rate an evaluation of codeforces by the standings of its contests; the protocol is ours.

    Args:
        run: The folder of an evaluation, such as runs/eval/NAME, or its samples.jsonl.
        standings: A row for each participant with contest_id, rating, points, and optionally penalty.
        seed: Seed of the re-run error.
        report: Folder for report.html, report.md, report.json and plots.
    """
    from thinkstack.pipeline.evaluation import print_results
    from thinkstack.stages.contests import rate_run

    print_results(rate_run(run, standings, seed), report)
