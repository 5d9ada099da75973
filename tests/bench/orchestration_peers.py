#!/usr/bin/env python3
"""Trials that do nothing, and metric reports, with Optuna and Ray Tune. Prints one JSON object.

A trial draws two parameters, reports one value and ends, durably: Optuna writes it to SQLite or to its journal,
Ray Tune to its result files. Then few trials make many reports. Run by tests/bench/orchestration.py, in an
environment that has both.

    orchestration_peers.py FOLDER [--trials 500] [--reports 2000] [--ray-trials 60]
"""

import argparse
import json
import logging
import os
import pathlib
import time


def optuna_figures(storage, trials, reports):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-6, 1e-1, log=True),
        "lora_rank": optuna.distributions.CategoricalDistribution([4, 8, 16, 32]),
    }
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=storage, sampler=sampler, study_name="trials")
    begun = time.monotonic()
    for _ in range(trials):
        trial = study.ask(distributions)
        trial.report(1.0, 1)
        study.tell(trial, 1.0)
    trial_seconds = time.monotonic() - begun
    study = optuna.create_study(storage=storage, sampler=sampler, study_name="reports")
    trial = study.ask(distributions)
    begun = time.monotonic()
    for step in range(1, reports + 1):
        trial.report(1.0 / step, step)
    report_seconds = time.monotonic() - begun
    study.tell(trial, 1.0)
    return {"trials_per_second": trials / trial_seconds, "reports_per_second": reports / report_seconds}


def ray_figures(folder, trials, reports):
    import ray
    from ray import tune

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)

    def train(config):
        for step in range(1, config["reports"] + 1):
            tune.report({"loss": 1.0 / step})

    def seconds(name, samples, each):
        space = {
            "learning_rate": tune.loguniform(1e-6, 1e-1),
            "lora_rank": tune.choice([4, 8, 16, 32]),
            "reports": each,
        }
        run = tune.RunConfig(name=name, storage_path=str(folder), verbose=0)
        tuner = tune.Tuner(train, param_space=space, tune_config=tune.TuneConfig(num_samples=samples, reuse_actors=True), run_config=run)
        begun = time.monotonic()
        results = tuner.fit()
        if results.num_errors or len(results) != samples:
            raise RuntimeError(f"{results.num_errors} of {samples} trials failed")
        return time.monotonic() - begun

    seconds("warmup", 2, 1)
    figures = {"trials_per_second": trials / seconds("trials", trials, 1)}
    figures["reports_per_second"] = reports / seconds("reports", 2, reports // 2)
    ray.shutdown()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--reports", type=int, default=2000)
    parser.add_argument("--ray-trials", type=int, default=60)
    args = parser.parse_args()
    folder = args.folder.resolve()

    import optuna
    import ray
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    figures = {
        "optuna": optuna.__version__,
        "ray": ray.__version__,
        "optuna_sqlite": optuna_figures(f"sqlite:///{folder}/optuna.db", args.trials, args.reports),
        "optuna_journal": optuna_figures(journal, args.trials, args.reports),
        "ray_tune": ray_figures(folder / "ray", args.ray_trials, args.reports),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
