"""What a hospital adds to Fedra: a package like anybody's, installed with pip and found by its entry points."""
