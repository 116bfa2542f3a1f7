"""Run the ``training.main`` of OpenCLIP's wheel, write every step's loss: ``stock_losses.py OUT.json ARGUMENTS…``."""

import json
import os
import sys

sys.path = [path for path in sys.path if not path.endswith(os.path.join("open_clip", "src"))]

import open_clip  # noqa: E402
from training import main, train  # noqa: E402

from tic_clip.macs import MODEL_CONFIGS  # noqa: E402

losses = []


def backward(loss, _):
    """OpenCLIP's own, with a record."""
    losses.append(loss.item())
    loss.backward()


open_clip.add_model_config(MODEL_CONFIGS)
train.backward = backward
main.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump({"file": main.__file__, "losses": losses}, file)
