"""tic-clip trains CLIP through time and measures what that does.

The way of the data: ``reshard`` cuts a pool into one split a time step, ``methods`` and ``sampling`` say what a step
trains on, ``training`` runs OpenCLIP, ``evaluation`` scores every checkpoint on every year, ``report`` draws the
matrix.
Importing this package loads no model and no torch.
"""

__version__ = "0.1.0"


class TicError(ValueError):
    """A mistake that the user can mend; scripts print its message as one line and exit with status 1."""
