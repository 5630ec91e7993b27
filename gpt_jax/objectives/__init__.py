"""Objectives: plug-in losses of the one train step. One file, one registry line, one config each."""

from gpt_jax.objectives.base import Objective, Setting, build_objective, text_spec

__all__ = ["Objective", "Setting", "build_objective", "text_spec"]
