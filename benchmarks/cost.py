"""What scoring, calibration, training and evaluation cost on paper; prints the tables of docs/scale.md.

    python -m benchmarks.cost

The formulas are those of docs/scale.md, which explains their symbols. Nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from cud_trainer.circuits.graph import Graph

GB = 1e9
PEAK, FLOAT32_PEAK = 989e12, 67e12  # operations a second of an H100, dense: bfloat16, float32
SHARE = 0.4  # of the peak that is reached
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        weights: P.
        layers: L.
        heads: of the queries.
        key_heads: of the keys, and of the values.
        hidden: d.
        vocabulary: V.
    """

    weights: float
    layers: int
    heads: int
    key_heads: int
    hidden: int
    vocabulary: int = 128_256

    @property
    def keys(self) -> float:
        """Width of the keys of a layer, and of its values, m."""
        return self.hidden / self.heads * self.key_heads

    @property
    def graph(self) -> Graph:
        return Graph(self.layers, self.heads, self.key_heads)


# Llama 3.2 1B, Llama 3.1 8B and 70B, by their published configurations.
SHAPES = {
    "1B": Shape(1.24e9, 16, 32, 8, 2048),
    "8B": Shape(8.03e9, 32, 32, 8, 4096),
    "70B": Shape(70.6e9, 80, 64, 8, 8192),
}


def passes(shape: Shape, tokens: float, forward: float = 0, frozen: float = 0, trained: float = 0) -> float:
    """Operations of forward passes (2 P T each), and of backward passes to activations (2 P T) or weights (4 P T)."""
    return (2 * forward + 2 * frozen + 4 * trained) * shape.weights * tokens


def edges(shape: Shape) -> int:
    """Edges of the graph whose scores difficulty is made of, E."""
    return int(shape.graph.mask.sum())


def scoring(shape: Shape, tokens: float, metric: str) -> tuple[float, float]:
    """Operations in bfloat16 and in float32 of a difficulty metric: `loss`, `cud_top_k`, or `cud_paper`.

    Edge attribution takes 2 d T E in float32 beside its passes. `cud_paper` has 5 (1 + 2 L) points, each a forward and
    a backward pass from one component on, which is half the layers in the mean.
    """
    if metric == "loss":
        return passes(shape, tokens, forward=1), 0.0
    points = 1 if metric == "cud_top_k" else 5 * (1 + 2 * shape.layers) / 2
    return passes(shape, tokens, forward=points, frozen=points), 2.0 * shape.hidden * tokens * edges(shape)


def training(shape: Shape, tokens: float, adapter: bool) -> float:
    """Operations of a run over T tokens, forget and retain together; a forward pass is repeated for the backward."""
    return passes(shape, tokens, forward=2, **({"frozen": 1} if adapter else {"trained": 1}))


def reference(shape: Shape, forget: float, retain: float, objective: str) -> float:
    """Operations of what the model said before: npo reads the forget set, a retain loss kl the retain set besides."""
    read = {"graddiff": 0.0, "npo": forget, "npo+kl": forget + retain}[objective]
    return passes(shape, read, forward=1)


def adapter_weights(shape: Shape, rank: int = RANK) -> float:
    """Weights of LoRA on queries, keys, values and output: L r (4 d + 2 (d + m))."""
    return shape.layers * rank * (4 * shape.hidden + 2 * (shape.hidden + shape.keys))


def states(shape: Shape, kind: str) -> float:
    """Bytes that stay while a model is trained.

    `full`: 16 P, float32 weights, gradients, two moments. `lora`: 2 P, and 16 for each weight of the adapter. `qlora`:
    P / 2 + P / 16 for 4 bits and their scales, and the same.
    """
    added = 0.0 if kind == "full" else 16 * adapter_weights(shape)
    return {"full": 16.0, "lora": 2.0, "qlora": 0.5 + 1 / 16}[kind] * shape.weights + added


def activations(shape: Shape, tokens: float, answer: float) -> float:
    """Bytes of a micro-batch: 2 L d a token (each layer's input), 64 d (the layer in work), 12 V an answer token."""
    return (2 * shape.layers + 64) * shape.hidden * tokens + 12 * shape.vocabulary * answer


def kept_top(answer: float, top: int = 128) -> float:
    """Bytes of the retain loss kl: 8 for each of k tokens, and 4, at every answer token of the retain set."""
    return answer * (8 * top + 4)


def on_one_gpu(shape: Shape, kind: str, gpus: int, tokens: float, answer: float) -> float:
    """Bytes a GPU: states split among all (ZeRO-3, FSDP), the largest layer whole, and a micro-batch."""
    layer = 0.0 if gpus == 1 else 2 * shape.weights / shape.layers
    return states(shape, kind) / gpus + layer + activations(shape, tokens, answer)


def hours(wide: float, exact: float = 0.0, gpus: int = 1) -> float:
    """Hours on `gpus` H100 of operations in bfloat16 and in float32."""
    return (wide / PEAK + exact / FLOAT32_PEAK) / SHARE / gpus / 3600


# Sets like TOFU's: 400 forget and 3600 retain samples of 64 tokens, 32 of them answer; 5 passes with retain partners.
FORGET, RETAIN, PASSES = 400 * 64, 3600 * 64, 5
MICRO = (16 * 64, 16 * 32)  # tokens and answer tokens of a micro-batch of 8 pairs


def tables() -> str:
    """The tables of docs/scale.md, in Markdown."""
    text = ["| GPU-hours | " + " | ".join(SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    run = 2 * PASSES * FORGET
    work = {
        "score: `loss`": lambda s: scoring(s, FORGET, "loss"),
        "score: `cud_top_k`": lambda s: scoring(s, FORGET, "cud_top_k"),
        "score: `cud_paper`": lambda s: scoring(s, FORGET, "cud_paper"),
        "calibrate (3/4 of a run, all weights)": lambda s: (0.75 * training(s, run, False), 0.0),
        "reference: npo": lambda s: (reference(s, FORGET, RETAIN, "npo"), 0.0),
        "reference: npo, retain loss kl": lambda s: (reference(s, FORGET, RETAIN, "npo+kl"), 0.0),
        "train all weights": lambda s: (training(s, run, False), 0.0),
        "train LoRA": lambda s: (training(s, run, True), 0.0),
        "evaluate, teacher-forced, both sets": lambda s: (passes(s, FORGET + RETAIN, forward=1), 0.0),
    }
    for name, cost in work.items():
        text.append(f"| {name} | " + " | ".join(f"{hours(*cost(shape)):.2g}" for shape in SHAPES.values()) + " |")
    text += ["", "| GB a GPU | GPUs | " + " | ".join(SHAPES) + " |", "|---|---|" + "---|" * len(SHAPES)]
    for kind, name in (("full", "all weights"), ("lora", "LoRA"), ("qlora", "LoRA on 4 bits")):
        for gpus in (1, 8, 64):
            figures = [on_one_gpu(shape, kind, gpus, *MICRO) / GB for shape in SHAPES.values()]
            text.append(f"| {name} | {gpus} | " + " | ".join(f"{one:.3g}" for one in figures) + " |")
    text += ["", "| GB | " + " | ".join(SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    sizes = {
        "weights in bfloat16": lambda s: 2 * s.weights,
        "edge scores, 400 samples": lambda s: 400 * 4 * edges(s),
        "retain loss kl, 3600 samples": lambda s: kept_top(RETAIN / 2),
        "retain loss kl, 200,000 samples": lambda s: kept_top(200_000 * 32),
    }
    for name, size in sizes.items():
        text.append(f"| {name} | " + " | ".join(f"{size(shape) / GB:.2g}" for shape in SHAPES.values()) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    print(tables())
