"""What a missing library makes of a plug-in: its module cannot be imported."""

raise ImportError("libpatients.so.2 is missing")
