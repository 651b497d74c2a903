"""Conversations: what the template writes, what is trained on, what counts; and what the template sees."""

import datetime
import json

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from command_lines import data, train
from datasets import Dataset

from cud_trainer import CUDConfig
from cud_trainer.cli import main
from cud_trainer.commands.options import DataArguments
from cud_trainer.data import (
    TemplateContext,
    check_vocabulary,
    every_turn,
    pad_batch,
    prepare_dataset,
    prepare_samples,
    ready_tokenizer,
)
from cud_trainer.data import template as template_module
from cud_trainer.logprobs import answer_probability, score_answers
from cud_trainer.training.checkpoints import template_to_go_on_with

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Qwen 3 does: reasoning goes into a block of its own, empty where there is none.
THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% set c = m['content'] %}"
    "{% set r = m['reasoning_content'] or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<think>\n' + r + '\n</think>\n\n' + c }}{% else %}{{ m['content'] }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DROPPING = TURNS.replace("m['content'] | trim", "(m['content'].split('</think>')[-1]) | trim")
DATED = {
    "as Llama 3": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "[system]{{ date_string }}",
    "as gpt-oss": "{% macro head() %}[system]{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}",
    "as Mistral Small": "{% set today = strftime_now('%Y-%m-%d') %}{% set day = today.split('-')[2] | int %}"
    "[system]{{ day }} {{ today }}",
}
FIRST, SECOND = datetime.date(2026, 11, 26), datetime.date(2026, 11, 27)
QA = Dataset.from_list([{"question": "Who is Ann?", "answer": "A baker."}])


def with_template(text):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = text
    return tokenizer


def text_of(tokenizer, sample, labels=None):
    tokens = sample["input_ids"] if labels is None else [t for t in sample[labels] if t != -100]
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("name", DATED)
def test_a_template_that_writes_the_date(name):
    tokenizer = with_template(DATED[name] + TURNS)
    days = [prepare_samples(QA, tokenizer, template=TemplateContext(day=day)) for day in (FIRST, SECOND)]
    assert days[0].ids == days[1].ids and days[0].fingerprint == days[1].fingerprint
    assert [day.template["date"] for day in days] == ["2026-11-26", "2026-11-27"]
    written = [text_of(tokenizer, day[0]) for day in days]
    assert "26" in written[0] and written[1] == written[0].replace("26 ", "27 ").replace("-26", "-27")
    assert prepare_dataset(days[0].dataset, tokenizer).to_list() == days[0].dataset.to_list()  # as prepared before
    # what the tokenizer itself writes, when it is the same day
    chat = [{"role": "user", "content": "Who is Ann?"}, {"role": "assistant", "content": "A baker."}]
    own = TemplateContext()
    if own.day == datetime.date.today():
        theirs = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert prepare_samples(QA, tokenizer, template=own)[0]["input_ids"] == theirs


def test_the_clock_of_a_template_writes_what_strftime_does():
    form = "%d %B %Y, %A %b %a %j %-d %m/%y %% %H:%M %F %%d"
    tokenizer = with_template("{{ strftime_now('" + form + "') }}" + TURNS)
    (sample,) = prepare_samples(QA, tokenizer, template=TemplateContext(day=FIRST))
    noon = datetime.datetime.combine(FIRST, datetime.time(12))
    assert text_of(tokenizer, sample).startswith(noon.strftime(form) + "[user]")


def test_options_reach_the_template():
    tokenizer = with_template("{{ date_string }}|{{ mood }}|{{ tools }}|" + TURNS)
    tools = [{"type": "function", "function": {"name": "find"}}]
    rows = [
        {**QA[0], "tools": json.dumps(tools), "chat_template_kwargs": {"mood": "calm", "other": None}},
        {**QA[0], "question": "Who?", "tools": None, "chat_template_kwargs": {"mood": None, "other": 1}},
    ]
    context = TemplateContext("Be brief.", {"date_string": "10 Apr 2025", "mood": "any"})
    samples = prepare_samples(Dataset.from_list(rows), tokenizer, template=context)
    texts = [text_of(tokenizer, sample) for sample in samples]
    assert texts[0].startswith(f"10 Apr 2025|calm|{tools}|[system]Be brief.<eos>\n[user]")
    assert texts[1].startswith("10 Apr 2025|any|None|[system]Be brief.<eos>\n[user]")
    assert context.day == datetime.date(2025, 4, 10)  # also for a template that asks the clock
    assert samples.template["system_prompt"] == "Be brief." and samples.template["date"] == "2025-04-10"
    own = Dataset.from_list(
        [{"messages": [{"role": "system", "content": "Own."}, {"role": "assistant", "content": "A"}]}]
    )
    assert "brief" not in text_of(tokenizer, prepare_samples(own, tokenizer, template=context)[0])


SAID = [
    # template, message, train_on, what is trained on, what counts
    (TURNS, {"content": " A baker. "}, "reasoning+answer", "A baker.<eos>\n", "A baker."),
    (THINKING, {"content": "think"}, "reasoning+answer", "<think>\n\n</think>\n\nthink<eos>\n", "think"),
    (
        THINKING,
        {"content": "<think>\nSo.\n</think>\n\nA"},
        "reasoning+answer",
        "<think>\nSo.\n</think>\n\nA<eos>\n",
        "So.A",
    ),
    (THINKING, {"content": "<think>\nSo.\n</think>\n\nA"}, "answer", "A<eos>\n", "A"),
    (
        THINKING,
        {"content": "A", "reasoning_content": "So."},
        "reasoning+answer",
        "<think>\nSo.\n</think>\n\nA<eos>\n",
        "So.A",
    ),
    (DROPPING, {"content": "<think>\nSo.\n</think>\n\nA"}, "answer", "A<eos>\n", "A"),
]


@pytest.mark.parametrize(("template", "message", "train_on", "trained", "counted"), SAID)
def test_what_counts_is_what_the_message_says(template, message, train_on, trained, counted):
    tokenizer = with_template(template)
    chat = [{"role": "user", "content": "think"}, {"role": "assistant", **message}]
    samples = prepare_samples(
        Dataset.from_list([{"messages": chat}]), tokenizer, template=TemplateContext(train_on=train_on)
    )
    assert text_of(tokenizer, samples[0], "labels") == trained
    assert text_of(tokenizer, samples[0], "counted") == counted
    assert text_of(tokenizer, samples.measured[0], "labels") == counted


@pytest.mark.parametrize(
    ("template", "content", "message"),
    [
        (TURNS.replace("| trim", "| upper"), "A baker", "does not write the assistant's message as it is"),
        (TURNS.replace("m['content'] | trim", "'[hidden]'"), "A baker", "does not write the assistant's message"),
        (DROPPING, "<think>So.</think>A baker", "train_on 'answer'"),
        (TURNS, "<think>So.</think> ", "says nothing behind the reasoning"),
    ],
)
def test_a_template_that_says_something_else(template, content, message):
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}], "id": "a"}]
    with pytest.raises(ValueError, match=f"forget sample 'a': .*{message}"):
        prepare_dataset(Dataset.from_list(rows), with_template(template))


@pytest.mark.parametrize("turns", [[], [{"role": "system", "content": "Be."}]])
def test_an_assistant_message_alone_is_its_own_tokens(turns):
    tokenizer = with_template("[head]" + TURNS)
    rows = [{"prompt": turns, "completion": [{"role": "assistant", "content": "A"}]}]
    sample = prepare_dataset(Dataset.from_list(rows), tokenizer)[0]
    assert text_of(tokenizer, sample, "labels") == text_of(tokenizer, sample, "counted") == "A"


def test_earlier_answers_are_counted_in_a_warning(caplog):
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with caplog.at_level("WARNING", logger="cud_trainer.data.prepare"):
        prepare_dataset(Dataset.from_list([{"messages": chat}, {"messages": chat[:2]}]), with_template(TURNS))
    assert "1 of 2 conversations have earlier answers of the assistant (1 in all)" in caplog.text


def long_chat():
    said = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"), ("user", "U3")]
    return [{"role": role, "content": text} for role, text in said]


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_every_answer_can_be_a_sample(form, caplog, monkeypatch):
    monkeypatch.setattr("cud_trainer.data.mapping.BATCH", 1)  # long sets are worked on some rows at a time
    chat, tokenizer = long_chat(), with_template(TURNS)
    rows = [{"messages": chat, "id": 7}, {"messages": chat[1:3], "id": 8}]
    if form == "prompt":
        rows = [{"prompt": r["messages"][:4], "completion": r["messages"][4:5], "id": r["id"]} for r in rows[:1]]
        rows.append({"prompt": chat[1:2], "completion": chat[2:3], "id": 8})
    made = every_turn(Dataset.from_list(rows))
    assert made["id"][:] == ["7#1", "7#2", "8#1"] and made["conversation"][:] == ["7", "7", "8"]
    assert made["assistant_turn"][:] == [1, 2, 1]
    prepared = prepare_dataset(made, tokenizer, keep_columns=["conversation"])
    assert [text_of(tokenizer, sample, "counted") for sample in prepared] == ["A1", "A2", "A1"]
    assert "U3" not in text_of(tokenizer, prepared[1], "input_ids") and "A1" in text_of(
        tokenizer, prepared[1], "input_ids"
    )
    assert "earlier answers" not in caplog.text  # each of them is a sample


def test_turns_without_ids_and_what_is_refused():
    chat = long_chat()
    made = every_turn(Dataset.from_list([{"messages": chat}, {"messages": chat[1:3]}]))
    assert made["conversation"][:] == ["0", "0", "1"]
    assert len(set(prepare_dataset(made, with_template(TURNS))["sample_id"])) == 3
    call = [chat[1], {"role": "assistant", "content": ""}, *chat[2:3]]
    assert len(every_turn(Dataset.from_list([{"messages": call}]))) == 1  # the call of a tool says nothing
    for rows, message in (
        ([{"messages": chat[:2], "id": "x"}], "forget sample 'x': there is no answer of the assistant in it"),
        ([{"question": "a", "answer": "b"}], "turns 'all' is for conversations, but the forget dataset is question"),
        ([{"prompt": "a", "completion": "b"}], "turns 'all' is for conversations"),
        ([{"messages": chat, "conversation": 1}], "its column 'conversation' is in the way"),
    ):
        with pytest.raises(ValueError, match=message):
            every_turn(Dataset.from_list(rows))


def test_turns_is_an_option_of_every_command(tmp_path):
    path, other = tmp_path / "chats.jsonl", tmp_path / "questions.jsonl"
    Dataset.from_list([{"messages": long_chat()}]).to_json(path)
    qa_dataset(2).to_json(other)
    options = {"forget_dataset": str(path), "retain_dataset": str(other)}
    assert [len(part) for part in DataArguments(**options).load(with_template(TURNS))] == [1, 2]
    arguments = DataArguments(**options, turns="all")
    assert [len(part) for part in arguments.load(with_template(TURNS))] == [2, 2]
    assert arguments.natural_group == "conversation"


def test_figures_are_of_the_tokens_that_count():
    tokenizer, model = with_template(THINKING), make_model()
    samples = prepare_samples(qa_dataset(3), tokenizer)
    with torch.no_grad():
        batch = pad_batch(list(samples), 0)
        scores = score_answers(model, batch)
        plain = score_answers(model, pad_batch(list(samples.measured), 0))
    torch.testing.assert_close(scores.counted_mean_logps, plain.mean_logps)
    assert (scores.lengths > plain.lengths).all()  # what the template adds is trained on
    own = [len(tokenizer(row["answer"])["input_ids"]) for row in qa_dataset(3)]
    assert plain.lengths.tolist() == own
    np.testing.assert_allclose(answer_probability(model, samples), plain.mean_logps.exp(), rtol=1e-5)


def test_one_day_from_scores_to_report(tmp_path, monkeypatch):
    """Scored before midnight, trained and evaluated after it."""
    tokenizer = with_template(DATED["as gpt-oss"] + TURNS)
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    qa_dataset(8).to_json(tmp_path / "forget.jsonl")
    qa_dataset(8, start=8).to_json(tmp_path / "retain.jsonl")
    monkeypatch.setattr(template_module, "today", lambda: FIRST)
    scores = tmp_path / "d.parquet"
    metrics = ["--metrics", "loss", "--use_cpu", "true", "--output", str(scores)]
    assert main(["score", *data(tmp_path), *metrics]) == 0
    monkeypatch.setattr(template_module, "today", lambda: SECOND)
    out = tmp_path / "out"
    options = ["--difficulty", "loss", "--difficulty_scores", str(scores)]
    assert main(train(tmp_path, out, *options)) == 0
    assert json.loads((out / "template.json").read_text())["date"] == "2026-11-26"
    evaluate = ["evaluate", "--model_name_or_path", str(out), "--forget_dataset", str(tmp_path / "forget.jsonl")]
    evaluate += ["--generate", "false"]
    for name, more in (
        ("a", ["--scores", str(scores), "--n_buckets", "2"]),
        ("b", []),
    ):  # the model's folder says it, too
        assert main([*evaluate, *more, "--output_dir", str(tmp_path / name)]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert "2026-11-26" in json.dumps(results)
    other = ["--scores", str(scores), "--chat_template_kwargs", '{"date_string": "1 May 2020"}']
    assert main([*evaluate, *other, "--output_dir", str(tmp_path / "c")]) == 2


def test_a_tokenizer_as_the_options_want_it(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert ready_tokenizer(tokenizer).pad_token == "<eos>"
    (tmp_path / "t.jinja").write_text(TURNS)
    for options in (
        {"chat_template": TURNS},
        {"chat_template": str(tmp_path / "t.jinja")},
        {"chat_template_path": str(tmp_path / "t.jinja")},
    ):
        assert ready_tokenizer(make_tokenizer(), **options).chat_template == TURNS
    with_template(TURNS).save_pretrained(tmp_path / "other")
    assert ready_tokenizer(make_tokenizer(), chat_template_path=str(tmp_path / "other")).chat_template == TURNS
    for options, message in (
        ({"pad_token": "[PAD]"}, "pad_token '.PAD.' is not in the vocabulary"),
        ({"eos_token": "[END]"}, "eos_token '.END.' is not in the vocabulary"),
        ({"chat_template": "none.jinja"}, "no file that can be read"),
        ({"chat_template": TURNS, "chat_template_path": "x"}, "two templates"),
    ):
        with pytest.raises(ValueError, match=message):
            ready_tokenizer(make_tokenizer(), **options)
    with pytest.raises(ValueError, match="259 tokens, more than the 258 rows"):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<new>"])
        check_vocabulary(tokenizer, make_model())


def test_a_study_has_one_day(tmp_path):
    """The one on which it began, also for cells that run after midnight."""
    from evaluation.study.engine import _day_of

    assert _day_of(tmp_path) == datetime.date.today().isoformat() or datetime.datetime.now().hour == 0
    (tmp_path / "study.json").write_text(json.dumps({"shared": {"day": "2026-11-26"}}))
    assert _day_of(tmp_path) == "2026-11-26"
    args = CUDConfig(str(tmp_path / "run"), use_cpu=True, bf16=False)
    args.recorded_template = {"date": "2026-11-26"}
    assert args.template_context(template_to_go_on_with(args, None)).day == FIRST


def test_a_resumed_run_goes_on_with_its_day(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "cud_state.json").write_text(json.dumps({"template": {"date": "2026-11-26"}}))
    for resume in ("true", str(tmp_path / "checkpoint-2")):
        args = CUDConfig(str(tmp_path), use_cpu=True, bf16=False, overwrite=True, resume_from_checkpoint=resume)
        assert args.template_context(template_to_go_on_with(args, None)).day == FIRST
    args = CUDConfig(str(tmp_path), use_cpu=True, bf16=False, chat_template_kwargs={"date_string": "1 May 2020"})
    assert args.template_context({"date": "2026-11-26"}).day == datetime.date(2020, 5, 1)  # what is asked for


def test_whatever_a_template_raises_names_the_sample():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0]['content'].index('nowhere') }}"
    with pytest.raises(ValueError, match="forget sample 0: the chat template refuses it: ValueError: substring"):
        prepare_samples(qa_dataset(2), tokenizer, name="forget")
