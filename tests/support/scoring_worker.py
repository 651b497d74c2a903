"""Run by test_passes, alone or with torchrun: scores a small forget set and writes the table.

Usage: scoring_worker.py OUTPUT_DIR WORK_DIR [kill-after-N-batches | fail-on-rank-1]
"""

import os
import signal
import sys
from pathlib import Path

from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer import resumable as passes
from cud_trainer import score_difficulty


def main() -> None:
    output, work, *fault = sys.argv[1:]
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    state = passes.process_state()
    assert state.num_processes == expected
    if fault and fault[0] != "fail":
        left, save = [int(fault[0])], passes.WorkDir.save

        def dying(self, name, tensors):
            save(self, name, tensors)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        passes.WorkDir.save = dying
    if fault == ["fail"]:
        from cud_trainer.circuits import attribution

        def failing(*arguments, **options):
            if state.process_index == 1:
                raise RuntimeError("the second process fails")
            return whole(*arguments, **options)

        whole = attribution.edge_attributions
        attribution.edge_attributions = failing
    scores = score_difficulty(
        make_model(0),
        qa_dataset(13),
        make_tokenizer(),
        metrics=["cud", "circuit_mass", "loss", "length"],
        retain_dataset=qa_dataset(9, 100),
        batch_size=2,
        work_dir=None if work == "none" else work,
        save_circuits=f"{output}/circuits.safetensors",
        progress=False,
    )
    print(f"rank {state.process_index} has {len(scores)} scores")
    if state.is_main_process:
        scores.save(Path(output) / "scores.parquet")
    state.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # see ddp_worker


if __name__ == "__main__":
    main()
