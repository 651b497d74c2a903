"""The trade-off path of a run: hand-worked cases."""

import numpy as np
import pytest
from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from evaluation.trajectory import TradeoffCallback, at_position, averaged_residual, matched_position


class TestPath:
    def test_matched_position_on_a_crossing(self):
        retain = np.array([1.0, 0.9, 0.7])
        forget = np.array([1.0, 0.6, 0.2])
        position = matched_position(retain, forget, 0.8)
        assert position == pytest.approx(1.5)
        assert at_position(forget, position) == pytest.approx(0.4)
        assert matched_position(retain, forget, 1.1) is None
        assert matched_position(retain, forget, 0.5) == 2.0

    def test_a_run_that_recovers_counts_at_its_best(self):
        retain = np.array([1.0, 0.5, 0.95, 0.97])
        forget = np.array([1.0, 0.5, 0.1, 0.2])
        assert matched_position(retain, forget, 0.9) == 2.0
        assert matched_position(retain, forget[::-1], 0.9) == pytest.approx(0.2)

    def test_averaged_residual_uses_the_window(self):
        forget = [np.full(2, v) for v in (1.0, 0.8, 0.5, 0.3, 0.1)]
        values, used = averaged_residual(forget)
        assert used == [2, 3] and values.tolist() == pytest.approx([0.4, 0.4])
        assert averaged_residual([np.full(2, v) for v in (1.0, 0.01)])[1] == [1]

    def test_callback_records_every_step(self, tmp_path):
        from runs import config

        from cud_trainer import CUDTrainer

        tokenizer = make_tokenizer()
        forget, retain = prepare_samples(qa_dataset(9), tokenizer), prepare_samples(qa_dataset(3, 50), tokenizer)
        callback = TradeoffCallback(forget, retain, every=2)
        model = make_model(0)
        start = answer_probability(model, forget)
        CUDTrainer(
            model,
            config(tmp_path / "out", save_strategy="no"),
            forget_dataset=qa_dataset(9),
            retain_dataset=qa_dataset(7, 100),
            processing_class=tokenizer,
            callbacks=[callback],
        ).train()
        assert callback.path.steps == [0, 2, 4, 5]
        np.testing.assert_allclose(callback.path.forget[0], start)
        np.testing.assert_allclose(callback.path.forget[-1], answer_probability(model, forget), rtol=1e-5)
