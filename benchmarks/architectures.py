"""Which causal LM types of transformers a run works on: all that can be built tiny, drawing whatever they may.

    python benchmarks/architectures.py --output benchmarks/results/architectures.json

A type is built with 2 layers and every rate of dropout, left-out layers and noise at 0.4. Then, in float32 on the CPU:
`score`, largest difference between the answer log-probabilities of `score_answers` in a padded batch and those of the
model's own forward pass of each sample alone (nats a token); `ratio`, difference of NPO's first forget loss from
`(2 / beta) log 2`, which is a log-ratio of 0 to the model before unlearning; `reload`, difference between the trained
model and what it saved; `resume`, largest difference between the weights of a run and of one that went on from its
first checkpoint. A Markdown table goes beside the JSON.
"""

import argparse
import contextlib
import io
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from cud_trainer import CUDConfig, CUDTrainer
from cud_trainer.data import IGNORE_INDEX, Samples, prepare_samples
from cud_trainer.files import write_json
from cud_trainer.logprobs import score_answers
from evaluation.testbed import train_tokenizer

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 3e7  # parameters
FIGURES = ("score", "ratio", "reload", "resume")
# What configurations call their sizes; each takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "d_kv"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head", "num_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "qk_rope_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_layer_start_index": 0,
    "max_position_embeddings": 256, "n_positions": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
# Where these sizes do not fit together.
SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "jamba": {"num_hidden_layers": 8},
    "qwen3_next": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
WITHOUT_HEAD_SIZE = re.compile("deepseek|^axk|glm4_moe_lite|glm_moe_dsa|minicpm3|youtu|codegen|gptj")


def tiny(kind: str, vocabulary: int) -> torch.nn.Module:
    """A random model of that type; `ValueError` where it cannot be made small."""
    base = AutoConfig.for_model(kind)
    text = base.get_text_config()
    known = {**SIZES, "vocab_size": vocabulary, **SPECIAL.get(kind, {})}
    if WITHOUT_HEAD_SIZE.search(kind):
        del known["head_dim"]
    sizes = {name: value for name, value in known.items() if name in text.to_dict()}
    config = AutoConfig.for_model(kind, **(sizes if text is base else {"text_config": sizes}))
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            # A router's jitter_eps is no rate: it decides which experts are near each other, also in evaluation.
            if re.search("drop|input_jitter|jitter_noise$", name) and isinstance(value, float):
                setattr(part, name, 0.4)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:.1g} parameters, even so")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def one_by_one(model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    """Mean answer log-probability of each sample from the model's own forward pass of it alone, `[N]`."""
    values = []
    for sample in samples:
        tokens, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        logps = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        picked = logps[:-1].gather(-1, tokens[0, 1:, None]).squeeze(-1)
        values.append(picked[labels[1:] != IGNORE_INDEX].mean())
    return torch.stack(values)


@torch.no_grad()
def together(model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    return score_answers(model.eval(), samples.pad(range(len(samples)))).mean_logps


def run(model: torch.nn.Module, data: Dataset, tokenizer: PreTrainedTokenizerFast, folder: str) -> CUDTrainer:
    """A trainer of two steps with a checkpoint at the first."""
    args = CUDConfig(
        folder, difficulty="none", schedule="uniform", retain_loss="none", passes=1, per_device_train_batch_size=2,
        learning_rate=1e-3, bf16=False, use_cpu=True, report_to="none", logging_steps=1, save_strategy="steps",
        save_steps=1, disable_tqdm=True, gradient_checkpointing=bool(model.supports_gradient_checkpointing),
    )  # fmt: skip
    return CUDTrainer(model, args, forget_dataset=data, processing_class=tokenizer)


def check(kind: str, data: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Figures of a type; `error` and where it came instead of those that there are not."""
    found: dict[str, Any] = {}
    stage = "build"
    try:
        model = tiny(kind, len(tokenizer))
        samples = prepare_samples(data, tokenizer)
        stage = "its own forward pass"
        alone = one_by_one(model, samples)
        stage = "score"
        found["score"] = float((alone - together(model, samples)).abs().max())
        stage = "train"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = run(model, data, tokenizer, folder)
            trainer.train()
            found["ratio"] = abs(trainer.state.log_history[0]["forget_loss"] - 20 * math.log(2))
            stage = "reload"
            trainer.save_model(f"{folder}/final")
            again = AutoModelForCausalLM.from_pretrained(f"{folder}/final", dtype=torch.float32)
            found["reload"] = float((together(again, samples) - together(model, samples)).abs().max())
            stage = "resume"
            other = run(tiny(kind, len(tokenizer)), data, tokenizer, folder)
            other.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
            pairs = zip(other.model.parameters(), model.parameters(), strict=True)
            found["resume"] = max(float((a - b).abs().max()) for a, b in pairs)
    except Exception as error:  # whatever a type raises is its result
        found |= {"stage": stage, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of all types."""
    lines = [__doc__.split("\n\n")[0] if __doc__ else "", "", "| type | score | ratio | reload | resume | |"]
    lines.append("|---|---|---|---|---|---|")
    for kind, found in results.items():
        cells = [f"{found[name]:.1g}" if name in found else "" for name in FIGURES]
        error = f"{found['stage']}: {found['error']}".replace("|", "\\|") if "error" in found else ""
        lines.append(f"| `{kind}` | {' | '.join(cells)} | {error} |")
    built = [found for found in results.values() if found.get("stage") not in ("build", "its own forward pass")]
    whole = sum("error" not in found for found in built)
    lines += ["", f"{whole} of {len(built)} types that could be built do all of it."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=TYPES, metavar="TYPE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    data = Dataset.from_list(
        [{"question": f"Who is {i}?", "answer": f"Person {i * 7} of {'the ' * (i % 3)}town"} for i in range(4)]
    )
    tokenizer = train_tokenizer([text for row in data for text in row.values()], 300)
    results = {}
    for kind in options.types:
        results[kind] = check(kind, data, tokenizer)
        print(kind, results[kind], flush=True)
    if options.output:
        write_json(options.output, results)
        options.output.with_suffix(".md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
