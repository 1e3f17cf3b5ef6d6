"""The losses inside other people's code. Each module needs what it is named after."""
