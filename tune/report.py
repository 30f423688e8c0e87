"""The page of a sweep, and the figures on it that are computed from its trials."""

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

_FEW = 6
"""Trials below which importance and rank correlation say nothing."""
_PREFERRED = ("loss.cross_modal.temperature", "model.clusters")
"""Rows and columns of the heat map, where they vary."""


def render(
    name: str,
    config: RunConfig,
    space: SearchSpace,
    records: Sequence[TrialRecord],
    best: PointResult | None,
    commands: Sequence[str],
) -> str:
    """The report of a sweep as an HTML document."""
    objective = space.objective_name
    ended = (("done", "trials to the end"), ("stopped", "stopped"), ("failed", "failed"))
    headline = [(f"best {objective}", f"{best.score:.4f}" if best else "–", "")]
    headline += [(label, str(sum(record.status == status for record in records)), "") for status, label in ended]
    parts = [
        html_page.numbers(headline),
        _best(best),
        *_drawn(space, records, best),
        _correlations(records),
        _trials(records, objective),
        html_page.section("Commands", "", *(html_page.code(command) for command in commands)) if commands else "",
        html_page.folded("The space", html_page.code(space.to_yaml())),
        html_page.folded("The configuration that it varies", html_page.code(config.to_yaml())),
    ]
    return html_page.page(f"Sweep {name}", parts)


def _best(best: PointResult | None) -> str:
    if best is None:
        return html_page.section("The best point", "No trial has a score.")
    repeats = f"Mean of {len(best.trials)} trials that differ in their seed. " if len(best.trials) > 1 else ""
    trials = ", ".join(trial_name(trial.number) for trial in best.trials)
    note = f"{repeats}Trial {trials}. best.yaml holds the whole configuration: vilseg train --config best.yaml"
    return html_page.section(
        "The best point", note, html_page.card(html_page.facts({key: format_value(v) for key, v in best.point.items()}))
    )


def _drawn(space: SearchSpace, records: Sequence[TrialRecord], best: PointResult | None) -> list[str]:
    objective = space.objective_name
    scored = [record for record in records if record.status != "failed" and math.isfinite(record.score(objective))]
    if not scored:
        return []
    lines = [(record.point, record.score(objective)) for record in scored]
    parameters = {key: parameter for key, parameter in space.parameters.items() if key != SEED}
    drawn = [charts.learning_curves(scored, [t.number for t in best.trials] if best else [], objective=objective)]
    titles = ["Learning curves"]
    if len(parameters) >= 2:
        rows, columns = _axes(parameters)
        lines_of = [(p, s) for p, s in lines if rows in p and columns in p]
        if lines_of:
            drawn.append(
                charts.heat_map((rows, parameters[rows]), (columns, parameters[columns]), lines_of, objective=objective)
            )
            titles.append(f"{rows} × {columns}")
    shares = parameter_importance(space, scored)
    if shares:
        drawn.append(charts.importance_bars(shares))
        titles.append("Importance")
    note = (
        "Every trial is a line. One that was stopped on its way stands with the score it had, which is lower for that reason "
        "alone."
    )
    cards = [html_page.card(chart, title=title) for chart, title in zip(drawn, titles, strict=True)]
    return [
        html_page.section(
            "All trials", note, html_page.card(charts.parallel_coordinates(parameters, lines, objective=objective))
        ),
        f'<div class="charts">{"".join(cards)}</div>',
    ]


def _axes(parameters: dict[str, Parameter]) -> tuple[str, str]:
    chosen = [key for key in _PREFERRED if key in parameters]
    chosen += [key for key in parameters if key not in chosen]
    return chosen[0], chosen[1]


def parameter_importance(space: SearchSpace, records: Sequence[TrialRecord]) -> dict[str, float]:
    """Share of the scores' variance that each parameter explains (fANOVA, Hutter et al. 2014); empty where trials are few.

    Of trials of unlike length the longest are taken, as a score says as much of the steps made as of the values.
    """
    objective = space.objective_name
    longest = max((record.step for record in records), default=0)
    whole = [record for record in records if record.step == longest and record.status != "failed"]
    keys = {key for record in whole for key in record.point}
    shared = [key for key in space.parameters if all(key in record.point for record in whole)]
    if len(whole) < _FEW or len(keys) < 2 or len({record.score(objective) for record in whole}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # seconds, for the report alone

    study = optuna.create_study(direction="maximize")
    for record in whole:
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
    """Spearman's rank correlation with mIoU of each measure that needs no mask, over evaluations at the same step.

    Returns:
        The last step that enough trials were evaluated at, how many they are, and the correlations; 0, 0 and none without.
    """
    from scipy.stats import spearmanr

    at: dict[int, list[dict[str, float]]] = {}
    for record in records:
        for entry in record.curve:
            if "miou" in entry:
                at.setdefault(int(entry["step"]), []).append(entry)
    for step in sorted(at, reverse=True):
        entries = at[step]
        if len(entries) < _FEW:
            continue
        told = [name for name in MEASURES if all(name in entry for entry in entries)]
        pairs = {name: [(entry[name], entry["miou"]) for entry in entries] for name in told}
        found = {
            name: float(spearmanr(*zip(*both, strict=True)).statistic)
            for name, both in pairs.items()
            if all(len({pair[side] for pair in both}) > 1 for side in (0, 1))
        }
        if found:
            return step, len(entries), found
    return 0, 0, {}


def _correlations(records: Sequence[TrialRecord]) -> str:
    step, count, found = rank_correlations(records)
    if not found:
        return ""
    note = (
        f"Spearman's rank correlation with mIoU over the {count} trials that were evaluated at step {step}: 1 where a measure "
        "puts them into the very same order, 0 where it knows nothing of it. It tells what to sweep by where there are no masks."
    )
    rows = [(name, f"{value:+.2f}") for name, value in sorted(found.items(), key=lambda item: -item[1])]
    return html_page.section(
        "Without masks", note, html_page.card(html_page.table(("measure", "rank correlation"), rows))
    )


def _trials(records: Sequence[TrialRecord], objective: str) -> str:
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
