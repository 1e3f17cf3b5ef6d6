"""What ranks send and hold: an account by formulas, and a weak-scaling run on a CPU."""
