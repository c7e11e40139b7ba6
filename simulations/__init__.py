"""What a person runs: the command line, the local engine (Flower's Grid over Ray actors) and the presets."""
