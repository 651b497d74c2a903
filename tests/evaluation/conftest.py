"""Studies of these tests work in the same processes: each takes ten seconds to import torch and the trainers."""

import pytest

from evaluation.study import engine
from evaluation.study.pool import Pool

OF_THEIR_OWN = ("test_study_reliability", "test_study_jobs")  # where processes are what is looked at


class Kept(Pool):
    """Its processes stay for the next study, unless something went wrong."""

    def __exit__(self, kind, *error):
        if kind is not None:
            super().__exit__(kind, *error)


@pytest.fixture(scope="session")
def kept_pools():
    pools = {}
    yield pools
    for pool in pools.values():
        Pool.__exit__(pool, None)


@pytest.fixture(scope="module", autouse=True)
def kept_processes(request, kept_pools):
    if request.module.__name__.rpartition(".")[2] in OF_THEIR_OWN:
        yield
        return
    own = engine._executor

    def executor(args, folder):
        if args.executor == "slurm" or args.devices:
            return own(args, folder)
        return kept_pools.setdefault(args.workers or 1, Kept(args.workers or 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_executor", executor)
        yield
