"""As much of vLLM as the engine asks for, token by token with the model in a folder: under this name it is `vllm`.

Options are those that `vllm.LLM` and `vllm.SamplingParams` have of this name; another one is a TypeError.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

MADE: list[dict] = []  # options of every engine that was made
ASKED: list[list] = []  # parameters of every call


@dataclass
class SamplingParams:
    """With the defaults of vLLM, so that what is left out acts."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    detokenize: bool = True


class LLM:
    def __init__(
        self,
        model,
        *,
        dtype="auto",
        max_model_len=None,
        gpu_memory_utilization=0.9,
        skip_tokenizer_init=False,
        generation_config="auto",
    ):
        MADE.append(dict(locals()))
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.end = self.model.generation_config.eos_token_id
        self.longest = max_model_len or self.model.config.max_position_embeddings

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        ASKED.append(list(sampling_params))
        pairs = zip(prompts, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=self._write(*pair))]) for pair in pairs]

    @torch.no_grad()
    def _write(self, prompt, how):
        tokens, written = list(prompt["prompt_token_ids"]), []
        assert len(tokens) < self.longest <= self.model.config.max_position_embeddings
        generator = torch.Generator().manual_seed(0 if how.seed is None else how.seed)
        while len(written) < min(how.max_tokens, self.longest - len(prompt["prompt_token_ids"])):
            logits = self.model(torch.tensor([tokens])).logits[0, -1]
            if how.temperature:
                assert how.top_p == 1
                chosen = int(torch.multinomial((logits / how.temperature).softmax(-1), 1, generator=generator))
            else:
                chosen = int(logits.argmax())
            tokens.append(chosen)
            written.append(chosen)
            if chosen in (how.stop_token_ids or ()) or (chosen == self.end and not how.ignore_eos):
                break
        return tuple(written)
