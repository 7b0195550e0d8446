"""One loop for every task; it has never heard of patches, losses or models."""

from pdvit.engine.device import autocast, choose_device, device_name
from pdvit.engine.interrupts import EXIT_STOPPED
from pdvit.engine.loop import Trainer
from pdvit.engine.protocol import StepOutput, Task

__all__ = ["EXIT_STOPPED", "StepOutput", "Task", "Trainer", "autocast", "choose_device", "device_name"]
