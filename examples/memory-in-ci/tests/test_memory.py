"""What a step takes is what it took."""

import pytest
import training


@pytest.mark.meft_memory(saved=0, peak_allocated=0)
def test_a_step_on_the_cpu(meft_step):
    model, optimizer = training.make()
    meft_step(model, training.batch(), optimizer, loss=lambda output: output["loss"])


@pytest.mark.meft_memory(device="virtual-RTX4090-24GB", limit="1GiB")
def test_a_step_on_a_gpu(meft_step):
    model, optimizer = training.make("cuda")
    batch = training.batch(num_rows=64, num_tokens=256, device="cuda")
    meft_step(model, batch, optimizer, loss=lambda output: output["loss"])


@pytest.mark.meft_memory(device="virtual-RTX4090-24GB", peak_allocated="1%")
def test_the_trainer_on_a_gpu(meft_memory, tmp_path):
    with meft_memory():
        training.train_with_trainer(tmp_path)
