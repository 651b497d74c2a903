"""A chat template that comes with a tokenizer runs in a sandbox, and not for ever."""

import threading

import pytest
from builders import make_tokenizer
from datasets import Dataset

from cud_trainer.data import prepare_dataset, timeout

MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Person"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def prepare(template):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = template + tokenizer.chat_template
    return prepare_dataset(Dataset.from_list([{"messages": MESSAGES}]), tokenizer)


def test_an_endless_template_is_refused(monkeypatch):
    monkeypatch.setattr(timeout, "SECONDS", 0.05)
    with pytest.raises(
        ValueError, match="forget sample 0: the chat template refuses it: it is not done after 0.15 sec"
    ):
        prepare(ENDLESS)
    for thread in threading.enumerate():  # what was left behind ends
        if thread is not threading.current_thread() and thread.daemon and "within_time" in str(thread._target):
            thread.join()


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_does_not_get_out(template):
    with pytest.raises(ValueError, match="the chat template refuses it"):
        prepare(template)


def test_results_and_errors_come_through():
    assert timeout.within_time(lambda: 7, 60) == 7
    with pytest.raises(KeyError, match="x"):
        timeout.within_time(lambda: {}["x"], 60)
