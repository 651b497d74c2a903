"""Datasets and collator with the interface of open-unlearning's."""

from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence


class QADataset(torch.utils.data.Dataset):
    def __init__(self, hf_args, template_args, tokenizer, question_key="question", answer_key="answer", max_length=512):
        data = load_dataset(**hf_args)
        self.data = data.add_column("index", np.arange(len(data)))
        self.tokenizer, self.question_key, self.answer_key = tokenizer, question_key, answer_key

    def __len__(self):
        return len(self.data)

    def tokens(self, question, answer, index=-1):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        # as in transformers 4, where these are lists
        prompt = self.tokenizer.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True)
        full = self.tokenizer.apply_chat_template(chat, tokenize=True)
        full = full + [self.tokenizer.eos_token_id] * (full[-1] != self.tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + full[len(prompt) :]
        item = {"input_ids": full, "labels": labels, "attention_mask": [1] * len(full)}
        return {**{name: torch.tensor(values) for name, values in item.items()}, "index": index}

    def __getitem__(self, row):
        found = self.data[row]
        return self.tokens(found[self.question_key], found[self.answer_key], found["index"])


class QAwithIdkDataset(QADataset):
    def __init__(self, idk_path, *args, **options):
        self.idk_responses = Path(idk_path).read_text().splitlines()
        super().__init__(*args, **options)

    def __getitem__(self, row):
        reply = self.idk_responses[int(torch.randint(len(self.idk_responses), (1,)))]
        return {"original": super().__getitem__(row), "alternate": self.tokens(self.data[row]["question"], reply)}


class ForgetRetainDataset(torch.utils.data.Dataset):
    def __init__(self, forget, retain, anchor="forget"):
        self.forget, self.retain, self.anchor = forget, retain, anchor

    def __len__(self):
        return len(self.forget if self.anchor == "forget" else self.retain)

    def __getitem__(self, row):
        return {"forget": self.forget[row], "retain": self.retain[int(torch.randint(len(self.retain), (1,)))]}


class DataCollatorForSupervisedDataset:
    def __init__(self, tokenizer, padding_side="right", index=None):
        self.pad, self.index = tokenizer.pad_token_id, index

    def __call__(self, items):
        if "input_ids" not in items[0]:
            return {key: self([item[key] for item in items]) for key in items[0]}
        tokens = pad_sequence([item["input_ids"] for item in items], True, self.pad)
        labels = pad_sequence([item["labels"] for item in items], True, -100)
        batch = {"input_ids": tokens, "attention_mask": tokens.ne(self.pad), "labels": labels}
        return {**batch, self.index: torch.tensor([item[self.index] for item in items])} if self.index else batch
