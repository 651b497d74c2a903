"""Fixtures; what they are made of is in `support/builders.py`."""

import pytest
from builders import make_model, make_tokenizer
from hypothesis import HealthCheck, settings

# No test fails because the machine is slow.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    """Files with processes and trained models first: at the end, no worker waits for one that has such a file left."""
    kinds = [("subprocess", 2), ("slow", 1)]
    dear = {}
    for item in items:
        cost = sum(worth for name, worth in kinds if item.get_closest_marker(name))
        dear[item.path] = dear.get(item.path, 0) + cost
    items.sort(key=lambda item: -dear[item.path])


@pytest.fixture(autouse=True)
def registered_put_back():
    """What a test registers, and the files that it imports, are unknown to the next: a study asks for both."""
    from cud_trainer import registry
    from cud_trainer.commands.imports import registries

    kept = [registry._added, *registries().values()]
    before = [dict(entries) for entries in kept]
    yield
    for entries, known in zip(kept, before, strict=True):
        entries.clear()
        entries.update(known)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer():
    return make_tokenizer(chat=True)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def cells_in_process(monkeypatch):
    """Cells of a study run in this process: their own would spend most of the time on imports."""
    from evaluation.study import pool

    monkeypatch.setattr(pool.Worker, "run", lambda worker, study, cell, work: pool.complete(study, cell, work))
