"""Evaluate checkpoints on every period: tasks, their data, features and metrics, results."""
