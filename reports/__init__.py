"""What a run leaves behind, read back and drawn: tables, curves and one self-contained page."""
