"""Edge attribution beside hannamw/EAP-IG on TransformerLens, alternated in one run, and how far scores differ.

    python benchmarks/peer.py --output benchmarks/results/peer.json
    python benchmarks/peer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --tokens 48 --peer_passes 40 --output b.json

The peer works at batch 1 (its scores are sums over a batch) and lives in an environment of its own (`--environment`,
made on the first run: the last TransformerLens with HookedTransformer, and a checkout of EAP-IG in it as EAP-IG).
Ours runs at `--batch`. Figures are CPU seconds of one thread per sample. The node-wise peer needs (2 L + 1) m passes;
`--peer_passes` stops after fewer and multiplies by what is left. "frozen": parameters need no gradient, which the
peer does not do by itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from attribution import load, machine, timed

from cud_trainer.circuits import edge_attributions
from cud_trainer.models.fingerprint import versions

PEER = ["transformer-lens==2.15.4", "transformers==4.52.4", "numpy", "matplotlib", "sentencepiece"]
EAP_IG = ("https://github.com/hannamw/EAP-IG", "795f5607b25638935aec89aee3c1cb4bd9ed72f1")
STEPS = 5


def environment(folder: Path) -> tuple[Path, Path]:
    """The peer's interpreter and source folder; made where there is none."""
    python, checkout = folder / "bin" / "python", folder / "EAP-IG"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", *PEER], check=True
        )
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", EAP_IG[0], checkout], check=True)
        subprocess.run(["git", "-C", checkout, "checkout", "-q", EAP_IG[1]], check=True)
    return python, checkout / "src"


class Peer:
    def __init__(self, python: Path, source: Path, folder: str):
        worker = Path(__file__).with_name("peer_worker.py")
        self.process = subprocess.Popen(
            [python, worker, folder, source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
        assert json.loads(self.process.stdout.readline()) == "ready"

    def __call__(self, batch: dict, row: int, method: str, *, passes=None, frozen=False, scores=None) -> dict:
        request = {"method": method, "passes": passes, "frozen": frozen, "scores": scores}
        request |= {name: batch[name][row].tolist() for name in ("input_ids", "labels")}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def save_for_peer(model: torch.nn.Module, folder: str) -> None:
    model.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    # transformers 4 reads the rotary base here and silently takes 10000 otherwise
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config))


def difference(peer: Peer, model: torch.nn.Module, batch: dict, method: str, path: str, **options) -> float:
    """Largest error over the largest score, first sample, all edges; takes the scores that `peer` saved at `path`."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    ours = edge_attributions(model, one, method=method, steps=STEPS, ungroup_kv=True, **options)
    theirs = torch.from_numpy(numpy.load(path))
    config = model.config
    columns = []
    for layer in range(config.num_hidden_layers):
        columns += [f"a{layer}.h{h}.{part}" for part in "qkv" for h in range(config.num_attention_heads)] + [
            f"m{layer}"
        ]
    order = [ours.graph.destinations.index(name) for name in [*columns, "logits"]]
    return float((ours.scores[0][:, order] - theirs).abs().max() / theirs.abs().max())


def median(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained Llama; by default a random one of the size below")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer_passes", type=int, help="backward passes of the node-wise peer to run; by default all")
    parser.add_argument("--environment", type=Path, default=Path(".peer"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = load(args)
    passes = (2 * model.config.num_hidden_layers + 1) * STEPS
    with tempfile.TemporaryDirectory() as folder:
        save_for_peer(model, folder)
        path = f"{folder}/scores.npy"
        peer = Peer(*environment(args.environment), folder)
        peer(batch, 0, "eap", scores=path)
        result = {"difference": {"eap": difference(peer, model, batch, "eap", path)}}
        edge_attributions(model, batch)  # warm up
        eap, ours, theirs = [], [], []
        for row in range(args.repeats):
            eap.append(timed(edge_attributions, model, batch, method="eap") / args.batch)
            ours.append(timed(edge_attributions, model, batch, method="eap-ig", steps=STEPS) / args.batch)
            theirs.append(peer(batch, row % args.batch, "eap-ig")["seconds"])
            print(json.dumps({"eap": eap[-1], "eap-ig": ours[-1], "peer eap-ig": theirs[-1]}), flush=True)
        result |= {"eap": median(eap), "eap-ig": median(ours), "peer_eap-ig": median(theirs)}
        result["eap-ig_times_faster"] = median([a / b for a, b in zip(theirs, ours, strict=True)])

        nodewise = timed(edge_attributions, model, batch, method="ig-activations", steps=STEPS) / args.batch
        result["ig-activations"] = nodewise
        for name, frozen in (("as_shipped", False), ("frozen", True)):
            run = peer(batch, 0, "ig-activations", passes=args.peer_passes, frozen=frozen, scores=path)
            seconds = run["seconds"] * passes / run["passes"]
            result[f"peer_ig-activations_{name}"] = {
                "seconds": seconds,
                "passes_run": run["passes"],
                "passes": passes,
                "times_ig-activations": seconds / nodewise,
                "times_eap": seconds / statistics.median(eap),
                "times_eap-ig": seconds / statistics.median(ours),
            }
            print(json.dumps({name: result[f"peer_ig-activations_{name}"]}), flush=True)
        if run["passes"] == passes:
            result["difference"]["ig-activations"] = difference(
                peer, model, batch, "ig-activations", path, reference_quirk=True
            )
        peer.process.stdin.close()
        peer.process.wait()
    print(json.dumps(result, indent=2))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "environment")}
        settings["model"] = None if args.model is None else Path(args.model).name
        record = {
            "settings": settings,
            "seconds": "CPU seconds of one thread per sample",
            "peer": {"packages": PEER, "EAP-IG": EAP_IG[1]},
            "machine": machine(),
            "versions": versions(),
            **result,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
