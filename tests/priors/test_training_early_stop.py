"""The end of a training run before its images are used up: when, with which weights, and the same after a resume."""

from __future__ import annotations

import math

import pytest
import torch

from recon.errors import InputError
from recon.priors.network import Architecture, build_network
from recon.priors.training import EarlyStop, HeldOut, Task, Training, TrainingConfig
from recon.schedules import Schedule

TINY = Architecture(family="adm", size=16, channels=(32, 64), blocks=1)
CONFIG = TrainingConfig(
    images=48, batch=2, chunk=2, warmup=2, ema=10, precision="float32", validate_images=2,
    validation_sigmas=(0.1, 1.0), early_stop=EarlyStop(patience=3),
)  # fmt: skip


def images(step, rows):
    torch.manual_seed(step)
    flat = torch.randn(4, 1, 1).expand(-1, 16, 16)[list(rows)]
    return flat.contiguous(), torch.ones(len(rows), 16, 16)


def training(folder=None, config=CONFIG, held_out=True):
    told = HeldOut(images(999, range(2))[0]) if held_out else None
    return Training(config, Task(build_network(TINY).train(), images, Schedule(0.01, 10.0), 0.5, told), folder)


def with_scores(run, scores):
    """The run, its held-out errors replaced by given ones and its weights by the number of images seen."""
    numbers = iter(scores)

    def validated(sigma):
        if sigma == CONFIG.validation_sigmas[0]:
            run.told = next(numbers)
        return run.told

    run._error = validated
    run.pool.map = lambda function, levels: [function(level) for level in levels]
    return run


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one | two)


def test_the_score_is_a_geometric_mean_or_one_level():
    errors = {0.1: 0.05, 1.0: 0.8}
    assert EarlyStop(patience=1).score(errors) == pytest.approx(math.sqrt(0.05 * 0.8), rel=1e-14)
    assert EarlyStop(patience=1, sigma=1.0).score(errors) == 0.8


def test_it_stops_after_patience_validations_without_a_better_one_and_keeps_the_best():
    said = []
    scores = [5.0, 4.0, 4.5, 3.0, 3.1, 3.0, 3.2, 1.0]
    run = with_scores(training(), scores)
    at_best = with_scores(training(), scores)
    at_best.run(stop_after=4)
    best = {name: value.clone() for name, value in zip(at_best.names, at_best.average, strict=True)}
    run.run(said.append)
    assert run.progress.stopped and run.progress.step == 7
    assert (run.progress.best, run.progress.best_images, run.progress.waited) == (pytest.approx(3.0), 8, 3)
    assert same(run.averaged(), best)
    assert not same(run.averaged(), dict(zip(run.names, run.average, strict=True)))
    assert said[-1] == "no better for 3 validations: ends with the average of 8 images"
    assert [record["score"] for record in run.progress.history if "score" in record] == pytest.approx(scores[:7])


def test_a_stopped_run_stays_stopped_and_a_resumed_one_stops_where_the_whole_one_did(tmp_path):
    scores = [5.0, 4.0, 3.0, 3.1, 3.2, 3.3, 1.0]
    whole = with_scores(training(tmp_path / "whole"), scores)
    whole.run()
    assert whole.progress.step == 6
    with_scores(training(tmp_path / "cut"), scores).run(stop_after=4)
    rest = with_scores(training(tmp_path / "cut"), scores[4:])
    rest.run()
    assert rest.progress.step == 6 and same(whole.averaged(), rest.averaged())
    history = [[{k: v for k, v in r.items() if k != "seconds"} for r in run.progress.history] for run in (whole, rest)]
    assert history[0] == history[1]
    again = with_scores(training(tmp_path / "cut"), [])
    again.run()
    assert again.progress.step == 6 and same(whole.averaged(), again.averaged())


def test_the_end_of_the_images_is_validated_too():
    """With patience to spare the last average competes with the earlier ones, once."""
    config = CONFIG.model_copy(update={"images": 10, "validate_images": 4, "early_stop": EarlyStop(patience=9)})
    run = with_scores(training(config=config), [5.0, 4.0, 3.0])
    run.run()
    assert run.progress.best_images == run.progress.validated == 10 and not run.progress.stopped
    run.run()
    assert same(run.averaged(), dict(zip(run.names, run.average, strict=True)))


def test_without_it_the_last_average_is_kept():
    run = with_scores(training(config=CONFIG.model_copy(update={"early_stop": None, "images": 12})), [1.0] + [2.0] * 5)
    run.run()
    assert run.progress.images == 12 and run.best is None
    assert all("score" not in record for record in run.progress.history)
    assert same(run.averaged(), dict(zip(run.names, run.average, strict=True)))


def test_it_needs_held_out_images():
    with pytest.raises(InputError, match="early_stop needs held-out images"):
        training(held_out=False)
