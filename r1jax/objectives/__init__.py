"""Objectives as pure functions: each usable alone, with shapes, equation and source."""
