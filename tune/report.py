"""HTML report of a sweep, with the importance of its parameters and the rank correlations of its metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import optuna

from tune import charts
from tune.search_space import SEED, Parameter, SearchSpace, format_value
from tune.searcher import optuna_distribution, to_optuna_params
from tune.trial_records import PointResult, TrialRecord, trial_name
from vilseg.config import RunConfig
from vilseg.evaluation import html_page
from vilseg.evaluation.proxy_metrics import MEASURES

_MIN_TRIALS = 6
"""Minimum number of trials for which importance and rank correlation are computed."""
_HEAT_MAP_AXES = ("loss.cross_modal.temperature", "model.clusters")
"""Preferred parameters for the rows and columns of the heat map, used if they vary."""


def render(
    name: str,
    config: RunConfig,
    space: SearchSpace,
    records: Sequence[TrialRecord],
    best: PointResult | None,
    commands: Sequence[str],
) -> str:
    """Return the report of a sweep as an HTML document.

    Args:
        name: name of the sweep.
        config: configuration that the trials vary.
        space: search space.
        records: records of all trials.
        best: best point; None if no trial has a score.
        commands: command lines to show.
    """
    objective = space.objective_name
    ended = (("done", "trials to the end"), ("stopped", "stopped"), ("failed", "failed"))
    headline = [(f"best {objective}", f"{best.score:.4f}" if best else "–", "")]
    headline += [(label, str(sum(record.status == status for record in records)), "") for status, label in ended]
    parts = [
        html_page.numbers(headline),
        _best_section(best),
        *_chart_sections(space, records, best),
        _correlation_section(records),
        _trials_section(records, objective),
        html_page.section("Commands", "", *(html_page.code(command) for command in commands)) if commands else "",
        html_page.folded("The space", html_page.code(space.to_yaml())),
        html_page.folded("The configuration that it varies", html_page.code(config.to_yaml())),
    ]
    return html_page.page(f"Sweep {name}", parts)


def _best_section(best: PointResult | None) -> str:
    if best is None:
        return html_page.section("The best point", "No trial has a score.")
    repeats = f"Mean of {len(best.trials)} trials that differ in their seed. " if len(best.trials) > 1 else ""
    trials = ", ".join(trial_name(trial.number) for trial in best.trials)
    note = f"{repeats}Trial {trials}. best.yaml holds the whole configuration: vilseg train --config best.yaml"
    return html_page.section(
        "The best point", note, html_page.card(html_page.facts({key: format_value(v) for key, v in best.point.items()}))
    )


def _chart_sections(space: SearchSpace, records: Sequence[TrialRecord], best: PointResult | None) -> list[str]:
    objective = space.objective_name
    scored = [record for record in records if record.status != "failed" and math.isfinite(record.score(objective))]
    if not scored:
        return []
    lines = [(record.point, record.score(objective)) for record in scored]
    parameters = {key: parameter for key, parameter in space.parameters.items() if key != SEED}
    rendered = [charts.learning_curves(scored, [t.number for t in best.trials] if best else [], objective=objective)]
    titles = ["Learning curves"]
    if len(parameters) >= 2:
        rows, columns = _axes(parameters)
        varied = [(p, s) for p, s in lines if rows in p and columns in p]
        if varied:
            rendered.append(
                charts.heat_map((rows, parameters[rows]), (columns, parameters[columns]), varied, objective=objective)
            )
            titles.append(f"{rows} × {columns}")
    importance = parameter_importance(space, scored)
    if importance:
        rendered.append(charts.importance_bars(importance))
        titles.append("Importance")
    note = (
        "Every trial is a line. One that was stopped early is shown with its last score, which is lower for that reason "
        "alone."
    )
    cards = [html_page.card(chart, title=title) for chart, title in zip(rendered, titles, strict=True)]
    return [
        html_page.section(
            "All trials", note, html_page.card(charts.parallel_coordinates(parameters, lines, objective=objective))
        ),
        f'<div class="charts">{"".join(cards)}</div>',
    ]


def _axes(parameters: dict[str, Parameter]) -> tuple[str, str]:
    keys = [key for key in _HEAT_MAP_AXES if key in parameters]
    keys += [key for key in parameters if key not in keys]
    return keys[0], keys[1]


def parameter_importance(space: SearchSpace, records: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the fraction of the scores' variance that each parameter explains (fANOVA, Hutter et al. 2014).

    Only the trials with the largest number of steps are used, since a score depends on the steps as much as on the parameters.

    Returns:
        Fraction by configuration key. Empty if fewer than `_MIN_TRIALS` trials are usable, if fewer than two parameters vary,
        or if all scores are equal.
    """
    objective = space.objective_name
    longest = max((record.step for record in records), default=0)
    trained = [record for record in records if record.step == longest and record.status != "failed"]
    keys = {key for record in trained for key in record.point}
    shared = [key for key in space.parameters if all(key in record.point for record in trained)]
    if len(trained) < _MIN_TRIALS or len(keys) < 2 or len({record.score(objective) for record in trained}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from optuna.importance import (
        FanovaImportanceEvaluator,
        get_param_importances,
    )  # imported here because it takes seconds

    study = optuna.create_study(direction="maximize")
    for record in trained:
        point = {key: record.point[key] for key in shared}
        study.add_trial(
            optuna.trial.create_trial(
                value=record.score(objective),
                params=to_optuna_params(space, point),
                distributions={key: optuna_distribution(space.parameters[key]) for key in shared},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))


def rank_correlations(records: Sequence[TrialRecord]) -> tuple[int, int, dict[str, float]]:
    """Compute Spearman's rank correlation with mIoU for each proxy metric, over evaluations of trials at the same step.

    Returns:
        The last step at which at least `_MIN_TRIALS` trials were evaluated and a correlation is defined, the number of these
        trials, and the correlations by proxy metric; (0, 0, {}) if there is no such step.
    """
    from scipy.stats import spearmanr

    at: dict[int, list[dict[str, float]]] = {}
    for record in records:
        for entry in record.curve:
            if "miou" in entry:
                at.setdefault(int(entry["step"]), []).append(entry)
    for step in sorted(at, reverse=True):
        entries = at[step]
        if len(entries) < _MIN_TRIALS:
            continue
        names = [name for name in MEASURES if all(name in entry for entry in entries)]
        pairs = {name: [(entry[name], entry["miou"]) for entry in entries] for name in names}
        correlations = {
            name: float(spearmanr(*zip(*both, strict=True)).statistic)
            for name, both in pairs.items()
            if all(len({pair[side] for pair in both}) > 1 for side in (0, 1))
        }
        if correlations:
            return step, len(entries), correlations
    return 0, 0, {}


def _correlation_section(records: Sequence[TrialRecord]) -> str:
    step, count, correlations = rank_correlations(records)
    if not correlations:
        return ""
    note = (
        f"Spearman's rank correlation with mIoU over the {count} trials that were evaluated at step {step}: 1 where a metric "
        "ranks them as mIoU does, 0 where it is unrelated. Where there are no masks, sweep by a metric that ranks well here."
    )
    rows = [(name, f"{value:+.2f}") for name, value in sorted(correlations.items(), key=lambda item: -item[1])]
    return html_page.section(
        "Without masks", note, html_page.card(html_page.table(("metric", "rank correlation"), rows))
    )


def _trials_section(records: Sequence[TrialRecord], objective: str) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record.point))
    order = sorted(records, key=lambda r: (-r.step, -r.score(objective) if r.curve else math.inf))
    rows = []
    for record in order:
        values = [format_value(record.point[key]) if key in record.point else "" for key in keys]
        score = record.score(objective)
        ended = record.error if record.status == "failed" else record.status
        seconds = html_page.seconds_text(record.curve[-1]["seconds"]) if record.curve else ""
        rows.append(
            [
                trial_name(record.number),
                *values,
                ended,
                str(record.step),
                seconds,
                f"{score:.4f}" if math.isfinite(score) else "",
            ]
        )
    head = ["trial", *keys, "ended", "step", "time", objective]
    return html_page.section(
        "Trials", "The furthest first, of these the best.", html_page.card(html_page.table(head, rows))
    )
