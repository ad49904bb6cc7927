"""The command line: one file a subcommand. They parse, call and print; what is computed is computed elsewhere."""
