"""Estimators of a worker's own gradient, and the points at which they need gradients."""
