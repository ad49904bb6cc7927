"""Trainings that tell the architectures apart."""
