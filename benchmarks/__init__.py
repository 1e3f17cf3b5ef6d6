"""What the package costs, next to the code it replaces: `make bench`."""
