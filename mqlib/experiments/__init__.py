"""Experiments whose frame is too long for the cells of a notebook; the notebook runs them, checks and draws."""
