"""Snapshot refinement: a small MILP over a few instants, lifted to a whole schedule, mended, and refined."""

from solvers.snapshot.refinement import SnapshotRefinement

__all__ = ["SnapshotRefinement"]
