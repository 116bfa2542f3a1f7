"""Train OpenCLIP step after step: methods and plans, exact sampling, checkpoints, the hooks of open_clip.patch."""
