"""Run ``training.main`` of OpenCLIP and write every step's loss: ``stock_losses.py OUT ARGUMENTS…``."""

import json
import sys

import open_clip
from training import main, train

from tic_clip.models import MODEL_CONFIGS

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
