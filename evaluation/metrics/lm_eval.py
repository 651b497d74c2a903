"""General ability, measured by lm-evaluation-harness (extra `lm-eval`)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.models.generation import without_generation_config


def check_lm_eval() -> None:
    """Raise `ValueError` when lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("lm_eval_tasks need lm-evaluation-harness: pip install 'cud-trainer[lm-eval]'") from None


def lm_eval_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> list[tuple[str, float, float | None]]:
    """What lm-evaluation-harness measures: `task: metric`, its value, and its standard error, if it gives one.

    Raises:
        ValueError: for an unknown task.
    """
    check_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}")
    with without_generation_config(model):  # a task says how it samples; what it leaves open is greedy
        evaluated = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    assert evaluated is not None
    figures = []
    for task, values in evaluated["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            figures.append((f"{task}: {name}", value, error if isinstance(error, float) else None))
    return figures
