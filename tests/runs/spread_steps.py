"""Run under torchrun, or alone: some steps of a real task, then its weights and numbers into a folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from pdvit.config import build, resolve
from pdvit.engine.distributed import init_process_group
from pdvit.engine.trainer import Trainer
from pdvit.tasks import task_class
from pdvit.tasks.classification import ClassificationTask


class Wide(ClassificationTask):
    """The task in float64, so that what is left are differences of order."""

    def step(self, network, batch):
        return super().step(network, replace(batch, images=batch.images.double()))


def main(out: Path, settings: dict, steps: int, wide: bool) -> None:
    torch.use_deterministic_algorithms(True)
    config, ranks = resolve(build(("test", settings))), init_process_group()
    task_type = task_class(config)
    source = task_type.open_source(config, print)
    task = (Wide if wide else task_type)(config, source, torch.device("cpu"), ranks)
    for module in task.module.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0  # a head's dropout is drawn by each process for itself
    if wide:
        task.module.double()
    trainer = Trainer(task, config, torch.device("cpu"), ranks)
    state = trainer.state
    for step, batch in zip(range(steps), task.batches(0), strict=False):
        trainer.lr_scheduler.step_update(step)
        state.metrics.add(*trainer.updater(batch, step + 1))
        state.progress.step += 1
    means, _, _ = state.metrics.read(ranks)
    records = {} if wide else task.evaluate(trainer.evaluated)[0]
    snapshot = state.state_dict()
    if ranks.main:
        out.mkdir(parents=True)
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, out / f"{name}.safetensors")
        (out / "numbers.json").write_text(json.dumps({"train": means} | records))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "wide")
