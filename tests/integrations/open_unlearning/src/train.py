import json
from pathlib import Path

import hydra
from data import DataCollatorForSupervisedDataset, ForgetRetainDataset, QADataset
from trainer import load_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer


@hydra.main(version_base=None, config_path="../configs", config_name="train.yaml")
def main(cfg):
    model = AutoModelForCausalLM.from_pretrained(cfg.model)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    parts = {
        part: QADataset({"path": "json", "data_files": cfg.data[part], "split": "train"}, {}, tokenizer)
        for part in ("forget", "retain")
    }
    collator, served = DataCollatorForSupervisedDataset(tokenizer, index="index"), []

    def watched(items):
        batch = collator(items)
        served.extend(batch["forget"]["index"].tolist())
        return batch

    trainer, args = load_trainer(
        cfg.trainer,
        model,
        ForgetRetainDataset(**parts),
        None,
        tokenizer,
        watched,
        evaluators={"one": None},
        template_args={},
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"handler": cfg.trainer.handler, "served": served, "losses": [entry["loss"] for entry in evaluated]}
    Path(args.output_dir, "served.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
