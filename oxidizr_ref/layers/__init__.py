"""The layers a model is built from, one architecture family a file."""
