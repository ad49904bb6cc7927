"""From text to files of tokens: inputs found and read, documents cut out of them, encoded on all cores, written whole."""
