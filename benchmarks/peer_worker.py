"""The peer's side of `peer.py`: hannamw/EAP-IG on TransformerLens, in its own environment; imports nothing of ours.

Reads one JSON request a line (method, input_ids, labels, passes, frozen, scores) and answers with CPU seconds and the
number of backward passes taken. Its code runs as it is, but for the device (it says "cuda" in the source) and the
tokeniser (token ids are handed in). `passes` stops it after so many: a node-wise run of a 30-layer model has 305.
"""

import contextlib
import functools
import gc
import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
_zeros = torch.zeros
torch.zeros = functools.wraps(_zeros)(
    lambda *size, device=None, **options: _zeros(*size, device="cpu" if device == "cuda" else device, **options)
)
folder, checkout = sys.argv[1:]
sys.path.insert(0, checkout)
import eap.attribute as peer  # noqa: E402
from eap.graph import Graph  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens import loading_from_pretrained as loading  # noqa: E402

STEPS = 5


class Enough(Exception):
    """As many backward passes as were asked for."""


def hooked() -> HookedTransformer:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    config = model.config
    settings = loading.convert_hf_model_config(folder)
    settings.update(
        d_head=config.head_dim,
        rotary_dim=config.head_dim,
        rotary_base=float(config.rope_theta),
        n_ctx=256,
        device="cpu",
        dtype=torch.float32,
        init_weights=False,
        default_prepend_bos=False,
    )
    for name in ("tokenizer_name", "trust_remote_code", "tokenizer_prepends_bos"):
        settings.pop(name, None)
    settings = HookedTransformerConfig.from_dict(settings)
    weights = loading.get_pretrained_state_dict.__globals__["convert_llama_weights"](model, settings)
    result = HookedTransformer(settings, tokenizer=None, move_to_device=False)
    # as from_pretrained_no_processing does
    plain = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    result.load_and_process_state_dict(
        {name: weight.detach().clone() for name, weight in weights.items()},
        refactor_factored_attn_matrices=False,
        **dict.fromkeys(plain, False),
    )
    result.set_use_attn_result(True)
    result.set_use_split_qkv_input(True)
    result.set_use_hook_mlp_in(True)
    result.set_ungroup_grouped_query_attention(True)
    return result.eval()


def probability(logits, clean_logits, lengths, labels):
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    answer = labels[:, 1:] != -100
    return ((logps * answer).sum(1) / answer.sum(1)).exp().sum()


def main() -> None:
    peer.tokenize_plus = lambda model, ids, max_length=None: (
        ids,
        torch.ones_like(ids),
        torch.tensor([ids.shape[1]]),
        ids.shape[1],
    )
    model = hooked()
    graph = Graph.from_model(model)
    methods = {
        "eap": lambda data: peer.get_scores_eap(model, graph, data, probability, intervention="zero", quiet=True),
        "eap-ig": lambda data: peer.get_scores_eap_ig(model, graph, data, probability, steps=STEPS, quiet=True),
        "ig-activations": lambda data: peer.get_scores_ig_activations(
            model, graph, data, probability, intervention="zero", steps=STEPS, quiet=True
        ),
    }
    backward = torch.Tensor.backward
    done, collecting = 0, 0.0
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # "frozen": what a careful user of the peer would do; it needs these two to have a gradient at all
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not request["frozen"] or name in ("embed.W_E", "blocks.0.ln1.w"))
        ids = torch.tensor([request["input_ids"]])
        labels = torch.tensor([request["labels"]])
        done, collecting = 0, 0.0

        def counted(tensor, *args, limit=request["passes"], **options):
            nonlocal done, collecting
            backward(tensor, *args, **options)
            done += 1
            begin = time.process_time()  # not the peer's time
            gc.collect()  # hooks and graphs refer to each other: without it the node-wise run grows by GiB
            collecting += time.process_time() - begin
            if limit and done == limit:
                raise Enough

        torch.Tensor.backward = counted
        start, scores = time.process_time(), None
        with contextlib.suppress(Enough):
            scores = methods[request["method"]]([(ids, ids, labels)])
        seconds = time.process_time() - start - collecting
        torch.Tensor.backward = backward
        model.zero_grad(set_to_none=True)
        if scores is not None and request["scores"]:
            numpy.save(request["scores"], scores.detach().numpy())
        print(json.dumps({"seconds": seconds, "passes": done}), flush=True)


if __name__ == "__main__":
    main()
