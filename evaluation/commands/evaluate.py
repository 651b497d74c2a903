"""`cud evaluate`: what a model on disk still holds of the forget set, by difficulty, and what it kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from trl import ModelConfig

from cud_trainer.circuits import Faithfulness, dataset_faithfulness
from cud_trainer.commands.options import check_model_options, inputs_of
from cud_trainer.commands.parser import parse_options
from cud_trainer.data import Samples
from cud_trainer.data.groups import group_labels
from cud_trainer.data.ids import without_hashes
from cud_trainer.models.engines import TRANSFORMERS, engine_of
from cud_trainer.models.fingerprint import model_fingerprint, versions
from cud_trainer.models.whole import not_finite
from cud_trainer.ownership import REPORT_FILES, clear, output_directory
from cud_trainer.resumable import end_together, entered_by_main_process, process_state

from ..metrics import robustness
from ..metrics.depth import Depth, layer_drops
from ..metrics.lm_eval import lm_eval_figures
from ..metrics.measure import Measured, measure
from ..metrics.memorization import EXTRA_TOKENS, true_answers
from ..metrics.passes import FEW_PARTS, PARTS, Passes, SharedPasses
from ..metrics.secret import has_secret
from ..report.attacks import quantisation, relearning
from ..report.audit import audit_results, measured_tables, per_sample_table
from ..report.circuits import circuit_section, mechanism_table, signature_of, strongest_edges
from ..report.collateral import collateral_tables, kept_samples_table
from ..report.difficulty import reliability_by_decile
from ..report.layers import depth_tables, layers_section
from ..report.leak import leak_tables, secret_table
from ..report.schema import AttackRow, Results, Run, Table
from ..report.story import Evidence, verdict_of
from ..report.tables import group_table, line_table, lm_eval_table
from .endings import after_evaluating, answers, last_lines
from .help import EVALUATE as ABOUT
from .inputs import WORK_DIR, EvaluateArguments, EvaluateInputs, read_inputs
from .parts import begin_work
from .secrets import without_pattern

AS_IT_IS = "as it is"


@dataclass
class Robustness:
    """What comes back of the forget set; each part where it was asked for.

    Attributes:
        quantised: answer probability of each sample as it is and with rounded weights, `[N]` by condition and set
            (`forget`, and `holdout` where there is one).
        line: along the straight line from the original weights (see `robustness.straight_line`).
        taught: True for forget samples that were trained on again, `[N]`.
        relearned: answer probability by steps of relearning.
        lm_eval: general ability (see `lm_eval_figures`).
    """

    quantised: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    line: list[dict[str, Any]] | None = None
    taught: np.ndarray | None = None
    relearned: robustness.Relearned | None = None
    lm_eval: list[tuple[str, float, float | None]] | None = None


@dataclass
class Original:
    """The model before unlearning: what it says, and what is needed of it later: itself only for `depth`."""

    measured: Measured
    fingerprint: str
    faithfulness: Faithfulness | None
    weights: dict[str, Tensor] | None
    model: Any = None

    def drops(self, inputs: EvaluateInputs, source: Any, passes: Passes) -> np.ndarray:
        """`layer_drops` of the forget samples with the states of `source`, whose passes these are."""

        def measure(part: Samples, rows: list[int]) -> dict[str, np.ndarray]:
            return {"drops": layer_drops(self.model, source, part, batch_size=inputs.args.batch_size)}

        return passes.of("in-original", self.fingerprint).over("states", inputs.forget, measure)["drops"]


@dataclass
class Measurements:
    """Everything that was measured.

    Attributes:
        after, before, reference: of the unlearned model, the original one and one that never saw the forget set.
        fingerprint: of the unlearned model.
        fingerprints: of the other ones, by what they are.
        faithfulness: of the circuits, in the original model.
        diverged: weights of the unlearned model are not finite.
        depth: of the forget samples, if it was asked for.
    """

    after: Measured
    before: Measured | None
    reference: Measured | None
    fingerprint: str
    fingerprints: dict[str, str]
    faithfulness: Faithfulness | None
    robustness: Robustness
    diverged: bool = False
    depth: Depth | None = None


def evaluate(argv: list[str]) -> int:
    """Entry point of `cud evaluate`."""
    from ..report.page import write_report

    args, model_args = parse_options((EvaluateArguments, ModelConfig), argv, "cud evaluate", about=ABOUT)
    check_model_options(model_args, argv, trains=False)
    read = inputs_of(args, model_args)
    folder, main = Path(args.output_dir).expanduser(), process_state().is_main_process
    owned = output_directory(folder, REPORT_FILES, inputs=read, overwrite=args.overwrite, known=[WORK_DIR])
    with entered_by_main_process(owned):
        inputs = read_inputs(args, model_args)
        if args.overwrite and main:
            clear(folder, REPORT_FILES)
        work = begin_work(inputs)
        with work.kept_unless_refused():
            measurements = measure_models(inputs, SharedPasses(work, args.batch_size, parts_of(args)))
        if main:
            results = report_on(inputs, measurements, "cud evaluate " + " ".join(without_pattern(argv)))
            table, kept = sample_table(inputs, measurements), kept_table(inputs, measurements)
            written = write_report(results, folder, table, kept, keys=inputs.keys)
            work.remove()
    end_together()
    if not main:
        return 0
    for line in results.findings:
        print(f"- {without_hashes(line)}")
    sizes = ", ".join(f"{len(part)} {name}" for name, part in inputs.sets.items())
    done = f"measured {inputs.model_name_or_path} on {sizes} samples"
    assert results.verdict is not None
    print(without_hashes(last_lines(done, written, after_evaluating(results.verdict), answers(results.verdict))))
    return 0


def parts_of(args: EvaluateArguments) -> int:
    """How many parts of a set are written one after the other: an engine without batches takes all that it gets."""
    return PARTS if args.generation_engine == TRANSFORMERS else FEW_PARTS


def measure_models(inputs: EvaluateInputs, passes: Passes) -> Measurements:
    """Measure one model after the other; each is gone before the next one comes."""
    args = inputs.args
    if args.straight_line:
        check_line(inputs)
    original = measure_original(inputs, args.original_model, passes) if args.original_model else None
    fingerprints = {} if original is None else {"original": original.fingerprint}
    reference, unseen = None, None
    if args.reference_model:
        reference, fingerprints["reference"], unseen = measure_reference(inputs, args.reference_model, original, passes)
    model = inputs.load_model(inputs.model_name_or_path, finite=False)  # one that diverged is told as it is
    fingerprint = model_fingerprint(model)
    if fingerprint == fingerprints.get("reference"):
        raise ValueError(f"the reference model {args.reference_model} has the weights of the model that is evaluated")
    passes = passes.of("unlearned", fingerprint)
    after = measure_one(inputs, model, inputs.model_name_or_path, passes)
    depth = None
    if original is not None and original.model is not None:
        depth = Depth(original.drops(inputs, model, passes), unseen)
        original.model = None  # what follows needs its memory
    diverged = bool(not_finite(model))
    return Measurements(
        after=after,
        before=None if original is None else original.measured,
        reference=reference,
        fingerprint=fingerprint,
        fingerprints=fingerprints,
        faithfulness=None if original is None else original.faithfulness,
        robustness=measure_robustness(inputs, model, original, after, passes),
        diverged=diverged,
        depth=depth,
    )


def check_line(inputs: EvaluateInputs) -> None:
    """Raise `ValueError`, before anything is measured, when no straight line joins the two models."""
    assert inputs.args.original_model is not None
    ends = [inputs.load_model(path) for path in (inputs.args.original_model, inputs.model_name_or_path)]
    robustness.check_same_weights(ends[1], dict(ends[0].named_parameters()))


def measure_one(inputs: EvaluateInputs, model: Any, path: str, passes: Passes) -> Measured:
    """`measure` with these options, of the model that was loaded from `path`."""
    args = inputs.args
    longest = None if args.max_length is None else args.max_length + EXTRA_TOKENS
    with engine_of(args.generation_engine, model, path, longest=longest):
        return measure(
            model,
            inputs.sets,
            inputs.forget_raw,
            inputs.utility,
            inputs.tokenizer,
            batch_size=args.batch_size,
            max_length=args.max_length,
            template=inputs.template,
            generate=args.generate,
            leak=inputs.leak,
            secrets=inputs.secrets,
            lens=args.logit_lens,
            gradients=args.gradient_norm,
            passes=passes,
        )


def measure_original(inputs: EvaluateInputs, path: str, passes: Passes) -> Original:
    """The original model at `path`; `ValueError` where the scores are another one's."""
    args, circuits = inputs.args, inputs.circuits
    model = inputs.load_model(path)
    fingerprint = model_fingerprint(model)
    for scores in (inputs.scores, inputs.retain_scores):
        if scores is not None:
            scores.check_provenance(model=fingerprint)
    measured = measure_one(inputs, model, path, passes.of("original", fingerprint))
    faithfulness, weights = None, None
    if args.faithfulness and circuits is not None:
        faithfulness = dataset_faithfulness(
            model,
            inputs.forget,
            strongest_edges(circuits),
            batch_size=args.batch_size,
            seed=args.seed,
            baseline=circuits.settings["baseline"],
            metric=circuits.settings["metric"],
            ungroup_kv=circuits.settings.get("ungroup_kv", False),
        )
    if args.straight_line:
        weights = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}
    return Original(measured, fingerprint, faithfulness, weights, model if args.depth else None)


def measure_reference(
    inputs: EvaluateInputs, path: str, original: Original | None, passes: Passes
) -> tuple[Measured, str, np.ndarray | None]:
    """What the model at `path` says that never saw the forget set, its fingerprint, and D1 (see `Depth`) if wanted."""
    model = inputs.load_model(path)
    fingerprint = model_fingerprint(model)
    passes = passes.of("reference", fingerprint)
    measured = measure_one(inputs, model, path, passes)
    unseen = None
    if original is not None and original.model is not None:
        unseen = original.drops(inputs, model, passes)
    return measured, fingerprint, unseen


def measure_robustness(
    inputs: EvaluateInputs, model: Any, original: Original | None, after: Measured, passes: Passes
) -> Robustness:
    """What of the forget set comes back, as far as it is asked for; the model is put back after each part.

    The same is done to the holdout set, as far as there is one.

    Args:
        original: with weights for the straight line from there.
        after: what was measured of the model as it is.
    """
    args, forget, control = inputs.args, inputs.forget, inputs.sets.get("holdout")
    made = Robustness()
    attacked = {name: inputs.sets[name] for name in ("forget", "holdout") if name in inputs.sets}
    if args.quantize:
        made.quantised = {name: {AS_IT_IS: after.sets[name]["probability"]} for name in attacked}
    for bits in args.quantize:
        with robustness.quantised(model, bits):
            for name, part in attacked.items():
                found = passes.probability(f"quantised-{bits}-{name}", model, part, args.batch_size)
                made.quantised[name][f"{bits} bits"] = found
    if original is not None and original.weights is not None:
        sets = {name: part for name, part in inputs.sets.items() if name in ("forget", "retain")}
        made.line = robustness.straight_line(
            model,
            original.weights,
            sets,
            batch_size=args.batch_size,
            passes=passes.of("from-original", original.fingerprint),
        )
    if args.relearn_samples:
        made.taught = np.zeros(len(forget), dtype=bool)
        made.taught[np.random.default_rng(args.seed).permutation(len(forget))[: args.relearn_samples]] = True
        made.relearned = robustness.relearn(
            model,
            forget,
            np.flatnonzero(made.taught).tolist(),
            steps=args.relearn_steps,
            learning_rate=args.relearn_rate,
            batch_size=args.batch_size,
            seed=args.seed,
            control=control,
            passes=passes,
        )
    if args.lm_eval_tasks:
        tasks, include = args.lm_eval_tasks, args.lm_eval_include
        made.lm_eval = passes.once(
            f"lm-eval {tasks} {include}",
            lambda: lm_eval_figures(model, inputs.tokenizer, tasks, include, args.batch_size),
        )
    return made


def report_on(inputs: EvaluateInputs, measurements: Measurements, command: str) -> Results:
    """`Results` of what was measured."""
    args, after, scores, buckets = inputs.args, measurements.after, inputs.scores, inputs.buckets
    before, seed, left = measurements.before, args.seed, measurements.after.sets["forget"]["probability"]
    results = audit_results(
        after.sets,
        how_it_was_made(inputs, measurements, command),
        before=None if before is None else before.sets,
        scores=scores,
        buckets=buckets,
        seed=seed,
        name=Path(inputs.model_name_or_path).name,
    )
    wrong = what_is_wrong(measurements)
    if wrong is not None:
        results.findings.insert(0, wrong)
    tables, findings = measured_tables(after, before, measurements.reference, buckets, seed)
    models = {"unlearned": after, "reference": measurements.reference, "original": before}
    said = {name: one for name, one in models.items() if one is not None}
    readable = {name: one.readable for name, one in said.items()}
    more, lines = depth_tables(measurements.depth, readable, buckets, inputs.groups.forget, seed)
    tables, findings = tables + more, findings + lines
    results.layers = layers_section({name: one.lens for name, one in said.items()}, measurements.depth, seed)
    if before is not None:
        kept, lines = collateral_tables(
            after, before, inputs.retain_scores, inputs.retain_buckets, inputs.retain_groups, seed
        )
        tables, findings = tables + kept, findings + lines
    difficulty = None if scores is None or buckets is None else scores[buckets.metric]
    if inputs.leak is not None:
        made, lines = leak_tables(inputs.leak, after, before, measurements.reference, buckets, inputs.groups, seed)
        tables += made
        findings += lines
    if "forget" in after.secret:
        table, finding = secret_table(has_secrets(inputs, after), after, before, measurements.reference, buckets, seed)
        tables.append(table)
        findings.append(finding)
    if inputs.groups.forget is not None:
        table, finding = group_table(left, inputs.groups.forget, difficulty, seed)
        tables.append(table)
        findings.append(finding)
    if difficulty is not None:
        tables.append(reliability_by_decile(difficulty, left, seed))
    if inputs.circuits is not None and buckets is not None:
        note = f"Buckets are those of {buckets.metric}."
        results.circuits = circuit_section(
            inputs.circuits, buckets, left, seed=seed, note=note, faithfulness=measurements.faithfulness
        )
        table, finding = mechanism_table(signature_of(inputs.circuits), buckets, seed)
        tables.append(table)
        findings.append(finding)
    attacked, rows, lines = attack_tables(inputs, measurements.robustness)
    results.tables, results.attacks = [*tables, *attacked], rows or None
    results.findings += [*findings, *lines]
    known = Evidence(
        ids=inputs.forget.ids,
        after=after,
        before=before,
        reference=measurements.reference,
        buckets=buckets,
        groups=inputs.groups,
        secret=has_secrets(inputs, after) if "forget" in after.secret else None,
        attacks=rows,
        leak=inputs.leak,
        wrong=wrong,
    )
    results.verdict = verdict_of(known, seed)
    return results


def what_is_wrong(measurements: Measurements) -> str | None:
    """Why the model cannot have forgotten, whatever is measured."""
    if measurements.diverged:
        return "the model has weights that are not finite: unlearning diverged"
    if measurements.fingerprint == measurements.fingerprints.get("original"):
        return "the model has the very weights of the original model: nothing was unlearned"
    return None


def has_secrets(inputs: EvaluateInputs, measured: Measured) -> dict[str, np.ndarray]:
    """Of each set whose secrets were measured, True for samples with one, `[N]`."""
    return {name: has_secret(inputs.sets[name]) for name in measured.secret}


def how_it_was_made(inputs: EvaluateInputs, measurements: Measurements, command: str) -> Run:
    model = {"path": inputs.model_name_or_path, "fingerprint": measurements.fingerprint, **measurements.fingerprints}
    seen = inputs.forget.template
    told = {} if seen is None else {"chat_template": seen}
    return Run(
        command=command,
        seed=inputs.args.seed,
        versions=versions(),
        model=model,
        data={f"n_{name}": len(part) for name, part in inputs.sets.items()} | told,
        seconds={},
    )


def attack_tables(inputs: EvaluateInputs, robust: Robustness) -> tuple[list[Table], list[AttackRow], list[str]]:
    """A table of each part that was measured; what attacks bring back, and a line on each."""
    buckets, groups, seed = inputs.buckets, inputs.groups, inputs.args.seed
    tables, rows, lines = [], [], []
    if robust.quantised:
        forget, control = robust.quantised["forget"], robust.quantised.get("holdout")
        table, found, said = quantisation(forget, control, AS_IT_IS, buckets, groups, seed)
        tables, rows, lines = [table], found, said
    if robust.line is not None:
        tables.append(line_table(robust.line, seed))
    if robust.taught is not None and robust.relearned is not None:
        table, found, said = relearning(robust.relearned, robust.taught, buckets, groups, seed)
        tables, rows, lines = [*tables, table], [*rows, *found], [*lines, *said]
    if robust.lm_eval is not None:
        tables.append(lm_eval_table(robust.lm_eval))
    return tables, rows, lines


def attacked_columns(robust: Robustness) -> dict[str, np.ndarray]:
    """What attacks leave of each forget sample, by the name of its column in the table of samples."""
    named = {label: values for label, values in robust.quantised.get("forget", {}).items() if label != AS_IT_IS}
    columns = {f"quantised/{label}": values for label, values in named.items()}
    if robust.taught is not None and robust.relearned is not None:
        steps = {step: values for step, values in robust.relearned.forget.items() if step}
        columns |= {"relearn_taught": robust.taught, **{f"relearned/{step}": found for step, found in steps.items()}}
    return columns


def sample_table(inputs: EvaluateInputs, measurements: Measurements) -> pd.DataFrame:
    """One row per forget sample; with text only if it was asked for."""
    forget = inputs.forget
    frame = per_sample_table(
        forget.ids,
        measurements.after,
        measurements.before,
        measurements.reference,
        inputs.scores,
        inputs.buckets,
    )
    if measurements.depth is not None:
        frame = frame.assign(**measurements.depth.columns())
    frame = frame.assign(**attacked_columns(measurements.robustness))
    if inputs.groups.forget is not None:
        frame = frame.assign(group=group_labels(list(inputs.groups.forget)))
    if inputs.args.show_text:
        frame = frame.assign(true_answer=true_answers(forget, inputs.tokenizer))
    return frame


def kept_table(inputs: EvaluateInputs, measurements: Measurements) -> pd.DataFrame | None:
    """One row per sample that was to be kept."""
    return kept_samples_table(
        {name: part.ids for name, part in inputs.sets.items()},
        measurements.after,
        measurements.before,
        inputs.retain_scores,
        inputs.retain_buckets,
        inputs.retain_groups,
    )
