"""What a run is given is prepared, checked and hashed once, and handed on."""

import pickle
import sys
from collections import Counter
from functools import wraps

from builders import qa_dataset
from runs import config, make_trainer

from cud_trainer import DifficultyScores
from cud_trainer.data import check_tokenizer, dataset_fingerprint, prepare
from cud_trainer.models.fingerprint import model_fingerprint
from cud_trainer.schedule import parse


def count_calls(monkeypatch, *functions) -> Counter:
    """Count the calls of functions, whichever modules of the package have imported them."""
    calls = Counter()

    def counting(function):
        @wraps(function)
        def counted(*args, **options):
            calls[function.__name__] += 1
            return function(*args, **options)

        return counted

    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "cud_trainer"]
    for function in functions:
        places = [(module, name) for module in modules for name, value in vars(module).items() if value is function]
        assert places
        wrapper = counting(function)
        for module, name in places:
            monkeypatch.setattr(module, name, wrapper)
    return calls


def test_building_a_trainer_does_nothing_twice(monkeypatch, tmp_path):
    """Before, with the same options: 4 preparations, 6 hashes of data, 3 of the model, 6 checks, 4 times parsed."""
    calls = count_calls(monkeypatch, prepare._prepare, dataset_fingerprint, model_fingerprint, check_tokenizer, parse)
    trainer = make_trainer(tmp_path / "out", objective="npo", retain_loss="kl", difficulty="cud", folds=3)
    assert trainer.difficulty_scores.metrics == ["cud", "loss", "length"]
    assert calls == {
        "_prepare": 2,  # forget and retain set
        "dataset_fingerprint": 2,
        "model_fingerprint": 2,  # by itself for the scores, as it is trained for the reference
        "check_tokenizer": 1,
        "parse": 1,
    }


def test_options_are_parsed_again_when_they_change(tmp_path):
    args = config(tmp_path, schedule="uniform")
    parts = args.schedule_parts
    assert args.schedule_parts is parts and [part.name for part, _ in parts] == ["uniform"]
    args.schedule, args.schedule_args = "competence", {"start": 0.5}
    assert [(part.name, options) for part, options in args.schedule_parts] == [("competence", {"start": 0.5})]
    args.schedule_args["start"] = 0.25
    assert args.schedule_parts[0][1] == {"start": 0.25}
    assert vars(pickle.loads(pickle.dumps(args))).keys() == vars(args).keys() - {"_parsed"}


def test_scores_for_another_objective_are_named(tmp_path, caplog):
    forget = qa_dataset(9).add_column("id", [f"s{i}" for i in range(9)])
    for recorded, warned in (("npo", False), ("ga", True)):
        provenance = {"calibration": {"objective": recorded}}
        scores = DifficultyScores(list(forget["id"]), {"cud": [i / 9 for i in range(9)]}, provenance=provenance)
        caplog.clear()
        make_trainer(tmp_path / "out", forget=forget, difficulty="cud", difficulty_scores=scores)
        said = "the difficulty scores were calibrated with objective 'ga', and this run has 'npo'"
        assert (said in caplog.text) is warned
