"""Other tools' models and ours: layouts of Hugging Face, packages, the hub."""
