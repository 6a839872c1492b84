"""Schedules, noising, losses, samplers and trainers."""
