"""Helper modules beside the tests (tiny_runs) are importable, and a model of random weights is at hand."""

import os
import shutil
import sys
from pathlib import Path

import pytest

if shutil.which("nvidia-smi") is None:  # Triton's kernels are interpreted; it reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def csrc():
    """Skips what needs csrc where it is not built; test_native_philox then has the one test that fails."""
    from qirl.kernels import _native

    if not _native.load():
        pytest.skip("csrc is not built: run `python setup.py build_ext --inplace`")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A diffusers folder of a 2-layer, 32-wide model of the digits world, random weights."""
    import tiny_runs

    return tiny_runs.save_random_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def opened(tmp_path, tiny_model):
    """open(*config parts, reward=...) -> Trainer, each in its own run folder."""

    import torch.distributed as dist
    from tiny_runs import colours, train_config

    from qirl.policy import trainer as training

    trainers = []

    def open_one(*parts, reward=colours):
        config = train_config(tmp_path / f"run{len(trainers)}", tiny_model, *parts)
        trainers.append(training.open_trainer(config, [reward]))
        return trainers[-1]

    yield open_one
    for trainer in trainers:
        trainer.scorer.close()
    if dist.is_initialized():  # bfloat16 runs make a process group
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(class of a pipeline) -> a complete one of random weights."""
    from tiny_pipelines import save_pipeline

    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_pipeline(tmp_path_factory.mktemp("pipeline") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def small_references():
    """References of Edit-Plus become latents at 96 x 96 pixels, not at 1024 x 1024."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plus, "VAE_IMAGE_SIZE", 96 * 96)
        patch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
        yield
