"""What it costs to build layouts and to read them."""
