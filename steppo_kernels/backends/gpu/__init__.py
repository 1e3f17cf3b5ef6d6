"""What every backend of a GPU leaves to torch: the matrix products of the output head."""
